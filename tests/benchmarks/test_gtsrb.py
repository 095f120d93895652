"""The traffic signs arrive whole, and by the track."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.gtsrb import read_gtsrb
from detector.errors import DataError


@pytest.mark.shared_data
def test_the_signs_are_all_there_in_tracks_of_one_class(shared_data: Path) -> None:
    train, test = read_gtsrb(shared_data / "gtsrb32")
    assert (len(train), len(test)) == (39_209, 12_630)
    assert train.images.shape[1:] == test.images.shape[1:] == (32, 32, 3)
    assert set(train.labels) == set(test.labels) == set(range(43))
    assert train.groups is not None
    sizes = np.bincount(train.groups)
    assert np.median(sizes) == sizes.max() == 30
    first = np.unique(train.groups, return_index=True)[1]
    assert (train.labels == train.labels[first][train.groups]).all()


def test_another_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as traffic signs"):
        read_gtsrb(tmp_path)


def test_tracks_of_other_signs_are_refused(tmp_path: Path) -> None:
    sprites = [["train.webp", "train", 3, 2], ["test.webp", "test", 3, 1]]
    manifest = {"cols": 2, "h": 8, "w": 8, "sprites": sprites}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for name, *_ in sprites:
        Image.new("RGB", (16, 8)).save(tmp_path / str(name))
    np.savez(tmp_path / "train_tracks.npz", track=[0, 1], label=[3, 3])
    train, test = read_gtsrb(tmp_path)
    assert train.groups is not None
    assert (train.groups.tolist(), len(test)) == ([0, 1], 1)
    np.savez(tmp_path / "train_tracks.npz", track=[0, 1], label=[3, 4])
    with pytest.raises(
        DataError, match=r"train_tracks\.npz does not go with the sheets, expected a label for each cell"
    ):
        read_gtsrb(tmp_path)
