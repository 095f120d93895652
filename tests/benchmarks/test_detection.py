"""A case is measured from the attack to the detectors, and what is known is not measured again."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.detection import sweeps
from benchmarks.detection.__main__ import app
from benchmarks.detection.cases import CASES, PLANS, Case, Material, faces
from benchmarks.detection.measure import measure
from benchmarks.detection.plots import draw
from benchmarks.detection.tables import read_results, rows, tables, write_csv
from detector.scores import DETECTORS as DETECTORS_OF_STRIPWIRE

DETECTORS = {
    "strip (report)": 10,
    "strip 0.5": 10,
    "strip 0.7": 10,
    "consensus": 11,
    "consensus + bounds": 11,
    "confidence": 1,
    "ART's STRIP": 10,
    "SCALE-UP": 6,
    "SCALE-UP + clean data": 6,
}
NAME = "faces-100-patch-0"
"""The name under which a case of few people is kept here."""


def quietly(_description: str, _done: int, _total: int) -> None:
    pass


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STRIPWIRE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return Case("faces-20", "patch", faces(20, "patch")).material(None, quietly)


@pytest.fixture(scope="module")
def measured(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("results") / f"{NAME}.json"
    measure(material, file, images=40, only=("bounds",), report=quietly)
    return file


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def test_no_image_serves_twice(material: Material) -> None:
    assert (len(material.calibration), len(material.judged_clean)) == (400, 200)
    parts = [material.calibration, material.judged_clean, *material.judged_trojaned.values()]
    parts += vars(material.split).values()
    images = [image.tobytes() for part in parts for image in part.images]
    assert len(set(images)) == len(images)


def test_every_detector_is_measured_on_every_attack(measured: Path) -> None:
    found = read(measured)["detectors"]
    assert {name: detector["passes"] for name, detector in found.items()} == DETECTORS
    for name, detector in found.items():
        figures = detector["attacks"]["patch"]
        assert 0.0 <= figures["auroc"] <= 1.0
        assert ("fixed" in figures) == (name in ("strip (report)", "SCALE-UP"))
        if name != "strip (report)":
            assert figures["at_0.001"] is None  # 400 images cannot tell
            for errors in (figures["at_0.01"], figures["at_0.05"]):
                assert errors["far"]["count"] == errors["frr"]["count"] == 40


def test_the_repair_is_measured_and_its_network_kept(material: Material, measured: Path) -> None:
    found = read(measured)
    assert set(found["repairs"]) == {"bounds"}
    assert found["received"]["patch"]["attack_success"]["rate"] > 0.9
    assert found["repairs"]["bounds"]["patch"]["recovered_accuracy"]["count"] == 19 * 30
    assert material.folder is not None
    assert (material.folder / "repaired-bounds.onnx").is_file()


def test_what_is_missing_is_measured_alone(material: Material, measured: Path, tmp_path: Path) -> None:
    assert material.folder is not None
    whole, kept = read(measured), material.folder / "repaired-bounds.onnx"
    broken_off = {**whole, "detectors": {name: whole["detectors"][name] for name in ("strip 0.5", "SCALE-UP")}}
    file, repaired_at = tmp_path / measured.name, kept.stat().st_mtime_ns
    file.write_text(json.dumps(broken_off))
    told: list[str] = []
    measure(material, file, images=40, only=("bounds",), report=lambda text, *_: told.append(text))
    assert kept.stat().st_mtime_ns == repaired_at
    assert read(file) == whole
    assert "Measuring SCALE-UP" in told
    assert "Bounding features" not in told


def test_a_repaired_network_that_is_gone_is_made_again_with_what_was_measured_of_it(
    material: Material, measured: Path, tmp_path: Path
) -> None:
    assert material.folder is not None
    whole = read(measured)
    (material.folder / "repaired-bounds.onnx").unlink()
    file = tmp_path / measured.name
    file.write_text(json.dumps(whole))
    told: list[str] = []
    measure(material, file, images=40, only=("bounds",), report=lambda text, *_: told.append(text))
    assert {"Bounding features", "Asking the repaired network"} <= set(told)
    assert "Measuring SCALE-UP" not in told
    assert set(read(file)["detectors"]) == set(DETECTORS)


def test_another_choice_of_images_is_measured_whole(material: Material, measured: Path, tmp_path: Path) -> None:
    file = tmp_path / measured.name
    file.write_text(measured.read_text())
    fewer = replace(material, repairs=(), judged_clean=material.judged_clean.take(np.arange(20)))
    measure(fewer, file, images=20, report=quietly)
    assert "repairs" not in read(file)
    assert read(file)["detectors"]["strip 0.5"]["attacks"]["patch"]["at_0.05"]["frr"]["count"] == 20


def test_tables_csv_and_picture_show_every_row(measured: Path, tmp_path: Path) -> None:
    results = read_results(measured.parent)
    text = tables(results)
    for name in DETECTORS:
        assert name in text
    assert f"| {NAME} | patch | too few images |" in text
    with write_csv(tmp_path, results).open(encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    # Three targets for each of eight detectors, and two thresholds that come with one.
    assert len(lines) == 3 * 8 + 2
    assert all(line["far"] == "" for line in lines if line["target_frr"] == "0.001")
    for line in lines:
        if line["far"]:
            assert float(line["far_low"]) <= float(line["far"]) <= float(line["far_high"])
    assert draw(tmp_path, rows(results)).stat().st_size > 10_000


def test_other_blends_are_measured_with_both_detectors(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "SWEPT_IMAGES", 110)
    monkeypatch.setattr(sweeps, "_POOL", 12)
    monkeypatch.setattr(sweeps, "_SELECTION", 30)
    blends = sweeps.blend_sweep(material, quietly)
    kinds = {(row["detector"], row["choice"], row["alpha"]) for row in blends}
    expected = {(detector, "random", weight) for detector in DETECTORS_OF_STRIPWIRE for weight in sweeps.WEIGHTS}
    assert kinds == expected | {("strip", "greedy", 0.5), ("consensus", "greedy", 0.7)}
    for row in blends:
        assert row["at_0.01"]["far"]["count"] == 110
        assert row["at_0.01"]["threshold_bits"] <= row["at_0.05"]["threshold_bits"]
    text = tables({NAME: {"received": {}, "blends": blends}})
    assert text.count(f"| {NAME} | patch | ") == 4


def test_networks_of_several_seeds_stand_side_by_side(measured: Path) -> None:
    (result,) = read_results(measured.parent).values()
    names = ["faces-100-patch-0", "faces-100-patch-1", "faces-100-two-0", "faces-100-two-1", "signs-patch"]
    text = tables(dict.fromkeys(names, result))
    (heading,) = (line for line in text.splitlines() if line.startswith("| networks |"))
    of_seeds = text.split(heading)[1].split("\n\n")[0].splitlines()[2:]
    assert [line.split(" | ")[:2] for line in of_seeds] == [["| faces-100", "patch"], ["| faces-100", "two: patch"]]
    assert "too few" not in of_seeds[0]


def test_every_attack_has_its_cases() -> None:
    assert {case.attack for case in CASES.values() if case.data == "faces-100"} == set(PLANS)
    for attack in PLANS:
        seeds = [case.seed for case in CASES.values() if (case.data, case.attack) == ("faces-100", attack)]
        assert seeds == [0, 1, 2]
    signs = {case.attack for case in CASES.values() if case.data == "signs"}
    assert signs == set(PLANS) - {"sunglasses", "eyebrows", "lipstick"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hats"], "got 'hats', expected one of faces-100"),
        (["signs-patch"], "this case needs --data"),
        (["all", "--quick"], "give an --output"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], message: str) -> None:
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 2
    assert message in " ".join(answer.output.replace("│", " ").split())
