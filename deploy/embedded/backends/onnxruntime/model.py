"""Backend `onnxruntime` for a Triton that has none: the pip-installed one.

A Python-based backend with the name of NVIDIA's native one, so that a model repository with `platform:
"onnxruntime_onnx"` is served unchanged by both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import triton_python_backend_utils as pb_utils

from detector.serving import Stage

_CUDA = "CUDAExecutionProvider"


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
        on_gpu = args["model_instance_kind"] == "GPU"
        providers: list[Any] = ["CPUExecutionProvider"]
        if on_gpu and _CUDA in onnxruntime.get_available_providers():
            onnxruntime.preload_dlls()  # CUDA and cuDNN may be packages of this Python
            providers.insert(0, (_CUDA, {"device_id": args["model_instance_device_id"], **_cuda_options(config)}))
        session = onnxruntime.InferenceSession(path, options, providers=providers)
        if on_gpu and session.get_providers()[0] != _CUDA:
            # onnxruntime falls back to the CPU without a word.
            pb_utils.Logger.log_warn(f"{args['model_name']}: onnxruntime has no CUDA here, so it runs on the CPU")
        inputs = [tensor["name"] for tensor in config["input"]]
        outputs = [tensor["name"] for tensor in config["output"]]

        def compute(*arrays: Any) -> list[Any]:
            return list(session.run(outputs, dict(zip(inputs, arrays, strict=True))))

        self._stage = Stage(pb_utils, inputs, outputs, compute)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all requests of a batch."""
        return self._stage.execute(requests)


def _cuda_options(config: dict[str, Any]) -> dict[str, str]:
    """Return the options of the accelerator `cuda`, as NVIDIA's backend reads them from a model's config."""
    accelerators = config.get("optimization", {}).get("execution_accelerators", {}).get("gpu_execution_accelerator", [])
    return {name: text for each in accelerators if each["name"] == "cuda" for name, text in each["parameters"].items()}
