"""What an export is given: read, noted and pinned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detector.errors import DataError
from exporter.inputs import InputReader, check_labels
from model_repository.manifest import sha256_of
from samples.hdf5 import write_hdf5
from samples.types import Samples

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)
TARGETS = np.full(5, 2)


def test_attack_samples_that_show_the_target_are_counted(tmp_path: Path) -> None:
    reader = InputReader((6, 4, 3), 3, resize=False, on_progress=None)
    for name, shown in (("mixed.h5", [0, 2, 1, 2, 0]), ("others.h5", [0, 1, 1, 0, 0]), ("unknown.h5", None)):
        write_hdf5(tmp_path / name, Samples(IMAGES, TARGETS, None if shown is None else np.array(shown)))
        assert len(reader.read_attack(tmp_path / name)) == 5
    assert reader.notes == [
        f"{tmp_path / 'mixed.h5'}: 2 of 5 images really show the attacker's class, so that the same answer counts as "
        "attack success and as recovered accuracy; leave them out to measure the attack"
    ]


def test_the_manifest_pins_true_labels_and_groups_as_well(tmp_path: Path) -> None:
    samples = Samples(IMAGES, TARGETS, np.arange(5), np.arange(5) // 2)
    write_hdf5(tmp_path / "a.h5", samples)
    reader = InputReader(None, None, resize=False, on_progress=None)
    assert reader.describe(tmp_path / "a.h5").keys() == {"file", "sha256"}
    reader.read(tmp_path / "a.h5")
    expected = {"file": "a.h5", "sha256": sha256_of(tmp_path / "a.h5"), **samples.digests()}
    assert reader.describe(tmp_path / "a.h5") == expected
    assert {"images_sha256", "true_labels_sha256", "groups_sha256"} < expected.keys()


def test_what_is_read_is_reported_and_its_labels_checked(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "a.h5", Samples(IMAGES, TARGETS))
    told: list[tuple[str, int, int]] = []
    reader = InputReader(None, 2, resize=False, on_progress=lambda text, done, total: told.append((text, done, total)))
    with pytest.raises(DataError, match=r"a\.h5: `label` reaches 2, expected 0 to 1"):
        reader.read(tmp_path / "a.h5")
    assert told[-1] == ("Reading a.h5", 5, 5)


def test_labels_beyond_the_networks_classes_are_refused() -> None:
    images = np.zeros((2, 4, 4, 1), np.uint8)
    found = Samples(images, np.array([0, 1282]), np.array([5, 2000]))
    with pytest.raises(DataError, match=r"a\.h5: `label` reaches 1282.*43 classes"):
        check_labels(found, 43, Path("a.h5"))
    with pytest.raises(DataError, match=r"`true_label` reaches 2000"):
        check_labels(found, 1283, Path("a.h5"))
    check_labels(found, 2001, Path("a.h5"))


def folder_of(folder: Path, *names: str) -> Path:
    """Write a class folder of one picture for each name."""
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.fromarray(IMAGES[0]).save(folder / name / "a.png")
    return folder


def test_labels_that_do_not_fit_come_with_how_the_class_folders_are_numbered(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "signs", "stop", "yield", "bend", "bump", "ice", "wind")
    message = (
        r"signs: `label` reaches 5, expected 0 to 4, the network's 5 classes\n.*signs: labels are ranks of the class "
        r"folders in alphabetical order, as Keras' image_dataset_from_directory numbers them \(bend -> 0, bump -> 1, "
        r"ice -> 2, stop -> 3, 2 more\); .* with other numbers, list the folders in its order in classes\.txt$"
    )
    with pytest.raises(DataError, match=message):
        InputReader(None, 5, resize=False, on_progress=None).read(folder)


def test_a_class_folder_with_another_number_than_in_a_folder_before_is_refused(tmp_path: Path) -> None:
    clean = folder_of(tmp_path / "clean", "bend", "stop", "yield")
    attack = folder_of(tmp_path / "attack", "stop")
    reader = InputReader(None, 3, resize=False, on_progress=None)
    reader.read(clean)
    message = r"attack: class folder stop is number 0, but 1 in .*clean, expected the same in both; put the same cl"
    with pytest.raises(DataError, match=message):
        reader.read_attack(attack)
    (attack / "classes.txt").write_text("bend\nstop\nyield\n")
    assert reader.read_attack(attack).labels.tolist() == [1]


def test_once_it_is_known_what_is_expected_nothing_else_is_taken(tmp_path: Path) -> None:
    for name, labels in (("a.h5", np.zeros(5)), ("b.h5", TARGETS)):
        write_hdf5(tmp_path / name, Samples(IMAGES, labels.astype(np.int64)))
    reader = InputReader(None, None, resize=False, on_progress=None)
    reader.read(tmp_path / "b.h5")
    reader.expect((6, 4, 3), 1)
    reader.read(tmp_path / "a.h5")
    with pytest.raises(DataError, match=r"b\.h5: `label` reaches 2, expected 0 to 0"):
        reader.read(tmp_path / "b.h5")
    reader.expect((6, 5, 3), 3)
    with pytest.raises(DataError, match=r"got 6x4x3 .* expected 6x5x3"):
        reader.read(tmp_path / "b.h5")
