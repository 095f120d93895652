"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from detector.errors import InputError
from samples.npz import write_npz
from samples.readers import read_samples
from samples.types import Samples
from samples.writing import check_new_file, whole_file


def test_what_is_written_as_npz_is_read_alike(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    samples = Samples(images.transpose(0, 2, 1, 3), np.arange(4), groups=np.array([0, 0, 7, 7]))
    write_npz(tmp_path / "data.npz", samples, mode=0o600)
    read = read_samples(tmp_path / "data.npz").samples
    assert read.digests() == samples.digests()
    assert (tmp_path / "data.npz").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_a_file_that_is_not_written_to_its_end_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    expected = InputError if isinstance(error, OSError) else type(error)

    def write() -> None:
        with whole_file(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(expected) as raised:
        write()
    if expected is InputError:
        assert str(raised.value) == f"{path}: cannot be written (No space left on device); make room, or choose " + (
            "another folder"
        )
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"before"]


def test_where_no_new_file_can_be_is_said_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "taken.npz").touch()
    for name, message in (
        ("taken.npz", "exists, expected a file that does not"),
        ("name.h5", "expected a name that ends with .npz"),
        ("none/name.npz", "none is no folder that can be written"),
    ):
        with pytest.raises(InputError, match=message):
            check_new_file(tmp_path / name, ".npz")
    check_new_file(tmp_path / "new.npz", ".npz")
