"""Backend `onnxruntime` for a Triton that has none: the pip-installed one.

A Python-based backend with the name of NVIDIA's native one, so that a model repository with `platform:
"onnxruntime_onnx"` is served unchanged by both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

from detector.serving import ON_THE_CPU, Stage, array_namespace

_CUDA = "CUDAExecutionProvider"
_SEARCHES = {"0": "EXHAUSTIVE", "1": "HEURISTIC", "2": "DEFAULT"}


class TritonPythonModel:
    """The interface that Triton's Python backend asks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the version's ONNX file."""
        config = json.loads(args["model_config"])
        file_name = config.get("default_model_filename") or "model.onnx"
        path = Path(args["model_repository"]) / args["model_version"] / file_name
        options = onnxruntime.SessionOptions()
        # Several models share the cores: a thread that spins between two runs takes them from the others.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        xp = array_namespace(args)
        providers: list[Any] = ["CPUExecutionProvider"]
        if xp is not np and _CUDA in onnxruntime.get_available_providers():
            onnxruntime.preload_dlls()  # CUDA and cuDNN may be packages of this Python
            providers.insert(0, (_CUDA, {"device_id": args["model_instance_device_id"], **_cuda_options(config)}))
        session = onnxruntime.InferenceSession(path, options, providers=providers)
        if xp is not np and session.get_providers()[0] != _CUDA:
            # onnxruntime falls back to the CPU without a word.
            pb_utils.Logger.log_warn(f"{args['model_name']}: {ON_THE_CPU}")
        inputs = [tensor["name"] for tensor in config["input"]]
        outputs = [tensor["name"] for tensor in config["output"]]
        if xp is np:
            self._stage = Stage(pb_utils, inputs, outputs, _from_host(session, inputs, outputs))
        else:
            self._stage = _GpuStage(session, xp, inputs, outputs)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all requests of a batch."""
        return self._stage.execute(requests)


def _from_host(
    session: onnxruntime.InferenceSession, inputs: list[str], outputs: list[str]
) -> Callable[..., list[Any]]:
    """Return what runs a network on the host's tensors."""
    return lambda *arrays: list(session.run(outputs, dict(zip(inputs, arrays, strict=True))))


def _are_on_host(arrays: Sequence[Any]) -> bool:
    return all(isinstance(array, np.ndarray) for array in arrays)


class _GpuStage(Stage):
    """Runs a network on tensors of a GPU and of the host; its answers go to the host.

    Args:
        session: the network. If it runs on the GPU, tensors that are there are read where they are.
        cupy: the array namespace of the GPU.
        inputs: names of the input tensors.
        outputs: names of the output tensors.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, cupy: ModuleType, inputs: list[str], outputs: list[str]
    ) -> None:
        runs_there = session.get_providers()[0] == _CUDA
        from_host = _from_host(session, inputs, outputs)

        def compute(*arrays: Any) -> list[Any]:
            if not runs_there or _are_on_host(arrays):
                return from_host(*map(cupy.asnumpy, arrays))
            on_gpu = [cupy.asarray(array) for array in arrays]
            cupy.cuda.get_current_stream().synchronize()  # the session reads on a stream of its own
            binding = session.io_binding()
            for name, array in zip(inputs, on_gpu, strict=True):
                binding.bind_ortvalue_input(name, onnxruntime.OrtValue.from_dlpack(array))
            for name in outputs:
                binding.bind_output(name)
            session.run_with_iobinding(binding)
            return list(binding.copy_outputs_to_cpu())

        super().__init__(pb_utils, inputs, outputs, compute)
        self._cupy = cupy

    def read(self, request: Any, name: str) -> Any:
        """Return an input of a request, where it is."""
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        return tensor.as_numpy() if tensor.is_cpu() else self._cupy.from_dlpack(tensor)

    def join(self, parts: Sequence[Any]) -> Any:
        """Return what was read of several requests as one array; on the GPU if any of it is."""
        if _are_on_host(parts):
            return np.concatenate(parts)
        return self._cupy.concatenate([self._cupy.asarray(part) for part in parts])


def _cuda_options(config: dict[str, Any]) -> dict[str, str]:
    """Return the options of CUDAExecutionProvider that a model's config has, as NVIDIA's backend reads them."""
    accelerators = config.get("optimization", {}).get("execution_accelerators", {}).get("gpu_execution_accelerator", [])
    options = {
        name: value for each in accelerators if each["name"] == "cuda" for name, value in each["parameters"].items()
    }
    search = config.get("parameters", {}).get("cudnn_conv_algo_search", {}).get("string_value", "0")
    return options | {"cudnn_conv_algo_search": _SEARCHES[search]}
