"""The official HDF5 layout: `data` (count, channels, height, width) in 0..255, and `label` (count,)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from detector.errors import DataError
from samples.arrays import OnProgress, StoredArray, StoredDataset, read_stored
from samples.types import Samples

# What h5py raises at a damaged file, or at something else.
_DAMAGE = (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


def read_hdf5(path: Path, *, on_progress: OnProgress | None = None) -> Samples:
    """Read a data set piece by piece; memory stays under twice the size of its images as uint8.

    Args:
        path: see `open_hdf5`.
        on_progress: called with (images read, images in all).

    Raises:
        DataError: the file cannot be read or does not have that layout; the message says what came instead.
    """
    with open_hdf5(path) as stored:
        return read_stored(path, stored, on_progress=on_progress).samples


@contextmanager
def open_hdf5(path: Path) -> Iterator[StoredDataset]:
    """Open a data set.

    Args:
        path: a file with `data`, (count, channels, height, width) of uint8, float32 or float64 in 0..255, and `label`,
            (count,) of whole numbers from 0; perhaps also `true_label` for trojaned images and `group`, likewise.

    Raises:
        DataError: the file cannot be read or does not have that layout; also while it is open.
    """
    try:
        with h5py.File(path, "r") as file:
            data, label = (_stored(file, name, path) for name in ("data", "label"))
            _check_axes(path, data.shape)
            # `in file` would follow a link.
            true_label, group = (
                _stored(file, name, path) if name in file.keys() else None  # noqa: SIM118
                for name in ("true_label", "group")
            )
            yield StoredDataset(data, "NCHW", label, true_label, group)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except DataError:
        raise
    except _DAMAGE as error:
        raise DataError(f"{path}: cannot be read as HDF5 ({error}); is it complete?") from error


def write_hdf5(path: Path, samples: Samples) -> None:
    """Write samples in the official layout; the file appears whole or not at all."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
    os.close(descriptor)
    try:
        with h5py.File(name, "w") as file:
            file.create_dataset("data", data=np.ascontiguousarray(samples.images.transpose(0, 3, 1, 2)))
            file.create_dataset("label", data=samples.labels)
            if samples.true_labels is not None:
                file.create_dataset("true_label", data=samples.true_labels)
            if samples.groups is not None:
                file.create_dataset("group", data=samples.groups)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def _stored(file: h5py.File, name: str, path: Path) -> StoredArray:
    """Return a data set that lies in the file itself: links, external and virtual storage would read other files."""
    keys = sorted(file.keys())
    if name not in keys:
        raise DataError(f"{path}: has no `{name}` (but {keys or 'nothing'}), expected `data` and `label`")
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise DataError(f"{path}: `{name}` is a link, expected a data set in the file itself")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise DataError(f"{path}: `{name}` is a group, expected a data set")
    if dataset.shape is None:
        raise DataError(f"{path}: `{name}` is declared empty (h5py.Empty), expected an array")
    if dataset.external or dataset.is_virtual:
        raise DataError(f"{path}: `{name}` keeps its values in another file, expected them in the file itself")

    def pieces(rows: int) -> Iterator[NDArray[Any]]:
        for start in range(0, len(dataset), rows):
            yield dataset[start : start + rows]

    return StoredArray(name, dataset.dtype, dataset.shape, pieces)


def _check_axes(path: Path, shape: tuple[int, ...]) -> None:
    if len(shape) != 4:
        raise DataError(f"{path}: `data` has shape {shape}, expected (count, channels, height, width)")
    if shape[1] not in (1, 3):
        hint = "; it looks like (count, height, width, channels), transpose it" if shape[3] in (1, 3) else ""
        raise DataError(f"{path}: `data` has shape {shape}, expected (count, 1 or 3 channels, height, width){hint}")
