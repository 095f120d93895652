"""What an export is given: read, noted and pinned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from detector.errors import DataError
from exporter.inputs import InputReader
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
