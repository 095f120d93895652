"""A server that answers by rules, where the real one could not be made to fail in time."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

CLASSES = 5
SHAPE = (4, 3, 3)


@dataclass
class Inference:
    """What the server saw of one request."""

    model: str
    batch: NDArray[Any]
    outputs: list[str]
    headers: dict[str, str]
    request_id: str
    peer: str


@dataclass
class Server(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """A KServe v2 server that answers by rules simple enough to predict.

    Of an image whose first pixel is p: label p % CLASSES, entropy p / 10, p-value p / 255, trojaned if p >= 200.
    """

    max_batch_size: int = 64
    classes: int = CLASSES
    delays_seconds: dict[int, float] = field(default_factory=dict)  # by a request's first pixel
    failures: deque[tuple[grpc.StatusCode, str]] = field(default_factory=deque)
    metadata_failures: deque[tuple[grpc.StatusCode, str]] = field(default_factory=deque)
    replace_outputs: dict[str, Any] = field(default_factory=dict)
    input_datatype: str = "UINT8"
    ready: bool = True
    inferences: list[Inference] = field(default_factory=list)
    metadata_calls: int = 0
    running: int = 0
    most_running: int = 0
    abandoned: int = 0
    url: str = ""
    lock: Any = field(default_factory=threading.Lock)

    def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        self.fail(self.metadata_failures, context)
        return service_pb2.ServerReadyResponse(ready=self.ready)

    def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        return service_pb2.ModelReadyResponse(ready=self.ready)

    def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.metadata_calls += 1
        self.fail(self.metadata_failures, context)
        response = service_pb2.ModelMetadataResponse(name=request.name, versions=["1", "2"])
        if request.name == "guarded":
            response.inputs.add(name="image", datatype=self.input_datatype, shape=[-1, *SHAPE])
            response.outputs.add(name="label", datatype="INT32", shape=[-1, 1])
            response.outputs.add(name="probabilities", datatype="FP32", shape=[-1, self.classes])
        else:
            response.inputs.add(name="perturbations", datatype="FP32", shape=[-1, -1, *SHAPE])
            response.outputs.add(name="sentinel_probabilities", datatype="FP32", shape=[-1, -1, self.classes])
        return response

    def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        config = model_config_pb2.ModelConfig(name=request.name, max_batch_size=self.max_batch_size)
        return service_pb2.ModelConfigResponse(config=config)

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        (tensor,) = request.inputs
        dtype = {"UINT8": np.uint8, "FP32": np.float32}[tensor.datatype]
        batch = np.frombuffer(request.raw_input_contents[0], dtype).reshape(tensor.shape)
        with self.lock:
            headers = dict(context.invocation_metadata())
            names = [output.name for output in request.outputs]
            self.inferences.append(Inference(request.model_name, batch, names, headers, request.id, context.peer()))
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            time.sleep(self.delays_seconds.get(int(batch.flat[0]), 0.0))
            self.fail(self.failures, context)
        finally:
            with self.lock:
                self.running -= 1
                self.abandoned += not context.is_active()
        first = batch.reshape(len(batch), -1)[:, :1]
        one_hot = np.eye(self.classes, dtype=np.float32)[first[:, 0].astype(int) % self.classes]
        answers: dict[str, NDArray[Any]] = {
            "label": (first % self.classes).astype(np.int32),
            "trojaned": first >= 200,
            "entropy": (first / 10).astype(np.float32),
            "p_value": (first / 255).astype(np.float32),
            "perturbations": (first % 11).astype(np.int32),
            "probabilities": one_hot,
            "sentinel_probabilities": one_hot[:, None],
        } | self.replace_outputs
        datatypes = {"int32": "INT32", "bool": "BOOL", "float32": "FP32", "int64": "INT64"}
        response = service_pb2.ModelInferResponse(model_name=request.model_name, model_version="1")
        for name in names:
            if answers[name] is not None:
                array = answers[name]
                response.outputs.add(name=name, datatype=datatypes[array.dtype.name], shape=array.shape)
                response.raw_output_contents.append(b"" if array.size == 0 else array.tobytes())
        return response

    def fail(self, failures: deque[tuple[grpc.StatusCode, str]], context: Any) -> None:
        with self.lock:
            failure = failures.popleft() if failures else None
        if failure is not None:
            context.abort(*failure)

    def start(
        self, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None, **options: int
    ) -> grpc.Server:
        """Start it; `options` are gRPC's, without `grpc.`."""
        channel = {"so_reuseport": 0} | options
        server = grpc.server(
            ThreadPoolExecutor(8), options=[(f"grpc.{name}", value) for name, value in channel.items()]
        )
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, server)
        add_port = server.add_insecure_port if credentials is None else server.add_secure_port
        port = add_port(address, *([] if credentials is None else [credentials]))
        self.url = f"{address.rpartition(':')[0]}:{port}"
        server.start()
        return server


def images_of(first_pixels: list[int] | range) -> NDArray[np.uint8]:
    images = np.zeros((len(first_pixels), *SHAPE), np.uint8)
    images[:, 0, 0, 0] = list(first_pixels)
    return images
