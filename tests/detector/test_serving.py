"""The stages behind the Python-backend models, fed as Triton feeds them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detector.calibration import SHARES
from detector.conformal import peel
from detector.errors import RepositoryError, SetupError
from detector.serving import SENTINEL_OUTPUTS, entropy_stage, perturb_stage, verdict_stage
from tests.detector import reference
from tests.detector.triton import PbUtils, request

PUBLIC = ["label", "trojaned", "entropy", "p_value", "perturbations", "probabilities"]

pytestmark = pytest.mark.filterwarnings("error")


def arguments(folder: Path, mode: str | None = "block", kind: str = "CPU") -> dict[str, str]:
    parameters = {} if mode is None else {"mode": {"string_value": mode}}
    return {
        "model_name": "strip_verdict",
        "model_repository": str(folder),
        "model_version": "1",
        "model_instance_kind": kind,
        "model_instance_device_id": "0",
        "model_config": json.dumps(
            {"parameters": parameters, "input": [], "output": [{"name": "probabilities", "dims": [3]}]}
        ),
    }


def opinions(entropies: list[list[float]]) -> dict[str, Any]:
    """Return the sentinel's tensors as `strip_entropy` sends them when `strip` decides alone."""
    bits = np.array(entropies, np.float32)
    return {
        "sentinel_entropies": bits,
        "sentinel_plain_entropy": np.full((len(bits), 1), -1, np.float32),
        "sentinel_label": np.full((len(bits), 1), -1, np.int32),
        "sentinel_perturbations": np.full((len(bits), 1), bits.shape[1], np.int32),
    }


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    (tmp_path / "1").mkdir()
    overlays = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 2), dtype=np.uint8)
    np.savez(tmp_path / "1" / "overlays.npz", overlays=overlays, alpha=0.6)
    write_detector(tmp_path, "strip")
    return tmp_path


def write_detector(folder: Path, detector: str, threshold_nll: float | None = 2.0) -> None:
    """Write what the stages read."""
    calibration: dict[str, Any] = {"detector": detector, "threshold_bits": 0.5, "threshold_plain_bits": 0.1}
    calibration |= {"threshold_nll": threshold_nll, "created": "2026-01-01T00:00:00+00:00"}
    calibration["histogram"] = {"bounds_bits": [0.25, 0.5, 1.0], "counts": [1, 3, 4], "images": 4}
    if detector == "strip":
        calibration |= {"threshold_plain_bits": None, "threshold_nll": None}
    (folder / "1" / "calibration.json").write_text(json.dumps(calibration))
    (folder / "1" / "perturbations.json").write_text(json.dumps({"plain_first": detector == "consensus"}))
    entropies, nlls = np.arange(1.0, 20.0) / 10, np.arange(19.0) / 5
    scores = np.array([entropies, entropies / 5, -nlls])
    scores = scores[: 1 if detector == "strip" else 2 if threshold_nll is None else 3]
    regions = peel(scores, SHARES[len(scores)])
    np.savez(folder / "1" / "regions.npz", **vars(regions))


def test_all_requests_of_a_batch_are_answered_each_with_its_own_rows(model_folder: Path) -> None:
    generator = np.random.default_rng(1)
    images = [generator.integers(0, 256, (count, 4, 5, 2), dtype=np.uint8) for count in (2, 1, 4)]
    stage = perturb_stage(arguments(model_folder), PbUtils())
    answers = stage.execute([request(["perturbations"], image=batch) for batch in images])
    overlays = np.load(model_folder / "1" / "overlays.npz")["overlays"]
    for batch, answer in zip(images, answers, strict=True):
        perturbations = answer.arrays()["perturbations"]
        assert perturbations.shape == (len(batch), 3, 4, 5, 2)
        assert perturbations.flags.c_contiguous
        for image, blends in zip(batch, perturbations, strict=True):
            expected = [reference.blend(image, overlay, 0.6) for overlay in overlays]
            np.testing.assert_allclose(blends, expected, atol=1e-4)


def test_the_entropy_stage_keeps_the_batch_dimension(model_folder: Path) -> None:
    stage = entropy_stage(arguments(model_folder), PbUtils())
    probabilities = np.full((2, 3, 4), 0.25, np.float32)
    probabilities[1, 0] = [0.5, 0.5, 0.0, 0.0]
    (answer,) = stage.execute([request(SENTINEL_OUTPUTS, sentinel_probabilities=probabilities)])
    np.testing.assert_allclose(answer.arrays()["sentinel_entropies"], [[2.0, 2.0, 2.0], [1.0, 2.0, 2.0]])
    assert answer.arrays()["sentinel_label"].tolist() == [[-1], [-1]]
    assert answer.arrays()["sentinel_plain_entropy"].tolist() == [[-1.0], [-1.0]]
    assert answer.arrays()["sentinel_plain_entropy"].dtype == np.float32
    assert answer.arrays()["sentinel_perturbations"].tolist() == [[3], [3]]
    assert answer.arrays()["sentinel_perturbations"].dtype == np.int32


def test_consensus_shows_the_sentinel_the_image_as_it_came_first(model_folder: Path) -> None:
    write_detector(model_folder, "consensus")
    images = np.random.default_rng(2).integers(0, 256, (2, 4, 5, 2), dtype=np.uint8)
    (answer,) = perturb_stage(arguments(model_folder), PbUtils()).execute([request(["perturbations"], image=images)])
    perturbations = answer.arrays()["perturbations"]
    assert perturbations.shape == (2, 4, 4, 5, 2)
    np.testing.assert_array_equal(perturbations[:, 0], images)
    overlays = np.load(model_folder / "1" / "overlays.npz")["overlays"]
    expected = [[reference.blend(image, overlay, 0.6) for overlay in overlays] for image in images]
    np.testing.assert_allclose(perturbations[:, 1:], expected, atol=1e-4)


def test_the_first_row_gives_the_label_and_the_others_the_entropy(model_folder: Path) -> None:
    write_detector(model_folder, "consensus")
    rows = np.array([[[0.1, 0.9], [0.5, 0.5], [1.0, 0.0]], [[0.75, 0.25], [0.5, 0.5], [0.5, 0.5]]], np.float32)
    (answer,) = entropy_stage(arguments(model_folder), PbUtils()).execute(
        [request(SENTINEL_OUTPUTS, sentinel_probabilities=rows)]
    )
    np.testing.assert_allclose(answer.arrays()["sentinel_entropies"], [[1.0, 0.0], [1.0, 1.0]])
    assert answer.arrays()["sentinel_label"].tolist() == [[1], [0]]
    np.testing.assert_allclose(answer.arrays()["sentinel_plain_entropy"], [[0.4689956], [0.8112781]], rtol=1e-6)
    assert answer.arrays()["sentinel_perturbations"].tolist() == [[2], [2]]


def test_consensus_rejects_by_each_of_its_three_scores(model_folder: Path) -> None:
    write_detector(model_folder, "consensus")
    probabilities = np.array([[0.95, 0.05]] * 4, np.float32)
    (answer,) = verdict_stage(arguments(model_folder), PbUtils()).execute(
        [
            request(
                PUBLIC,
                sentinel_entropies=np.array(
                    [[9.0, 0.4, 9.0], [9.0, 9.0, 9.0], [0.4, 26.2, 0.4], [9.0, 9.0, 9.0]], np.float32
                ),
                sentinel_plain_entropy=np.array([[9.0], [9.0], [9.0], [0.1]], np.float32),
                sentinel_label=np.array([[0], [1], [0], [0]], np.int32),  # nll 0.05, 3.0, 0.05, 0.05
                sentinel_perturbations=np.full((4, 1), 3, np.int32),
                repaired_probabilities=probabilities,
            )
        ]
    )
    assert answer.arrays()["trojaned"].tolist() == [[False], [True], [True], [True]]
    p_values = answer.arrays()["p_value"][:, 0]
    assert answer.arrays()["p_value"].dtype == np.float32
    assert p_values[0] == 1.0
    np.testing.assert_allclose(p_values[1:], [0.45, 0.5, 0.55])
    # What is reported is the mean entropy, whatever the verdict rests on.
    np.testing.assert_allclose(answer.arrays()["entropy"], [[18.4 / 3], [9.0], [9.0], [9.0]], rtol=1e-6)


def test_consensus_does_without_a_repaired_network_that_is_the_original_one(model_folder: Path) -> None:
    write_detector(model_folder, "consensus", threshold_nll=None)
    found = opinions([[9.0], [9.0], [0.4]]) | {"sentinel_label": np.array([[1], [1], [1]], np.int32)}
    found["sentinel_plain_entropy"] = np.array([[9.0], [0.05], [9.0]], np.float32)
    probabilities = np.array([[0.95, 0.05]] * 3, np.float32)
    (answer,) = verdict_stage(arguments(model_folder), PbUtils()).execute(
        [request(PUBLIC, **found, repaired_probabilities=probabilities)]
    )
    assert answer.arrays()["trojaned"].tolist() == [[False], [True], [True]]


@pytest.mark.parametrize("plain_bits", [0.1, None], ids=["", "even where it has no threshold"])
@pytest.mark.parametrize("name", ["sentinel_entropies", "sentinel_plain_entropy", "repaired_probabilities"])
def test_what_is_not_a_number_is_rejected(model_folder: Path, name: str, plain_bits: float | None) -> None:
    write_detector(model_folder, "consensus")
    path = model_folder / "1" / "calibration.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"threshold_plain_bits": plain_bits}))
    found = opinions([[9.0]]) | {"sentinel_plain_entropy": np.array([[9.0]], np.float32)}
    found |= {"sentinel_label": np.array([[0]], np.int32), "repaired_probabilities": np.ones((1, 2), np.float32)}
    stage = verdict_stage(arguments(model_folder), PbUtils())
    (answer,) = stage.execute([request(PUBLIC, **found)])
    assert answer.arrays()["trojaned"].tolist() == [[False]]
    (answer,) = stage.execute([request(PUBLIC, **found | {name: found[name] + np.float32(np.nan)})])
    assert answer.arrays()["trojaned"].tolist() == [[True]]
    assert answer.arrays()["p_value"][0, 0] <= 0.2


def test_blends_that_did_not_run_have_no_say(model_folder: Path) -> None:
    stage = verdict_stage(arguments(model_folder), PbUtils())
    found = opinions([[0.6, 0.0, 0.0], [0.6, 0.0, 0.0], [0.3, 0.6, 0.9]])
    found["sentinel_perturbations"] = np.array([[1], [3], [2]], np.int32)
    probabilities = np.full((3, 2), 0.5, np.float32)
    (answer,) = stage.execute([request(PUBLIC, **found, repaired_probabilities=probabilities)])
    np.testing.assert_allclose(answer.arrays()["entropy"], [[0.6], [0.2], [0.45]], rtol=1e-6)
    assert answer.arrays()["trojaned"].tolist() == [[False], [True], [True]]
    assert answer.arrays()["perturbations"].tolist() == [[1], [3], [2]]


@pytest.mark.parametrize(("mode", "label"), [("block", 3), ("shadow", 1)])
def test_the_mode_decides_what_a_trojaned_input_gets(model_folder: Path, mode: str, label: int) -> None:
    stage = verdict_stage(arguments(model_folder, mode), PbUtils())
    probabilities = np.array([[0.1, 0.8, 0.1], [0.1, 0.8, 0.1]], np.float32)
    (answer,) = stage.execute([request(PUBLIC, **opinions([[0.5], [0.6]]), repaired_probabilities=probabilities)])
    assert answer.arrays()["label"].tolist() == [[label], [1]]
    assert answer.arrays()["label"].dtype == np.int32
    assert answer.arrays()["trojaned"].tolist() == [[True], [False]]
    assert answer.arrays()["perturbations"].tolist() == [[1], [1]]


def test_an_input_whose_repaired_probabilities_are_broken_is_rejected(model_folder: Path) -> None:
    stage = verdict_stage(arguments(model_folder), PbUtils())
    probabilities = np.array([[np.nan, 0.5, 0.5]], np.float32)
    (answer,) = stage.execute([request(PUBLIC, **opinions([[9.0]]), repaired_probabilities=probabilities)])
    assert answer.arrays()["trojaned"].tolist() == [[True]]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{}",
        '{"threshold_bits": 0.5, "threshold_plain_bits": null, "threshold_nll": null}',
        '{"detector": "strip", "threshold_bits": 0.5}',
        '{"detector": "luck", "threshold_bits": 0.5, "threshold_plain_bits": null, "threshold_nll": null}',
        '{"detector": "strip", "threshold_bits": null, "threshold_plain_bits": null, "threshold_nll": null}',
        '{"detector": "strip", "threshold_bits": NaN, "threshold_plain_bits": null, "threshold_nll": null}',
        '{"detector": "strip", "threshold_bits": -1, "threshold_plain_bits": null, "threshold_nll": null}',
        '{"detector": "consensus", "threshold_bits": 0.5, "threshold_plain_bits": null, "threshold_nll": NaN}',
        '{"detector": "consensus", "threshold_bits": 0.5, "threshold_plain_bits": null, "threshold_nll": "much"}',
        '{"detector": "consensus", "threshold_bits": 0.5, "threshold_nll": 1.0}',
        '{"detector": "consensus", "threshold_bits": 0.5, "threshold_plain_bits": -1, "threshold_nll": 1.0}',
        '{"detector": "strip", "threshold_bits": 0.5, "threshold_plain_bits": 0.1, "threshold_nll": null}',
    ],
)
def test_without_a_usable_calibration_the_model_does_not_load(model_folder: Path, text: str | None) -> None:
    path = model_folder / "1" / "calibration.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(RepositoryError, match=r"calibration\.json"):
        verdict_stage(arguments(model_folder), PbUtils())


@pytest.mark.parametrize("text", [None, "", "{}", '{"plain_first": 1}', '{"plain_first": null}'])
def test_unless_told_what_the_perturbations_are_the_models_do_not_load(model_folder: Path, text: str | None) -> None:
    path = model_folder / "1" / "perturbations.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    for stage in (perturb_stage, entropy_stage):
        with pytest.raises(RepositoryError, match=r"perturbations\.json"):
            stage(arguments(model_folder), PbUtils())


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"thresholds": [[2.0, 1.0]], "p_values": [0.3, 0.6]},
        {"thresholds": [[1.0, 2.0]], "p_values": [0.6, 0.3]},
        {"thresholds": [[1.0, 2.0]], "p_values": [0.3, 1.6]},
        {"thresholds": [[1.0, 2.0]], "p_values": [0.3]},
        {"thresholds": [1.0, 2.0], "p_values": [0.3, 0.6]},
        {"thresholds": [[1.0, np.nan]], "p_values": [0.3, 0.6]},
        {"thresholds": [[1.0, 2.0], [1.0, 2.0]], "p_values": [0.3, 0.6]},
        {"thresholds": [[]], "p_values": []},
    ],
)
def test_without_usable_regions_the_model_does_not_load(model_folder: Path, broken: dict[str, Any]) -> None:
    np.savez(model_folder / "1" / "regions.npz", **{name: np.array(values) for name, values in broken.items()})
    with pytest.raises(RepositoryError, match=r"regions\.npz"):
        verdict_stage(arguments(model_folder), PbUtils())


@pytest.mark.parametrize("mode", [None, "", "off"])
def test_an_unknown_mode_does_not_load(model_folder: Path, mode: str | None) -> None:
    with pytest.raises(RepositoryError, match="expected one of block, shadow"):
        verdict_stage(arguments(model_folder, mode), PbUtils())


@pytest.mark.parametrize(
    "stored",
    [
        {},
        {"overlays": np.zeros((1, 2, 2, 3), np.uint8)},
        {"overlays": np.zeros((1, 2, 2, 3), np.float32), "alpha": 0.5},
        {"overlays": np.zeros((1, 2, 2, 3), np.uint8), "alpha": 2.0},
        {"overlays": np.array([None], dtype=object), "alpha": 0.5},
    ],
)
def test_without_usable_overlays_the_model_does_not_load(tmp_path: Path, stored: dict[str, Any]) -> None:
    (tmp_path / "1").mkdir()
    write_detector(tmp_path, "strip")
    np.savez(tmp_path / "1" / "overlays.npz", **stored)
    with pytest.raises(RepositoryError, match=r"overlays\.npz"):
        perturb_stage(arguments(tmp_path), PbUtils())


def test_a_truncated_overlay_file_does_not_load(model_folder: Path) -> None:
    path = model_folder / "1" / "overlays.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RepositoryError, match=r"overlays\.npz"):
        perturb_stage(arguments(model_folder), PbUtils())


def test_a_gpu_instance_without_cupy_does_not_load(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    for stage in (perturb_stage, entropy_stage):
        with pytest.raises(SetupError, match="runs on a GPU, which needs CuPy; pip install cupy-cuda13x"):
            stage(arguments(model_folder, kind="GPU"), PbUtils())


def test_only_requested_outputs_are_sent(model_folder: Path) -> None:
    stage = verdict_stage(arguments(model_folder), PbUtils())
    inputs = {**opinions([[1.0]]), "repaired_probabilities": np.ones((1, 2), np.float32)}
    with_all, label_only = stage.execute([request(PUBLIC, **inputs), request(["label"], **inputs)])
    assert list(with_all.arrays()) == PUBLIC
    assert list(label_only.arrays()) == ["label"]
