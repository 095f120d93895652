"""Calibrating an exported repository again: what is new, what stays, and which image serves for what."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detector.calibration import ThresholdRule, calibrate
from detector.errors import CalibrationError, DataError, InputError, RepositoryError
from detector.scores import Evidence
from detector.serving import read_overlays, read_thresholds
from detector.statistics import Proportion
from detector.strip import entropy_bits, perturb, weighted_overlays
from exporter import recalibration
from exporter.entropies import entropy_matrix, open_graph
from exporter.recalibration import Choices, RecalibrationOptions, _unlike, distinct, recalibrate, settled, split
from exporter.repository import activate
from model_repository.manifest import sha256_of, verify_repository
from samples.hdf5 import read_hdf5, write_hdf5
from samples.types import Samples

RANDOM, GREEDY = (Choices(ThresholdRule(), choice, "") for choice in ("random", "greedy"))


@pytest.fixture
def exported(repository: Path, tmp_path: Path) -> Path:
    shutil.copytree(repository, tmp_path / "exported")
    return tmp_path / "exported"


@pytest.fixture
def new_data(badnet: Path, tmp_path: Path) -> Path:
    """Return new clean images, without usable labels."""
    clean = read_hdf5(badnet / "clean_validation_data.h5")
    chosen = np.arange(0, 480, 3)
    write_hdf5(tmp_path / "new.h5", Samples(clean.images[chosen], np.full(len(chosen), 9999)))
    return tmp_path / "new.h5"


def test_only_what_calibration_concerns_gets_a_new_version(exported: Path, new_data: Path) -> None:
    first = verify_repository(exported)["files"]
    result = recalibrate(exported, new_data, RecalibrationOptions(target_frr=0.1))
    assert (result.version, result.base) == ("2", "1")
    manifest = verify_repository(exported)
    entry = manifest["versions"]["2"]
    assert manifest["active"] == "2"
    assert {name for name, number in entry["models"].items() if number == 2} == {
        "guarded",
        "strip_perturb",
        "strip_verdict",
    }
    assert {name: manifest["files"][name] for name in first if "/1/" in name}.items() <= first.items()
    assert entry["recalibrates"] == entry["previous"] == "1"
    images_sha256 = read_hdf5(new_data).sha256()
    expected = {"file": "new.h5", "sha256": sha256_of(new_data), "images_sha256": images_sha256}
    assert entry["inputs"]["clean"] == expected
    sizes = {name: part["images"] for name, part in entry["split"].items()}
    assert sizes == {"candidates": 10, "selection": 0, "calibration": 150}
    assert entry["options"]["rule"]["target_frr"] == 0.1
    assert entry["calibration"]["threshold_bits"] == read_thresholds(exported / "strip_verdict" / "2")[1].bits
    assert result.base_threshold_bits == read_thresholds(exported / "strip_verdict" / "1")[1].bits


def test_images_unlike_those_that_calibrated_before_are_doubted(exported: Path, new_data: Path, tmp_path: Path) -> None:
    options = RecalibrationOptions(keep_overlays=True)
    assert recalibrate(exported, new_data, options).doubts == ()
    clean = read_hdf5(new_data)
    write_hdf5(tmp_path / "bright.h5", Samples((200 + clean.images // 5).astype(np.uint8), clean.labels))
    (doubt,) = recalibrate(exported, tmp_path / "bright.h5", options).doubts
    assert doubt.startswith("version 2 would have rejected 100.0%")
    assert "Are they clean, and of what the network is for?" in doubt


@pytest.mark.parametrize(("rejected", "doubted"), [(0, True), (5, True), (30, False), (120, False), (200, True)])
def test_twice_as_many_as_promised_or_half_are_worth_a_doubt(rejected: int, doubted: bool) -> None:
    assert bool(_unlike(Proportion(rejected, 1000), "1", 0.03, 0.07)) is doubted


def test_the_detector_changes_when_asked_and_stays_otherwise(exported: Path, new_data: Path) -> None:
    changed = recalibrate(exported, new_data, RecalibrationOptions(target_frr=0.1, detector="consensus"))
    assert changed.calibration.detector == "consensus"
    assert changed.calibration.asks_repaired
    models = verify_repository(exported)["versions"]["2"]["models"]
    assert {name for name, number in models.items() if number == 1} == {"badnet", "repaired"}
    assert read_overlays(exported / "strip_perturb" / "2")[1] == 0.7  # that of the detector
    again = recalibrate(exported, new_data, RecalibrationOptions(target_frr=0.1, overlay_choice="greedy", overlays=4))
    assert again.calibration.detector == "consensus"
    assert verify_repository(exported)["versions"]["3"]["models"]["strip_entropy"] == 2
    back = recalibrate(exported, new_data, RecalibrationOptions(target_frr=0.1, detector="strip", keep_overlays=True))
    assert (back.calibration.detector, back.calibration.thresholds.plain_bits) == ("strip", None)
    overlays, alpha = read_overlays(exported / "strip_perturb" / "4")
    assert (len(overlays), alpha) == (4, 0.7)
    assert verify_repository(exported)["versions"]["4"]["models"]["strip_entropy"] == 4


def test_without_options_a_version_is_calibrated_as_it_was_made(exported: Path, new_data: Path) -> None:
    asked = RecalibrationOptions(target_frr=0.1, overlays=4, overlay_choice="greedy")
    assert not any("as before" in note for note in recalibrate(exported, new_data, asked).notes)
    for options, told in (
        (RecalibrationOptions(), "Target FRR 10 %, as before; overlay choice greedy, as before."),
        (RecalibrationOptions(keep_overlays=True), "Target FRR 10 %, as before."),
        (RecalibrationOptions(overlays=5), "Target FRR 10 %, as before; overlay choice greedy, as before."),
    ):
        again = recalibrate(exported, new_data, options)
        assert again.notes[0] == told
        assert again.calibration.target_frr == again.provenance["options"]["rule"]["target_frr"] == 0.1
        assert again.provenance["options"]["overlay_choice"] == "greedy"
    assert again.provenance["options"]["overlays"] == 5


MADE_WITH = {"rule": {"target_frr": 0.02}, "overlay_choice": "greedy"}
GIVEN = {"detector": "strip", "method": "fixed"}
FITTED = {"detector": "strip", "method": "normal"}
DEFAULT = "the default: version 7 does not say what it had"


@pytest.mark.parametrize(
    ("options", "entry", "expected"),
    [
        (
            {},
            {"options": MADE_WITH, "calibration": {"detector": "consensus", "method": "quantile"}},
            (None, 0.02, "greedy", "Target FRR 2 %, as before; overlay choice greedy, as before."),
        ),
        (
            {},
            {"calibration": {"detector": "strip", "method": "quantile"}},
            (None, 0.05, "random", f"Target FRR 5 %, {DEFAULT}; overlay choice random, {DEFAULT}."),
        ),
        (
            {"overlay_choice": "random"},
            {"options": MADE_WITH, "calibration": GIVEN},
            (None, 0.02, "random", "Target FRR 2 %, in place of the threshold that version 7 was given."),
        ),
        (
            {"overlay_choice": "random", "threshold_bits": 0.3},
            {"options": MADE_WITH, "calibration": FITTED},
            (None, 0.02, "random", ""),
        ),
        (
            {"target_frr": 0.1, "keep_overlays": True},
            {"options": MADE_WITH, "calibration": FITTED},
            ("normal", 0.1, "greedy", "Calibration method normal, as before."),
        ),
        (
            {"target_frr": 0.1, "keep_overlays": True, "detector": "consensus"},
            {"options": MADE_WITH, "calibration": FITTED},
            (None, 0.1, "greedy", ""),
        ),
    ],
)
def test_what_is_not_asked_for_is_as_it_was_or_said_to_be_the_default(
    options: dict[str, Any], entry: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    choices = settled(RecalibrationOptions(**options), "7", entry)
    assert (choices.rule.method, choices.rule.target_frr, choices.overlay_choice, choices.note) == expected


def test_auto_is_refused_where_overlays_are_chosen_at_random_as_before(exported: Path, new_data: Path) -> None:
    with pytest.raises(InputError, match="got auto with overlay choice random, expected greedy"):
        recalibrate(exported, new_data, RecalibrationOptions(overlays="auto"))


def test_the_threshold_is_that_of_the_new_images_under_the_new_overlays(exported: Path, new_data: Path) -> None:
    options = RecalibrationOptions(target_frr=0.1, overlays=5, alpha=0.6, seed=3)
    result = recalibrate(exported, new_data, options)
    samples = read_hdf5(new_data)
    images = samples.images
    parts = split(distinct(samples), 5, RANDOM, 3)
    overlays, alpha = read_overlays(exported / "strip_perturb" / "2")
    np.testing.assert_array_equal(overlays, images[parts.candidates])
    assert alpha == 0.6
    session = open_graph(exported / "badnet" / "1" / "model.onnx")
    matrix = entropy_matrix(session, images[parts.calibration], overlays, 0.6)
    assert result.calibration == calibrate(Evidence(matrix.mean(axis=1)), 0.1)


def test_kept_overlays_are_not_written_again_and_calibrate_nothing(
    exported: Path, new_data: Path, tmp_path: Path
) -> None:
    old, _ = read_overlays(exported / "strip_perturb" / "1")
    fresh = read_hdf5(new_data)
    unseen = len(distinct(fresh, besides=old))
    both = np.concatenate([fresh.images, old])
    write_hdf5(tmp_path / "both.h5", Samples(both, np.zeros(len(both), np.int64)))
    result = recalibrate(exported, tmp_path / "both.h5", RecalibrationOptions(keep_overlays=True))
    assert verify_repository(exported)["versions"]["2"]["models"]["strip_perturb"] == 1
    assert not (exported / "strip_perturb" / "2").exists()
    assert result.calibration.images == unseen < len(both)


def test_as_many_overlays_are_taken_as_are_enough(exported: Path, new_data: Path) -> None:
    options = RecalibrationOptions(target_frr=0.1, overlays="auto", overlay_choice="greedy")
    result = recalibrate(exported, new_data, options)
    overlays, _ = read_overlays(exported / "strip_perturb" / "2")
    assert 1 < len(overlays) <= 50
    assert result.provenance["options"]["overlays"] == len(overlays)


def test_a_greedy_choice_beats_the_random_one_on_the_images_it_was_made_on(exported: Path, new_data: Path) -> None:
    greedy = RecalibrationOptions(target_frr=0.1, overlays=4, overlay_choice="greedy", seed=1)
    recalibrate(exported, new_data, greedy)
    chosen, alpha = read_overlays(exported / "strip_perturb" / "2")
    samples = read_hdf5(new_data)
    images = samples.images
    parts = split(distinct(samples), 4, replace(GREEDY, rule=ThresholdRule(target_frr=0.1)), 1)
    pool = {image.tobytes() for image in images[parts.candidates]}
    assert {image.tobytes() for image in chosen} < pool
    assert len({image.tobytes() for image in chosen}) == 4
    session = open_graph(exported / "badnet" / "1" / "model.onnx")
    matrix = entropy_matrix(session, images[parts.selection], images[parts.candidates], alpha)
    with_chosen = entropy_matrix(session, images[parts.selection], chosen, alpha).mean(axis=1)
    best = calibrate(Evidence(with_chosen), 0.1).threshold_bits
    generator = np.random.default_rng(0)
    by_chance = [matrix[:, generator.choice(len(pool), 4, replace=False)].mean(axis=1) for _ in range(50)]
    random = [calibrate(Evidence(means), 0.1) for means in by_chance]
    assert best > np.quantile([calibration.threshold_bits for calibration in random], 0.75)
    activate(exported, "1")
    assert recalibrate(exported, new_data, greedy).version == "3"
    np.testing.assert_array_equal(read_overlays(exported / "strip_perturb" / "3")[0], chosen)  # by the seed alone


def test_the_matrix_averages_to_the_entropies_that_are_served(
    exported: Path, new_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = read_hdf5(new_data).images
    session = open_graph((exported / "badnet" / "1" / "model.onnx").read_bytes())
    perturbations = perturb(images[:40], weighted_overlays(images[40:46], 0.5), 0.5)
    (probabilities,) = session.run(None, {"perturbations": perturbations})
    for _ in range(2):
        matrix = entropy_matrix(session, images[:40], images[40:46], 0.5)
        assert matrix.shape == (40, 6)
        np.testing.assert_allclose(matrix.mean(axis=1), entropy_bits(probabilities), atol=1e-5)
        monkeypatch.setattr("exporter.entropies._MAX_BATCH_BYTES", 1)  # one perturbation at a time
    assert entropy_matrix(session, images[:0], images[:3], 0.5).shape == (0, 3)


@pytest.mark.parametrize("count", [78, 100, 400, 5000])
def test_no_image_serves_twice_and_the_greedy_search_stays_bounded(count: int) -> None:
    parts = split(np.arange(count), 10, GREEDY, 0)
    together = np.concatenate(list(vars(parts).values()))
    assert sorted(together) == list(range(count))
    assert 40 <= len(parts.candidates) <= 64
    assert 19 <= len(parts.selection) <= 256
    assert len(parts.calibration) >= 19 + (count - 78) * 3 // 4


@pytest.mark.parametrize(
    ("choices", "overlays", "needed"),
    [
        (RANDOM, 10, 29),
        (GREEDY, 10, 78),
        (GREEDY, 100, 438),
        (RANDOM, 0, 19),
        (Choices(ThresholdRule(threshold_bits=0.5), "random", ""), 10, 12),
        (Choices(ThresholdRule("normal"), "random", ""), 10, 12),
    ],
)
def test_too_few_images_are_refused_with_the_number_that_is_needed(
    choices: Choices, overlays: int, needed: int
) -> None:
    with pytest.raises(CalibrationError, match=f"got {needed - 1} distinct images .* expected at least {needed}"):
        split(np.arange(needed - 1), overlays, choices, 0)
    assert len(split(np.arange(needed), overlays, choices, 0).calibration) == choices.rule.least_images


def test_copies_count_once() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 2, 2, 1), dtype=np.uint8)
    twice = Samples(np.concatenate([images, images]), np.zeros(12, np.int64))
    assert distinct(twice).tolist() == list(range(6))
    assert distinct(twice, besides=images[[0, 3]]).tolist() == [1, 2, 4, 5]


def test_of_a_group_one_image_serves_and_none_where_another_is_taken() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 2, 2, 1), dtype=np.uint8)
    samples = Samples(images, np.zeros(6, np.int64), groups=np.array([5, 5, 5, 7, 8, 8]))
    assert distinct(samples).tolist() == [0, 3, 4]
    assert distinct(samples, besides=images[[1]]).tolist() == [3, 4]


def test_images_of_another_size_are_refused(exported: Path, tmp_path: Path) -> None:
    write_hdf5(tmp_path / "small.h5", Samples(np.zeros((50, 32, 32, 3), np.uint8), np.zeros(50, np.int64)))
    with pytest.raises(DataError, match=r"got 32x32x3 .*, expected 55x47x3"):
        recalibrate(exported, tmp_path / "small.h5", RecalibrationOptions())
    assert verify_repository(exported)["active"] == "1"
    options = RecalibrationOptions(threshold_bits=0.5, keep_overlays=True, resize=True)
    write_hdf5(
        tmp_path / "two.h5", Samples(np.stack([np.full((32, 32, 3), n, np.uint8) for n in (0, 9)]), np.arange(2))
    )
    assert recalibrate(exported, tmp_path / "two.h5", options).calibration.images == 2


def test_a_repository_that_changed_meanwhile_is_not_overwritten(
    exported: Path, new_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> Any:
        monkeypatch.undo()
        recalibrate(exported, new_data, RecalibrationOptions())
        return entropy_matrix(*arguments)

    monkeypatch.setattr(recalibration, "entropy_matrix", interrupted)
    with pytest.raises(RepositoryError, match="version 2 became active while version 1 was calibrated again"):
        recalibrate(exported, new_data, RecalibrationOptions())
    assert list(verify_repository(exported)["versions"]) == ["1", "2"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from exporter import recalibration, repository

def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

module, name = {"measuring": (recalibration, "entropy_matrix"), "writing": (repository, "write_manifest")}[sys.argv[1]]
setattr(module, name, killed)
recalibration.recalibrate(Path(sys.argv[2]), Path(sys.argv[3]), recalibration.RecalibrationOptions())
"""


@pytest.mark.parametrize("place", ["measuring", "writing"])
def test_a_calibration_that_is_killed_can_be_run_again_and_leaves_no_debris(
    exported: Path, new_data: Path, place: str
) -> None:
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", _KILLED, place, exported, new_data], cwd=root, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert list(verify_repository(exported)["versions"]) == ["1"]
    assert recalibrate(exported, new_data, RecalibrationOptions()).version == "2"
    assert list(verify_repository(exported)["versions"]) == ["1", "2"]
    assert sorted(path.name for path in exported.parent.iterdir()) == ["exported", "new.h5"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"overlays": 0}, "overlays: got 0"),
        ({"overlays": 1001}, r"overlays: got 1001, expected 1 to 1000 \(10 is usual\)"),
        ({"alpha": 1.0}, "alpha: got 1.0"),
        ({"overlay_choice": "best"}, "overlay choice: got 'best'"),
        ({"keep_overlays": True, "alpha": 0.7}, "keep overlays: got overlays, alpha"),
        ({"keep_overlays": True, "overlay_choice": "greedy"}, "keep overlays: got"),
        ({"target_frr": 1.0}, "target FRR: got 1.0"),
        ({"threshold_bits": -1.0}, "threshold: got -1.0 bits"),
        ({"method": "fixed"}, "calibration method: got fixed with threshold None"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RecalibrationOptions(**values)
