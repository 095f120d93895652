"""Canaries that an export leaves in a version: labelled, promised, held back, and taken over by a calibration."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from detector.calibration import ThresholdRule
from detector.errors import DataError, InputError, RepositoryError
from exporter.canaries import FILE, find_canaries, unused, write_exported
from exporter.export import Data, ExportOptions, export
from exporter.recalibration import RecalibrationOptions, recalibrate
from exporter.repair import RepairOptions
from exporter.repository import activate
from exporter.used import uses
from model_repository.manifest import read_manifest, verify_repository
from samples.canaries import read_canaries
from samples.hdf5 import read_hdf5, write_hdf5
from samples.types import Samples


@pytest.fixture(scope="module")
def exported(badnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository of one version, exported with attack samples, and of one that was calibrated again."""
    folder = tmp_path_factory.mktemp("canaries") / "repository"
    options = ExportOptions(repair=RepairOptions(method="none"), rule=ThresholdRule(detector="strip"))
    data = Data(badnet / "clean_validation_data.h5", attack=badnet / "sunglasses_poisoned_data.h5")
    export(badnet / "bd_net.keras", data, folder, options)
    return folder


def as_set(images: NDArray[np.uint8]) -> set[bytes]:
    return {image.tobytes() for image in images}


def test_an_export_leaves_held_back_images_with_what_it_promises(exported: Path, badnet: Path) -> None:
    canaries = read_canaries(find_canaries(exported))
    entry = read_manifest(exported)["versions"]["1"]
    clean = as_set(read_hdf5(badnet / "clean_validation_data.h5").images)
    assert as_set(canaries.images[~canaries.trojaned]) <= clean
    assert as_set(canaries.images[canaries.trojaned]) <= as_set(
        read_hdf5(badnet / "sunglasses_poisoned_data.h5").images
    )
    assert (canaries.version, canaries.classes) == ("1", 12)
    assert canaries.frr_upper == entry["calibration"]["frr_high"]
    assert canaries.far_upper == entry["scores"]["guard"]["false_acceptance"]["high"]
    assert canaries.different(trojaned=False) == min(100, entry["split"]["validation"]["images"])
    assert canaries.different(trojaned=True) == min(100, entry["split"]["attack"]["images"])
    # What they are is part of what the manifest vouches for.
    assert f"guarded/1/{FILE}" in verify_repository(exported)["files"]


def test_a_calibration_takes_them_over_but_for_what_it_has_seen(exported: Path, badnet: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(exported, repository)
    before = read_canaries(find_canaries(repository))
    clean = read_hdf5(badnet / "clean_validation_data.h5")
    seen = [index for index, image in enumerate(clean.images) if image.tobytes() in as_set(before.images[:10])]
    others = [index for index, image in enumerate(clean.images) if image.tobytes() not in as_set(before.images)]
    write_hdf5(tmp_path / "new.h5", Samples(clean.images[[*seen, *others[:150]]], clean.labels[[*seen, *others[:150]]]))
    result = recalibrate(repository, tmp_path / "new.h5", RecalibrationOptions(target_frr=0.1))
    canaries = read_canaries(find_canaries(repository))
    assert canaries.version == result.version == "2"
    assert as_set(canaries.images) == as_set(before.images) - as_set(before.images[:10])
    assert canaries.trojaned.sum() == before.trojaned.sum()
    assert canaries.far_upper is None  # nobody has measured it since
    assert canaries.frr_upper == result.calibration.to_json()["frr_high"]
    assert any("10 of the" in note and "canaries of version 1 calibrate now" in note for note in result.notes)
    activate(repository, "1")
    assert read_canaries(find_canaries(repository)).version == "1"


def test_images_that_the_export_has_used_are_no_canaries(exported: Path, badnet: Path) -> None:
    manifest = read_manifest(exported)
    used = read_hdf5(badnet / "clean_validation_data.h5").images
    new = read_hdf5(badnet / "clean_test_data.h5").images
    assert unused(new, exported, manifest)[1] == ()
    kept, (note,) = unused(np.concatenate([used[:30], new]), exported, manifest)
    np.testing.assert_array_equal(kept, new)
    assert note.startswith(f"30 of {30 + len(new)} clean images were left out, which the export has used: ")
    with pytest.raises(DataError, match="the export has used all 30 images"):
        unused(used[:30], exported, manifest)
    # What each was used for is told as the manifest counts it.
    split = manifest["versions"]["1"]["split"]
    expected = {part: about["images"] for part, about in split.items() if about["images"] and part != "attack"}
    assert Counter(uses(exported, manifest, used)) == expected


def test_a_calibration_says_which_images_have_taught_the_network(badnet: Path, tmp_path: Path) -> None:
    data = Data(badnet / "clean_validation_data.h5")
    options = ExportOptions(
        repair=RepairOptions(method="finetune", epochs=1, allowed_drop=0.9), rule=ThresholdRule(detector="strip")
    )
    export(badnet / "bd_net.keras", data, tmp_path / "repository", options)
    repaired = tmp_path / "repository"
    clean = read_hdf5(badnet / "clean_validation_data.h5")
    taught = np.flatnonzero([use == "repair" for use in uses(repaired, read_manifest(repaired), clean.images)])
    assert len(taught) == read_manifest(repaired)["versions"]["1"]["split"]["repair"]["images"]
    write_hdf5(tmp_path / "old.h5", clean.take(taught[:150]))
    rule = RecalibrationOptions(target_frr=0.1)
    *_, note = recalibrate(repaired, tmp_path / "old.h5", rule).notes
    assert "140 of the 140 images that calibrate have taught the repaired network" in note
    # A version that is calibrated again remembers what the one before had used.
    assert uses(repaired, read_manifest(repaired), clean.images[taught[200:210]]) == ["repair"] * 10


def test_of_large_images_there_are_fewer(tmp_path: Path) -> None:
    large = np.random.default_rng(0).integers(0, 256, (6, 1200, 1200, 3), dtype=np.uint8)
    write_exported(tmp_path, "1", {"contract": {"classes": 3}}, large, None, seed=0)
    assert len(read_canaries(tmp_path / FILE)) == 3


def test_a_path_may_mean_a_file_or_the_active_version_of_a_repository(exported: Path, tmp_path: Path) -> None:
    assert find_canaries(tmp_path / "any.npz") == tmp_path / "any.npz"
    assert find_canaries(exported) == exported / "guarded" / "1" / FILE
    with pytest.raises(RepositoryError, match="has no manifest"):
        find_canaries(tmp_path)
    old = tmp_path / "old"
    shutil.copytree(exported, old)
    (old / "guarded" / "1" / FILE).unlink()
    with pytest.raises(InputError, match=r"version 1 of .* has none"):
        find_canaries(old)


def test_the_same_export_leaves_the_same_canaries(exported: Path, badnet: Path, tmp_path: Path) -> None:
    data = Data(badnet / "clean_validation_data.h5", attack=badnet / "sunglasses_poisoned_data.h5")
    options = ExportOptions(repair=RepairOptions(method="none"), rule=ThresholdRule(detector="strip"))
    export(badnet / "bd_net.keras", data, tmp_path / "again", options)
    first, again = (read_canaries(find_canaries(folder)) for folder in (exported, tmp_path / "again"))
    np.testing.assert_array_equal(first.images, again.images)
    assert json.loads((exported / "manifest.json").read_text())["active"] == "1"
