"""The traffic signs arrive whole, and by the track."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

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
