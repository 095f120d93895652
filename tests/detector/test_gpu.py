"""The stages on a GPU: tensors come in and go out through DLPack, and never visit the host."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detector.scores import DETECTORS
from detector.serving import SENTINEL_OUTPUTS, entropy_stage, perturb_stage
from tests.detector import reference
from tests.detector.test_serving import arguments, write_detector
from tests.detector.triton import InferenceRequest, InferenceResponse, PbUtils

pytestmark = pytest.mark.gpu


@dataclass(frozen=True)
class GpuTensor:
    """A tensor on the GPU, as Triton hands it over: it has no NumPy form."""

    tensor_name: str
    array: Any

    def name(self) -> str:
        return self.tensor_name

    def is_cpu(self) -> bool:
        return False

    def as_numpy(self) -> Any:
        raise AssertionError("a GPU tensor was copied to the host")

    def __dlpack__(self, stream: Any = None) -> Any:
        return self.array.__dlpack__(stream=stream)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()

    @classmethod
    def from_dlpack(cls, name: str, array: Any) -> GpuTensor:
        return cls(name, array)


def on_gpu(outputs: list[str], **inputs: Any) -> InferenceRequest:
    import cupy

    tensors: list[Any] = [GpuTensor(name, cupy.asarray(array)) for name, array in inputs.items()]
    return InferenceRequest(tensors, outputs)


def host(response: InferenceResponse) -> dict[str, Any]:
    tensors: Any = response.output_tensors
    return {tensor.name(): tensor.array.get() for tensor in tensors}


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_image_sized_stages_stay_on_the_gpu(tmp_path: Path, detector: str) -> None:
    plain = detector == "consensus"  # whether the image as it came is before its perturbations
    generator = np.random.default_rng(0)
    overlays = generator.integers(0, 256, (3, 4, 5, 2), dtype=np.uint8)
    (tmp_path / "1").mkdir()
    np.savez(tmp_path / "1" / "overlays.npz", overlays=overlays, alpha=0.6)
    write_detector(tmp_path, detector)
    pb_utils = PbUtils(Tensor=GpuTensor)
    given = arguments(tmp_path, kind="GPU")

    images = generator.integers(0, 256, (2, 4, 5, 2), dtype=np.uint8)
    first, second = perturb_stage(given, pb_utils).execute([on_gpu(["perturbations"], image=images)] * 2)
    expected = [[reference.blend(image, overlay, 0.6) for overlay in overlays] for image in images]
    for answer in (first, second):
        np.testing.assert_allclose(host(answer)["perturbations"][:, int(plain) :], expected, atol=1e-4)

    certain, undecided = [[1.0, 0.0], [1.0, 0.0]], [[0.5, 0.5], [0.5, 0.5]]
    first_row = [[0.0, 1.0]] if plain else []
    rows = np.array([[*first_row, *certain], [*first_row, *undecided]], np.float32)
    (answer,) = entropy_stage(given, pb_utils).execute([on_gpu(list(SENTINEL_OUTPUTS), sentinel_probabilities=rows)])
    found = host(answer)
    np.testing.assert_allclose(found["sentinel_entropies"], [[0.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(found["sentinel_plain_entropy"], [[0.0 if plain else -1.0]] * 2)
    assert found["sentinel_label"].tolist() == [[1 if plain else -1]] * 2
