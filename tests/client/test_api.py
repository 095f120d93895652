from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from client.api import ERROR_OF_STATUS, GuardedClient, TlsOptions
from detector.errors import (
    AccessDeniedError,
    DataError,
    DeadlineExceededError,
    InputError,
    RequestRejectedError,
    ServerError,
    ServerUnavailableError,
)

CLASSES = 5
SHAPE = (4, 3, 3)
FAILURES = [status for status in grpc.StatusCode if status is not grpc.StatusCode.OK]


@dataclass
class Inference:
    """What the server saw of one request."""

    model: str
    batch: NDArray[Any]
    outputs: list[str]
    headers: dict[str, str]


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
            self.inferences.append(Inference(request.model_name, batch, names, headers))
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

    def start(self, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None) -> grpc.Server:
        server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, server)
        add_port = server.add_insecure_port if credentials is None else server.add_secure_port
        port = add_port(address, *([] if credentials is None else [credentials]))
        self.url = f"{address.rpartition(':')[0]}:{port}"
        server.start()
        return server


@pytest.fixture
def server() -> Iterator[Server]:
    double = Server()
    running = double.start()
    yield double
    running.stop(grace=None).wait()


@pytest.fixture
def client(server: Server) -> Iterator[GuardedClient]:
    with GuardedClient(server.url, sleep=lambda _: None) as opened:
        yield opened


def images_of(first_pixels: list[int] | range) -> NDArray[np.uint8]:
    images = np.zeros((len(first_pixels), *SHAPE), np.uint8)
    images[:, 0, 0, 0] = list(first_pixels)
    return images


# Classifying


def test_each_image_gets_its_label_verdict_and_entropy(client: GuardedClient) -> None:
    verdicts = client.classify(images_of([7, 200, 12]))
    assert verdicts.labels.tolist() == [2, 0, 2]
    assert verdicts.trojaned.tolist() == [False, True, False]
    np.testing.assert_allclose(verdicts.entropy_bits, [0.7, 20.0, 1.2], rtol=1e-6)
    np.testing.assert_allclose(verdicts.p_values, [7 / 255, 200 / 255, 12 / 255], rtol=1e-6)
    assert verdicts.perturbations.tolist() == [7, 2, 1]
    assert [array.dtype.name for array in (verdicts.labels, verdicts.trojaned, verdicts.entropy_bits)] == [
        "int32",
        "bool",
        "float32",
    ]
    assert verdicts.probabilities is None
    assert verdicts.classes == CLASSES
    assert [verdict.label for verdict in verdicts] == [2, 0, 2]
    assert verdicts[1].trojaned is True
    assert len(verdicts) == 3


def test_one_image_needs_no_batch_dimension(client: GuardedClient) -> None:
    assert client.classify(images_of([8])[0]).labels.tolist() == [3]


def test_probabilities_come_only_when_asked_for(client: GuardedClient, server: Server) -> None:
    client.classify(images_of([1]))
    verdicts = client.classify(images_of([1, 4]), probabilities=True)
    assert verdicts.probabilities is not None
    np.testing.assert_array_equal(verdicts.probabilities, [[0, 1, 0, 0, 0], [0, 0, 0, 0, 1]])
    assert server.inferences[0].outputs == ["label", "trojaned", "entropy", "p_value", "perturbations"]
    assert server.inferences[1].outputs == ["label", "trojaned", "entropy", "p_value", "perturbations", "probabilities"]


def test_more_images_than_the_server_takes_are_split_and_stay_in_order(client: GuardedClient, server: Server) -> None:
    server.max_batch_size = 4
    server.delays_seconds = {0: 0.1, 8: 0.05}  # the first answer comes last
    progress: list[tuple[int, int]] = []
    verdicts = client.classify(images_of(range(30)), on_progress=lambda done, total: progress.append((done, total)))
    assert verdicts.labels.tolist() == [pixel % CLASSES for pixel in range(30)]
    assert sorted(len(inference.batch) for inference in server.inferences) == [2, 4, 4, 4, 4, 4, 4, 4]
    assert progress == [(4, 30), (8, 30), (12, 30), (16, 30), (20, 30), (24, 30), (28, 30), (30, 30)]


def test_no_more_requests_are_in_flight_than_the_window_allows(server: Server) -> None:
    server.max_batch_size = 1
    server.delays_seconds = dict.fromkeys(range(9), 0.05)
    with GuardedClient(server.url, window=3) as client:
        client.classify(images_of(range(9)))
    assert 1 < server.most_running <= 3


def test_the_server_is_asked_about_the_model_only_once(client: GuardedClient, server: Server) -> None:
    for _ in range(3):
        client.classify(images_of([1]))
    assert server.metadata_calls == 1


def test_an_empty_batch_is_refused_without_a_request(client: GuardedClient, server: Server) -> None:
    with pytest.raises(DataError, match="got an empty batch, expected at least one image"):
        client.classify(images_of([]))
    assert server.inferences == []


def test_the_original_network_is_asked_with_the_plain_images_as_float_pixels(
    client: GuardedClient, server: Server
) -> None:
    server.max_batch_size = 2
    images = images_of([3, 250, 4])
    answers = client.original_probabilities(images)
    assert answers.argmax(axis=1).tolist() == [3, 0, 4]
    assert answers.shape == (3, CLASSES)
    sent = sorted(server.inferences, key=lambda inference: -len(inference.batch))
    assert [inference.model for inference in sent] == ["badnet", "badnet"]
    assert sent[0].batch.dtype == np.float32
    np.testing.assert_array_equal(sent[0].batch, images[:2, None].astype(np.float32))


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        (np.zeros((2, *SHAPE), np.float32), "got float32"),
        (np.zeros((2, 5, 3, 3), np.uint8), r"got shape \(2, 5, 3, 3\)"),
        (np.zeros((4, 3), np.uint8), r"got shape \(4, 3\)"),
        (np.zeros((1, 1, *SHAPE), np.uint8), r"got shape \(1, 1, 4, 3, 3\)"),
        ([[1]], "got list"),
    ],
)
def test_images_that_the_model_does_not_take_are_never_sent(
    client: GuardedClient, server: Server, images: Any, complaint: str
) -> None:
    for ask in (client.classify, client.original_probabilities):
        with pytest.raises(DataError, match=rf"{complaint}.*takes uint8 of shape \(batch, 4, 3, 3\)"):
            ask(images)
    assert server.inferences == []


def test_images_need_not_be_contiguous(client: GuardedClient) -> None:
    assert client.classify(images_of([1, 2, 3])[::-1]).labels.tolist() == [3, 2, 1]


# About the server


def test_metadata_tells_shape_classes_versions_and_batch_size(client: GuardedClient) -> None:
    about = client.metadata()
    assert (about.model, about.versions, about.image_shape, about.classes, about.max_batch_size) == (
        "guarded",
        ("1", "2"),
        SHAPE,
        CLASSES,
        64,
    )


def test_a_foreign_model_is_refused_with_what_it_offers(client: GuardedClient, server: Server) -> None:
    server.input_datatype = "FP32"
    with pytest.raises(ServerError, match=r"got inputs image FP32 \[-1, 4, 3, 3\].*expected one UINT8 input 'image'"):
        client.classify(images_of([1]))


def test_a_model_without_batching_is_refused(client: GuardedClient, server: Server) -> None:
    server.max_batch_size = 0
    with pytest.raises(ServerError, match="max_batch_size 0"):
        client.metadata()


@pytest.mark.parametrize("ready", [True, False])
def test_readiness_is_what_the_server_says(client: GuardedClient, server: Server, ready: bool) -> None:
    server.ready = ready
    assert client.is_ready() is ready


def test_an_absent_server_is_not_ready() -> None:
    with GuardedClient("127.0.0.1:1") as client:
        assert client.is_ready() is False


def test_a_server_that_refuses_us_is_no_matter_of_readiness(client: GuardedClient, server: Server) -> None:
    server.metadata_failures.append((grpc.StatusCode.UNAUTHENTICATED, "who are you?"))
    with pytest.raises(AccessDeniedError, match="who are you"):
        client.is_ready()


# Failures


def test_every_grpc_status_has_an_error_of_ours() -> None:
    assert set(ERROR_OF_STATUS) == set(grpc.StatusCode)


@pytest.mark.parametrize("status", FAILURES, ids=lambda status: status.name)
def test_a_failed_inference_raises_our_error_with_address_and_details(
    client: GuardedClient, server: Server, status: grpc.StatusCode
) -> None:
    server.failures.extend([(status, "the details")] * 9)
    with pytest.raises(ServerError) as caught:
        client.classify(images_of([1]))
    assert type(caught.value) is ERROR_OF_STATUS[status]
    assert str(caught.value).startswith(f"{server.url}: ")
    if status is not grpc.StatusCode.DEADLINE_EXCEEDED:
        assert "the details" in str(caught.value)
    assert not isinstance(caught.value, InferenceServerException)


@pytest.mark.parametrize("status", FAILURES, ids=lambda status: status.name)
def test_a_failed_question_about_the_model_raises_our_error(
    client: GuardedClient, server: Server, status: grpc.StatusCode
) -> None:
    server.metadata_failures.extend([(status, "the details")] * 9)
    with pytest.raises(ServerError) as caught:
        client.metadata()
    assert type(caught.value) is ERROR_OF_STATUS[status]


def test_only_unavailability_is_tried_again(client: GuardedClient, server: Server) -> None:
    for status in FAILURES:
        server.failures = deque([(status, "no")] * 9)
        server.inferences.clear()
        with pytest.raises(ServerError):
            client.classify(images_of([1]))
        assert len(server.inferences) == (5 if status is grpc.StatusCode.UNAVAILABLE else 1), status


def test_a_passing_unavailability_goes_unnoticed_and_the_pauses_grow(server: Server) -> None:
    server.metadata_failures.append((grpc.StatusCode.UNAVAILABLE, "starting"))
    server.failures.extend([(grpc.StatusCode.UNAVAILABLE, "busy")] * 4)
    pauses: list[float] = []
    with GuardedClient(server.url, sleep=pauses.append) as client:
        assert client.classify(images_of([9])).labels.tolist() == [4]
    assert len(pauses) == 5
    for pause, least in zip(pauses[1:], (0.2, 0.4, 0.8, 1.6), strict=True):
        assert least <= pause <= least + 0.2  # jitter


def test_batches_that_met_an_unavailable_server_still_come_back_in_order(client: GuardedClient, server: Server) -> None:
    server.max_batch_size = 2
    server.failures.extend([(grpc.StatusCode.UNAVAILABLE, "busy")] * 3)
    verdicts = client.classify(images_of(range(20)))
    assert verdicts.labels.tolist() == [pixel % CLASSES for pixel in range(20)]


def test_retries_stop_before_the_timeout_would_pass(server: Server) -> None:
    server.failures.extend([(grpc.StatusCode.UNAVAILABLE, "busy")] * 99)
    pauses: list[float] = []
    client = GuardedClient(server.url, retries=50, timeout_seconds=1.0, sleep=pauses.append)
    with client, pytest.raises(ServerUnavailableError):
        client.classify(images_of([1]))
    assert all(pause < 1.0 for pause in pauses)
    assert len(pauses) < 4


def test_an_absent_server_is_named_along_with_the_way_to_start_one() -> None:
    client = GuardedClient("127.0.0.1:1", sleep=lambda _: None)
    with client, pytest.raises(ServerUnavailableError, match=r"127\.0\.0\.1:1: .*stripwire serve"):
        client.classify(images_of([1]))


def test_a_server_that_comes_up_late_is_found(server: Server) -> None:
    late = Server()
    port = server.url.rpartition(":")[2]
    late_address = f"127.0.0.2:{port}"
    started: list[grpc.Server] = []

    def start_then_wait(seconds: float) -> None:
        if not started:
            started.append(late.start(late_address))
        time.sleep(seconds)

    with GuardedClient(late_address, sleep=start_then_wait) as client:
        assert client.classify(images_of([2])).labels.tolist() == [2]
    started[0].stop(grace=None).wait()


def test_an_answer_that_takes_too_long_is_given_up(server: Server) -> None:
    with GuardedClient(server.url, timeout_seconds=0.3) as client:
        client.metadata()
        server.delays_seconds[1] = 0.8
        with pytest.raises(DeadlineExceededError, match=r"'guarded' did not answer within 0\.3 s"):
            client.classify(images_of([1]))


def test_after_a_failure_the_requests_in_flight_are_cancelled(client: GuardedClient, server: Server) -> None:
    server.max_batch_size = 1
    client.metadata()
    server.failures.append((grpc.StatusCode.INTERNAL, "stub is not healthy"))
    server.delays_seconds = dict.fromkeys(range(1, 50), 0.5)
    with pytest.raises(ServerError, match="stub is not healthy"):
        client.classify(images_of(range(50)))
    while server.running:
        time.sleep(0.02)
    assert len(server.inferences) <= 4
    assert server.abandoned >= len(server.inferences) - 1


def test_a_model_that_is_not_loaded_is_said_so(client: GuardedClient, server: Server) -> None:
    server.metadata_failures.append((grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'badnet' is not found"))
    with pytest.raises(ServerError, match="has not loaded the model 'badnet'"):
        client.original_probabilities(images_of([1]))


def test_a_server_without_model_control_is_named_at_once(client: GuardedClient, server: Server) -> None:
    said = "explicit model load / unload is not allowed if polling is enabled"
    server.metadata_failures.append((grpc.StatusCode.UNAVAILABLE, said))
    with pytest.raises(ServerError, match="started without --model-control-mode=explicit") as caught:
        client.ask("guarded", lambda triton, **options: triton.get_model_metadata("guarded", **options))
    assert type(caught.value) is ServerError
    assert server.metadata_calls == 1  # trying again would not help


def test_a_restricted_protocol_is_a_matter_of_credentials(client: GuardedClient, server: Server) -> None:
    said = "This protocol is restricted, expecting header 'triton-grpc-protocol-key'"
    server.failures.append((grpc.StatusCode.UNAVAILABLE, said))
    with pytest.raises(AccessDeniedError, match="triton-grpc-protocol-key"):
        client.classify(images_of([1]))
    assert len(server.inferences) == 1


def test_a_refused_request_makes_the_client_ask_about_the_model_again(client: GuardedClient, server: Server) -> None:
    client.metadata()
    server.classes = 7
    server.failures.append((grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape"))
    with pytest.raises(RequestRejectedError):
        client.classify(images_of([1]))
    assert client.metadata().classes == 7


@pytest.mark.parametrize(
    ("output", "answer", "complaint"),
    [
        ("label", None, "lacks output 'label'"),
        ("label", np.zeros((1, 1), np.int64), r"got int64 of shape \(1, 1\), expected int32 of shape \(1, 1\)"),
        ("trojaned", np.zeros((2, 1), np.bool_), r"got bool of shape \(2, 1\), expected bool of shape \(1, 1\)"),
        ("entropy", np.zeros((0, 1), np.float32), r"got float32 of shape \(0, 1\)"),
    ],
)
def test_an_answer_that_breaks_the_contract_is_refused(
    client: GuardedClient, server: Server, output: str, answer: Any, complaint: str
) -> None:
    server.replace_outputs = {output: answer}
    with pytest.raises(ServerError, match=complaint):
        client.classify(images_of([1]))


def test_an_answer_without_its_bytes_is_refused(client: GuardedClient, server: Server) -> None:
    class Hollow(np.ndarray[Any, Any]):  # what Triton's stub sends under NumPy 2
        def tobytes(self, order: Any = "C") -> bytes:  # noqa: ARG002
            return b""

    server.replace_outputs = {"entropy": np.zeros((1, 1), np.float32).view(Hollow)}
    with pytest.raises(ServerError, match="output 'entropy' is damaged"):
        client.classify(images_of([1]))


def test_a_closed_client_says_so(client: GuardedClient) -> None:
    client.close()
    for ask in (client.is_ready, client.metadata, lambda: client.classify(images_of([1]))):
        with pytest.raises(InputError, match="it was closed"):
            ask()


# Options and secrets


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"url": "http://127.0.0.1:8001"}, "expected host:port"),
        ({"url": "127.0.0.1"}, "expected host:port"),
        ({"url": "host:99999"}, "expected host:port"),
        ({"timeout_seconds": 0}, "timeout_seconds: got 0"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds: got nan"),
        ({"retries": -1}, "retries: got -1"),
        ({"window": 0}, "window: got 0"),
        ({"token": "two words"}, "token: "),
        ({"token": ""}, "token: "),
        ({"headers": {"key": "line\nbreak"}}, "headers: got 'key'"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        GuardedClient(**options)


def test_the_token_travels_as_a_bearer_header_along_with_other_headers(server: Server) -> None:
    with GuardedClient(server.url, token="secret", headers={"Triton-Grpc-Protocol-Key": "k"}) as client:  # noqa: S106
        client.classify(images_of([1]))
    assert server.inferences[0].headers["authorization"] == "Bearer secret"
    assert server.inferences[0].headers["triton-grpc-protocol-key"] == "k"


@pytest.mark.parametrize("secrets", [{"token": "secret"}, {"headers": {"triton-grpc-protocol-key": "secret"}}])
def test_secrets_do_not_go_to_another_machine_in_plaintext(secrets: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="not encrypted") as caught:
        GuardedClient("triton.example:8001", **secrets)
    assert "secret" not in str(caught.value).replace("secrets", "")
    GuardedClient("triton.example:8001", **secrets, allow_plaintext_secrets=True).close()
    GuardedClient("triton.example:8001", **secrets, tls=TlsOptions()).close()
    GuardedClient("triton.example:8001").close()


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8001", "127.8.0.1:8001", "[::1]:8001", "localhost:8001", "unix:/run/t.sock"]
)
def test_this_machine_may_get_the_token_in_plaintext(url: str) -> None:
    GuardedClient(url, token="secret").close()  # noqa: S106


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a server certificate for `stripwire.test` and a client certificate."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("certificates")

    def run(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    run("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=test authority", "-days", "2")
    for name in ("server", "client"):
        (folder / f"{name}.ext").write_text("subjectAltName=DNS:stripwire.test\n")
        run("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        run(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-out", f"{name}.crt", "-extfile", f"{name}.ext", "-days", "2"),
        )
    run("pkcs8", "-topk8", "-in", "client.key", "-out", "locked.key", "-passout", "pass:secret")
    return folder


@pytest.fixture
def mutual_tls_server(certificates: Path) -> Iterator[Server]:
    double = Server()
    pair = ((certificates / "server.key").read_bytes(), (certificates / "server.crt").read_bytes())
    authority = (certificates / "ca.crt").read_bytes()
    running = double.start(credentials=grpc.ssl_server_credentials([pair], authority, require_client_auth=True))
    yield double
    running.stop(grace=None).wait()


def test_mutual_tls_carries_requests_and_the_token(mutual_tls_server: Server, certificates: Path) -> None:
    tls = TlsOptions(
        root_certificates=certificates / "ca.crt",
        private_key=certificates / "client.key",
        certificate_chain=certificates / "client.crt",
        server_name="stripwire.test",
    )
    with GuardedClient(mutual_tls_server.url, tls=tls, token="secret") as client:  # noqa: S106
        assert client.classify(images_of([6])).labels.tolist() == [1]
    assert mutual_tls_server.inferences[0].headers["authorization"] == "Bearer secret"


def test_without_a_certificate_a_mutual_tls_server_is_out_of_reach(
    mutual_tls_server: Server, certificates: Path
) -> None:
    tls = TlsOptions(root_certificates=certificates / "ca.crt", server_name="stripwire.test")
    with GuardedClient(mutual_tls_server.url, tls=tls, retries=0) as client, pytest.raises(ServerUnavailableError):
        client.classify(images_of([6]))


def test_a_server_with_another_name_is_not_trusted(mutual_tls_server: Server, certificates: Path) -> None:
    tls = TlsOptions(
        certificates / "ca.crt", certificates / "client.key", certificates / "client.crt", server_name="other.test"
    )
    with GuardedClient(mutual_tls_server.url, tls=tls, retries=0) as client, pytest.raises(ServerUnavailableError):
        client.classify(images_of([6]))


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"root_certificates": "absent.crt"}, r"root certificates: cannot read .*absent\.crt: No such file"),
        ({"root_certificates": "ca.srl"}, r"root certificates: .*ca\.srl is not in PEM format"),
        ({"root_certificates": "ca.key"}, r"root certificates: .*ca\.key cannot be used"),
        ({"private_key": "client.key"}, "got one of private key and certificate chain"),
        ({"private_key": "server.key", "certificate_chain": "client.crt"}, r"client\.crt cannot be used: KEY_VALUES"),
        ({"private_key": "locked.key", "certificate_chain": "client.crt"}, "encrypted"),
        ({"private_key": "absent.key", "certificate_chain": "client.crt"}, "private key: cannot read"),
    ],
)
def test_tls_files_are_checked_beforehand(certificates: Path, files: dict[str, str], complaint: str) -> None:
    paths: dict[str, Any] = {option: certificates / name for option, name in files.items()}
    with pytest.raises(InputError, match=complaint):
        TlsOptions(**paths)


def test_another_machine_gets_no_images_in_shared_memory() -> None:
    with (
        GuardedClient("192.0.2.1:8001") as client,
        pytest.raises(InputError, match=r"shared memory: 192\.0\.2\.1:8001 is another machine"),
    ):
        client.classify(np.zeros((1, 2, 2, 1), np.uint8), shared_memory=True)


def test_importing_the_client_loads_no_heavy_library() -> None:
    code = "import client.api, sys; print(*sorted({'tensorflow', 'keras', 'scipy', 'onnxruntime'} & set(sys.modules)))"
    completed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert completed.stdout.strip() == ""
