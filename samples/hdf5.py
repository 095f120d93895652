"""The official HDF5 layout: `data` (count, channels, height, width) in 0..255, and `label` (count,)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from detector.errors import DataError
from samples.types import Samples

OnProgress = Callable[[int, int], None]
"""Called with images done and images in all."""

_PIECE_BYTES = 4 << 20
# What h5py raises at a damaged file, or at something else.
_DAMAGE = (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
_PIXEL_TYPES = ("uint8", "float32", "float64")


def read_hdf5(path: Path, *, on_progress: OnProgress | None = None) -> Samples:
    """Read a data set piece by piece; memory stays under twice the size of its images as uint8.

    Args:
        path: a file with `data`, (count, channels, height, width) of uint8, float32 or float64 in 0..255, and `label`,
            (count,) of whole numbers from 0; for trojaned images also `true_label`, likewise.
        on_progress: called with (images read, images in all).

    Raises:
        DataError: the file cannot be read or does not have that layout; the message says what came instead.
    """
    try:
        with h5py.File(path, "r") as file:
            images = _read_images(_own_dataset(file, "data", path), path, on_progress)
            labels = _read_labels(_own_dataset(file, "label", path), path, len(images))
            true_labels = None
            if "true_label" in file.keys():  # noqa: SIM118  `in file` would follow a link
                true_labels = _read_labels(_own_dataset(file, "true_label", path), path, len(images))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, expected an HDF5 file with `data` and `label`") from None
    except DataError:
        raise
    except _DAMAGE as error:
        raise DataError(f"{path}: cannot be read as HDF5 ({error}); is it complete?") from error
    return Samples(images, labels, true_labels)


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
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def check_labels(samples: Samples, classes: int, path: Path) -> None:
    """Raise DataError where a label is not one of the network's classes, 0 to `classes` - 1."""
    for name, labels in (("label", samples.labels), ("true_label", samples.true_labels)):
        if labels is not None and labels.max(initial=0) >= classes:
            raise DataError(
                f"{path}: `{name}` reaches {labels.max()}, expected 0 to {classes - 1}, the network's {classes} classes"
            )


def _own_dataset(file: h5py.File, name: str, path: Path) -> h5py.Dataset:
    """Return a data set that lies in the file itself: links, external and virtual storage would read other files."""
    keys = sorted(file.keys())
    if name not in keys:
        raise DataError(f"{path}: has no `{name}` (but {keys or 'nothing'}), expected `data` and `label`")
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise DataError(f"{path}: `{name}` is a link, expected a data set in the file itself")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise DataError(f"{path}: `{name}` is a group, expected a data set")
    if dataset.external or dataset.is_virtual:
        raise DataError(f"{path}: `{name}` keeps its values in another file, expected them in the file itself")
    return dataset


def _read_images(data: h5py.Dataset, path: Path, on_progress: OnProgress | None) -> NDArray[np.uint8]:
    if data.dtype.name not in _PIXEL_TYPES:
        raise DataError(f"{path}: `data` is {data.dtype}, expected one of {', '.join(_PIXEL_TYPES)} in 0..255")
    if data.ndim != 4:
        raise DataError(f"{path}: `data` has shape {data.shape}, expected (count, channels, height, width)")
    count, channels, height, width = data.shape
    if channels not in (1, 3):
        hint = "; it looks like (count, height, width, channels), transpose it" if width in (1, 3) else ""
        raise DataError(
            f"{path}: `data` has shape {data.shape}, expected (count, 1 or 3 channels, height, width){hint}"
        )
    if not (count and height and width):
        raise DataError(f"{path}: `data` has shape {data.shape}, expected at least one image")
    if data.dtype.itemsize * data.size > 64 * max(path.stat().st_size, 1 << 20):
        # Compression bombs declare far more than they hold.
        raise DataError(f"{path}: `data` unpacks to over 64 times the size of the file, expected plausible images")
    images = np.empty((count, height, width, channels), dtype=np.uint8)
    step = max(1, _PIECE_BYTES // (data.dtype.itemsize * channels * height * width))
    largest = 0.0
    for start in range(0, count, step):
        piece = data[start : start + step]
        if piece.dtype != np.uint8:
            low, high = float(piece.min()), float(piece.max())
            if not (low >= 0.0 and high <= 255.0):  # also when NaN
                raise DataError(f"{path}: `data` has values from {low:g} to {high:g}, expected pixels in 0..255")
            largest = max(largest, high)
            np.rint(piece, out=piece)
        images[start : start + step] = piece.transpose(0, 2, 3, 1)
        if on_progress is not None:
            on_progress(min(start + step, count), count)
    if data.dtype != np.uint8 and 0.0 < largest <= 1.0:
        raise DataError(
            f"{path}: `data` has values up to {largest:g} only, expected pixels in 0..255; multiply it by 255"
        )
    return images


def _read_labels(data: h5py.Dataset, path: Path, count: int) -> NDArray[np.int64]:
    name = data.name.strip("/")
    if data.ndim == 2 and data.shape[0] == count and data.shape[1] > 1:
        raise DataError(
            f"{path}: `{name}` has shape {data.shape}, expected (count,): one class number an image, not one-hot"
        )
    if data.shape not in ((count,), (count, 1)):
        raise DataError(f"{path}: `{name}` has shape {data.shape}, expected ({count},): one label for each image")
    if data.dtype.kind not in "iuf":
        raise DataError(f"{path}: `{name}` is {data.dtype}, expected whole numbers")
    values: NDArray[Any] = data[()].reshape(count)
    if not (
        np.isfinite(values).all() and (values == np.rint(values)).all() and values.min() >= 0 and values.max() < 2**31
    ):
        raise DataError(
            f"{path}: `{name}` has values from {values.min()} to {values.max()}, expected whole numbers from 0"
        )
    return values.astype(np.int64)
