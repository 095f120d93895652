"""The export as a whole: what it writes, what it says of it, and what it refuses before writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from PIL import Image

from detector.calibration import ThresholdRule
from detector.errors import CalibrationError, DataError, InputError, ModelRefusedError
from detector.serving import read_overlays
from exporter.entropies import entropy_matrix, open_graph
from exporter.export import Data, Export, ExportOptions, check_accuracy, export
from exporter.keras_files import load_model
from exporter.overlays import choose_greedily
from exporter.preprocessing import Preprocessing
from exporter.repair import RepairOptions
from exporter.splits import split_clean
from model_repository.manifest import sha256_of, verify_repository
from samples.hdf5 import read_hdf5, write_hdf5
from samples.readers import read_samples
from samples.types import Samples

NO_REPAIR = RepairOptions(method="none")
STRIP = ThresholdRule(detector="strip")


def test_the_manifest_tells_where_the_version_came_from(repository: Path, badnet: Path) -> None:
    version = verify_repository(repository)["versions"]["1"]
    assert version["inputs"]["model"] == {"file": "bd_net.keras", "sha256": sha256_of(badnet / "bd_net.keras")}
    sizes = {name: part["images"] for name, part in version["split"].items()}
    assert sizes == {"overlays": 10, "selection": 0, "calibration": 94, "validation": 70, "repair": 306}
    assert all(len(part["sha256"]) == 64 for part in version["split"].values())
    assert version["contract"] == {"image_shape": [55, 47, 3], "classes": 12}
    assert version["calibration"]["target_frr"] == 0.05
    assert version["calibration"]["images"] == 94
    assert version["options"]["alpha"] == 0.5
    assert version["scores"]["before"]["clean_accuracy"]["count"] == 70
    assert max(version["parity_max_difference"].values()) <= 1e-4
    assert {"stripwire", "keras", "tf2onnx", "onnxruntime", "python"} <= version["versions"].keys()


def test_the_overlays_are_clean_images_that_nothing_else_uses(repository: Path, badnet: Path) -> None:
    with np.load(repository / "strip_perturb" / "1" / "overlays.npz") as stored:
        overlays = stored["overlays"]
    clean = read_hdf5(badnet / "clean_validation_data.h5")
    split = split_clean(clean, overlay_count=10, least_calibration=19, with_repair=True, seed=0)
    parts = [{image.tobytes() for image in part.images} for part in vars(split).values()]
    assert {image.tobytes() for image in overlays} == parts[0]
    assert sum(len(part) for part in parts) == len(set().union(*parts)) == 480


def test_a_second_export_adds_a_version(badnet: Path, tmp_path: Path) -> None:
    inputs = (badnet / "bd_net.keras", Data(badnet / "clean_validation_data.h5"), tmp_path / "repository")
    first = export(*inputs, ExportOptions(repair=NO_REPAIR))
    second = export(
        *inputs,
        ExportOptions(
            repair=NO_REPAIR,
            overlays=3,
            alpha=0.7,
            rule=ThresholdRule(threshold_bits=0.25),
            layout="fused",
            early_exit=False,
        ),
    )
    assert (first.version, second.version) == ("1", "2")
    versions = verify_repository(tmp_path / "repository")["versions"]
    assert versions["2"]["calibration"]["threshold_bits"] == 0.25
    assert versions["2"]["calibration"]["method"] == "fixed"
    assert "fused" not in versions["1"]["models"]
    assert versions["2"]["models"]["fused"] == 2
    assert versions["2"]["fused"]["early_exit"] is False


def test_the_wrong_scale_is_named_with_the_accuracy_at_each(badnet: Path) -> None:
    model = keras.Sequential([keras.layers.Rescaling(1 / 255), load_model(badnet / "bd_net.keras")])
    clean = read_hdf5(badnet / "clean_validation_data.h5").take(np.arange(0, 480, 4))
    with pytest.raises(DataError, match=r"scale: got unit.*unit: \d+\.\d %.*raw: \d+\.\d %.*give --mean and --std if"):
        check_accuracy(model, clean, Preprocessing("unit"), seed=0)
    check_accuracy(model, clean, Preprocessing("raw"), seed=0)


def test_a_mean_at_the_wrong_scale_is_named(badnet: Path) -> None:
    model = load_model(badnet / "bd_net.keras")
    clean = read_hdf5(badnet / "clean_validation_data.h5").take(np.arange(0, 480, 4))
    # Only unit with this mean and deviation is what it learned; more than 1 it cannot see.
    back = (keras.layers.Rescaling(0.25, 0.5), keras.layers.ReLU(max_value=1.0))
    shifted = keras.Sequential([keras.Input((55, 47, 3)), *back, model])
    with pytest.raises(DataError, match=r"scale: got raw.*much lower than at unit, mean 0\.5, std 0\.25"):
        check_accuracy(shifted, clean, Preprocessing("raw", (0.5,), (0.25,)), seed=0)


def test_data_of_another_task_is_named(badnet: Path) -> None:
    model = load_model(badnet / "bd_net.keras")
    clean = read_hdf5(badnet / "clean_validation_data.h5")
    shifted = Samples(clean.images, (clean.labels + 6) % 12)
    with pytest.raises(DataError, match="near chance"):
        check_accuracy(model, shifted, Preprocessing("unit"), seed=0)


def test_a_target_that_the_sample_cannot_support_is_refused_and_nothing_is_written(
    badnet: Path, tmp_path: Path
) -> None:
    options = ExportOptions(repair=NO_REPAIR, rule=ThresholdRule(target_frr=0.0001))
    with pytest.raises(CalibrationError, match="got 480 distinct images, expected at least 12509"):
        export(badnet / "bd_net.keras", Data(badnet / "clean_validation_data.h5"), tmp_path / "repository", options)
    assert list(tmp_path.iterdir()) == []


def refuse(tmp_path: Path, badnet: Path, samples: Samples) -> None:
    write_hdf5(tmp_path / "clean.h5", samples)
    export(badnet / "bd_net.keras", Data(tmp_path / "clean.h5"), tmp_path / "out", ExportOptions(repair=NO_REPAIR))


def test_images_of_another_size_are_refused(tmp_path: Path, badnet: Path) -> None:
    with pytest.raises(DataError, match=r"got 32x32x3 .height x width x channels., expected 55x47x3; --resize"):
        refuse(tmp_path, badnet, Samples(np.zeros((30, 32, 32, 3), np.uint8), np.zeros(30, np.int64)))


def test_labels_out_of_range_are_refused(tmp_path: Path, badnet: Path) -> None:
    with pytest.raises(DataError, match="`label` reaches 12, expected 0 to 11"):
        refuse(tmp_path, badnet, Samples(np.zeros((30, 55, 47, 3), np.uint8), np.full(30, 12, np.int64)))


def test_too_few_images_are_refused(tmp_path: Path, badnet: Path) -> None:
    few = read_hdf5(badnet / "clean_validation_data.h5").take(np.arange(0, 480, 40))
    message = "got 12 distinct images, expected at least 59: 10 are for overlays.* --detector strip calibrates on half"
    with pytest.raises(CalibrationError, match=message):
        refuse(tmp_path, badnet, few)


def test_a_missing_model_file_is_named(tmp_path: Path, badnet: Path) -> None:
    with pytest.raises(ModelRefusedError, match=r"nowhere\.h5"):
        export(tmp_path / "nowhere.h5", Data(badnet / "clean_validation_data.h5"), tmp_path / "out", ExportOptions())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("alpha", 1.0, "alpha: got 1.0"),
        ("overlays", 0, "overlays: got 0"),
        ("overlays", 1001, r"overlays: got 1001, expected 1 to 1000 \(10 is usual\)"),
        ("overlay_choice", "best", "overlay choice: got 'best', expected one of random, greedy"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(option: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ExportOptions(**{option: value})


def test_every_version_has_its_report(repository: Path) -> None:
    folder = repository / "guarded" / "1"
    numbers = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert numbers["version"] == "1"
    assert numbers["repair"]["steps"][0]["name"] == "as received"
    assert {part["name"]: part["images"] for part in numbers["parts"]} == {
        "overlays": 10,
        "selection": 0,
        "calibration": 94,
        "validation": 70,
        "repair": 306,
    }
    assert sum(numbers["histogram"]["calibration"]) == 94
    assert numbers["commands"][0][:2] == ["stripwire", "export"]
    assert numbers["networks"]["original"]["attack_success"] is None
    assert "<svg" in (folder / "report.html").read_text(encoding="utf-8")


def test_parts_may_be_given_in_any_form_and_attack_samples_are_measured(badnet: Path, tmp_path: Path) -> None:
    clean = read_hdf5(badnet / "clean_validation_data.h5")
    np.savez(tmp_path / "overlays.npz", images=clean.images[:12], labels=clean.labels[:12])
    for index in range(12, 60):
        folder = tmp_path / "calibration" / f"{clean.labels[index]:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(clean.images[index]).save(folder / f"{index}.png")
    data = Data(
        badnet / "clean_test_data.h5",
        {"overlays": tmp_path / "overlays.npz", "calibration": tmp_path / "calibration"},
        badnet / "sunglasses_poisoned_data.h5",
    )
    options = ExportOptions(repair=RepairOptions(method="bounds", allowed_drop=0.9), overlays=12)
    result = export(badnet / "bd_net.keras", data, tmp_path / "out", options)
    assert result.split_sizes["overlays"] == 12
    assert result.split_sizes["calibration"] == 48
    assert result.before.attack_success is not None
    assert result.before.attack_success.rate > 0.9
    assert result.after.recovered_accuracy is not None
    inputs = result.provenance["inputs"]
    assert inputs["overlays"]["images_sha256"] == read_samples(tmp_path / "overlays.npz").samples.sha256()
    assert "sha256" not in inputs["calibration"]
    with np.load(tmp_path / "out" / "strip_perturb" / "1" / "overlays.npz") as stored:
        assert {image.tobytes() for image in stored["overlays"]} == {image.tobytes() for image in clean.images[:12]}


def test_greedy_overlays_are_the_best_of_a_pool_on_images_that_nothing_else_uses(badnet: Path, tmp_path: Path) -> None:
    options = ExportOptions(repair=NO_REPAIR, overlays=5, overlay_choice="greedy", rule=STRIP)
    result = export(badnet / "bd_net.keras", Data(badnet / "clean_validation_data.h5"), tmp_path / "out", options)
    clean = read_hdf5(badnet / "clean_validation_data.h5")
    split = split_clean(
        clean, overlay_count=5, overlay_choice="greedy", least_calibration=19, with_repair=False, seed=0
    )
    assert result.split_sizes == {"overlays": 64, "selection": 71, "calibration": 276, "validation": 69, "repair": 0}
    assert result.provenance["split"] == split.to_json()
    parts = [{image.tobytes() for image in part.images} for part in vars(split).values()]
    assert len(set().union(*parts)) == sum(map(len, parts))
    session = open_graph(tmp_path / "out" / "badnet" / "1" / "model.onnx")
    matrix = entropy_matrix(session, split.selection.images, split.overlays.images, 0.5)
    best = split.overlays.images[choose_greedily(matrix, 5, 0.05)]
    np.testing.assert_array_equal(read_overlays(tmp_path / "out" / "strip_perturb" / "1")[0], best)


def test_clean_images_say_how_many_overlays_are_enough(badnet: Path, tmp_path: Path) -> None:
    options = ExportOptions(repair=NO_REPAIR, overlays="auto", overlay_choice="greedy")
    result = export(badnet / "bd_net.keras", Data(badnet / "clean_validation_data.h5"), tmp_path / "out", options)
    overlays, _ = read_overlays(tmp_path / "out" / "strip_perturb" / "1")
    assert 1 < len(overlays) <= 50
    assert result.provenance["options"]["overlays"] == len(overlays)
    assert result.split_sizes["overlays"] == 64


def test_a_hundred_greedy_overlays_are_chosen_from_four_hundred(badnet: Path, tmp_path: Path) -> None:
    def run(overlays: int) -> Export:
        options = ExportOptions(repair=NO_REPAIR, overlays=overlays, overlay_choice="greedy", rule=STRIP)
        return export(badnet / "bd_net.keras", Data(badnet / "clean_validation_data.h5"), tmp_path / "out", options)

    message = r"got 480 distinct images, expected at least 523: 480 are for overlays, 19 are for selection"
    with pytest.raises(CalibrationError, match=message):
        run(120)
    assert run(100).split_sizes["overlays"] >= 400
    overlays, _ = read_overlays(tmp_path / "out" / "strip_perturb" / "1")
    assert len({image.tobytes() for image in overlays}) == 100


def test_an_unknown_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="part: got 'test', expected one of overlays, selection, calibration, val"):
        Data(None, {"test": tmp_path})


def test_with_no_data_for_a_part_what_is_missing_is_named(badnet: Path, tmp_path: Path) -> None:
    data = Data(None, {"calibration": badnet / "clean_validation_data.h5", "validation": badnet / "clean_test_data.h5"})
    with pytest.raises(InputError, match="clean data: got none, expected some to draw from: overlays"):
        export(badnet / "bd_net.keras", data, tmp_path / "out", ExportOptions(repair=NO_REPAIR))


def test_half_of_the_attack_samples_decide_and_the_other_half_are_scored(badnet: Path, tmp_path: Path) -> None:
    repair = RepairOptions("magnitude", max_rounds=1, epochs=0, stop_on_attack=True)
    data = Data(badnet / "clean_validation_data.h5", attack=badnet / "sunglasses_poisoned_data.h5")
    result = export(badnet / "bd_net.keras", data, tmp_path / "out", ExportOptions(repair=repair))
    assert result.after.attack_success is not None
    assert result.after.attack_success.count == 27  # of 55
    with pytest.raises(InputError, match="stop on attack: got no attack samples to stop on; give some with --attack"):
        export(badnet / "bd_net.keras", Data(data.clean), tmp_path / "other", ExportOptions(repair=repair))


@pytest.mark.parametrize("detector", ["strip", "consensus"])
def test_a_repair_that_changes_nothing_leaves_the_original_network_to_decide(
    badnet: Path, tmp_path: Path, detector: str
) -> None:
    options = ExportOptions(repair=NO_REPAIR, rule=ThresholdRule(detector=detector))
    data = Data(badnet / "clean_validation_data.h5", attack=badnet / "sunglasses_poisoned_data.h5")
    result = export(badnet / "bd_net.keras", data, tmp_path / "out", options)
    assert (result.calibration.detector, result.calibration.asks_repaired) == (detector, False)
    assert result.calibration.looks_at_plain == (detector == "consensus")
    assert result.calibration.calibration_frr == pytest.approx(0.05, abs=0.02)


def test_a_validation_part_that_is_too_small_for_the_allowed_drop_is_noted(badnet: Path, tmp_path: Path) -> None:
    repair = RepairOptions("bounds", allowed_drop=0.001)
    data = Data(badnet / "clean_validation_data.h5")
    result = export(badnet / "bd_net.keras", data, tmp_path / "out", ExportOptions(repair=repair))
    assert any("an allowed drop of 0.1% is not one: no further error was allowed" in note for note in result.notes)
