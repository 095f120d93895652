"""The embedded server's onnxruntime backend reads of a config what NVIDIA's does."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import json_format
from numpy.typing import NDArray

from deploy.embedded import server
from exporter.convert import repaired_graph, to_onnx
from exporter.entropies import open_graph
from exporter.preprocessing import Preprocessing
from exporter.repository import model_configs
from tests.detector.triton import InferenceRequest, PbUtils, Tensor
from tests.networks import small_network


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(server.__file__).parent / "backends" / "onnxruntime" / "model.py"
    spec = importlib.util.spec_from_file_location("onnxruntime_backend", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", PbUtils())
    spec.loader.exec_module(module)
    return module


class OnGpu:
    """A tensor that a stand-in for a GPU has: NumPy's, but one that nobody takes for the host's."""

    def __init__(self, name: str, array: NDArray[Any]) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def is_cpu(self) -> bool:
        return False

    def as_numpy(self) -> NDArray[Any]:
        raise AssertionError("a tensor on the GPU was copied to the host by Triton")

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


class There:
    """An array on the stand-in for a GPU, which is none of NumPy's."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def gpu(calls: list[str]) -> Any:
    """Return what of CuPy the stage uses, on a stand-in for a GPU."""

    def here(array: Any) -> NDArray[Any]:
        return array.array if isinstance(array, There) else np.asarray(array)

    def there(array: Any) -> There:
        return There(here(array))

    def synchronize() -> None:
        calls.append("synchronized")

    return SimpleNamespace(
        from_dlpack=lambda tensor: there(np.from_dlpack(tensor).copy()),  # which NumPy has read-only
        asarray=there,
        asnumpy=here,
        concatenate=lambda parts: there(np.concatenate([here(part) for part in parts])),
        cuda=SimpleNamespace(get_current_stream=lambda: SimpleNamespace(synchronize=synchronize)),
    )


class OfCuda:
    """A session on the CPU that says it is on the GPU, and tells how it was asked."""

    def __init__(self, session: onnxruntime.InferenceSession, calls: list[str], provider: str) -> None:
        self._session, self._calls, self._provider = session, calls, provider

    def get_providers(self) -> list[str]:
        return [self._provider, "CPUExecutionProvider"]

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run_with_iobinding(self, binding: Any) -> None:
        self._calls.append("bound")
        self._session.run_with_iobinding(binding)

    def run(self, outputs: list[str], inputs: dict[str, Any]) -> Any:
        self._calls.append("from the host")
        assert not any(isinstance(array, There) for array in inputs.values())
        return self._session.run(outputs, inputs)


@pytest.mark.parametrize(
    ("provider", "places", "expected"),
    [
        ("CUDAExecutionProvider", ["host"], ["from the host"]),
        ("CUDAExecutionProvider", ["gpu"], ["synchronized", "bound"]),
        ("CUDAExecutionProvider", ["gpu", "gpu"], ["synchronized", "bound"]),
        ("CUDAExecutionProvider", ["host", "gpu"], ["synchronized", "bound"]),
        ("CUDAExecutionProvider", ["host", "host"], ["from the host"]),
        ("CPUExecutionProvider", ["gpu", "host"], ["from the host"]),  # CUDA could not be loaded
    ],
)
def test_tensors_are_read_where_they_are(
    backend: ModuleType, provider: str, places: list[str], expected: list[str]
) -> None:
    calls: list[str] = []
    session = open_graph(repaired_graph(to_onnx(small_network((8, 7, 3), 5)), Preprocessing()).SerializeToString())
    stage = backend._GpuStage(OfCuda(session, calls, provider), gpu(calls), ["image"], ["repaired_probabilities"])
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 7, 3), dtype=np.uint8)[: len(places)]
    tensors: list[Any] = [
        (OnGpu if place == "gpu" else Tensor)("image", part) for place, part in zip(places, images, strict=True)
    ]
    answers = stage.execute([InferenceRequest([tensor], ["repaired_probabilities"]) for tensor in tensors])
    for answer, part in zip(answers, images, strict=True):
        (wanted,) = session.run(None, {"image": part})
        np.testing.assert_allclose(answer.arrays()["repaired_probabilities"], wanted, atol=1e-6)
    assert calls == expected


def test_what_an_export_says_of_a_gpu_is_what_the_session_is_given(backend: ModuleType) -> None:
    versions = {"guarded": 1, "strip_perturb": 1, "badnet": 1, "strip_entropy": 1, "repaired": 1, "strip_verdict": 1}
    (config,) = (each for each in model_configs((8, 7, 3), 5, versions) if each.name == "badnet")
    as_triton_hands_it_over = json.loads(json_format.MessageToJson(config, preserving_proto_field_name=True))
    options = backend._cuda_options(as_triton_hands_it_over)
    assert options == {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}


def test_an_older_config_leaves_onnxruntime_its_defaults(backend: ModuleType) -> None:
    assert backend._cuda_options({"name": "badnet"}) == {"cudnn_conv_algo_search": "EXHAUSTIVE"}
