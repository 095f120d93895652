"""What the arrays of a data set must be, whatever file they lie in; read piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.errors import DataError
from samples.sizes import Size, check_resize, check_size, fitted, sides
from samples.types import Dataset, Samples

OnProgress = Callable[[int, int], None]
"""Called with images done and images in all."""

_PIECE_BYTES = 4 << 20
_PIXEL_TYPES = ("uint8", "float32", "float64")
_LARGEST = 2**53
"""Below it every whole number is one in float64, too."""


@dataclass(frozen=True)
class StoredArray:
    """An array that is still in its file.

    Attributes:
        name: what it is called there.
        dtype: of its values.
        shape: as the file declares it.
        pieces: returns the array from first to last, so many rows (entries along the first axis) at a time.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: Callable[[int], Iterator[NDArray[Any]]]


@dataclass(frozen=True)
class StoredDataset:
    """A data set that is still in its file.

    Attributes:
        images: uint8, float32 or float64 in 0..255.
        axes: the order of the images' axes: `NHWC`, `NCHW`, or `NHW` for grey.
        labels: whole numbers from 0, one an image.
        true_labels: likewise, where there are any.
        groups: likewise, where there are any.
    """

    images: StoredArray
    axes: str
    labels: StoredArray
    true_labels: StoredArray | None
    groups: StoredArray | None


def read_stored(
    path: Path,
    stored: StoredDataset,
    *,
    image_shape: Size | None = None,
    resize: bool = False,
    on_progress: OnProgress | None = None,
) -> Dataset:
    """Read a data set; memory stays under twice the size of its images as uint8.

    Args:
        path: the file, for messages.
        stored: what lies in it.
        image_shape: what the images must be.
        resize: change the images' height and width to that instead of refusing them.
        on_progress: called with (images read, images in all).

    Raises:
        DataError: these are not the values of a data set, or not images of that shape.
        InputError: `resize` has no shape to go by.
    """
    check_resize(image_shape, resize)
    _check_declared(path, stored.images)
    lengths = dict(zip(stored.axes, stored.images.shape, strict=True))
    count, found = lengths["N"], (lengths["H"], lengths["W"])
    wanted = image_shape[:2] if resize and image_shape is not None else found
    shape = (count, *wanted, lengths.get("C", 1))
    check_size(path, shape, image_shape)
    labels = _read_numbers(path, stored.labels, count)
    true_labels = None if stored.true_labels is None else _read_numbers(path, stored.true_labels, count)
    groups = None if stored.groups is None else _read_numbers(path, stored.groups, count)

    images = np.empty(shape, np.uint8)
    done = rounded = 0
    for piece, fractions in _pixels(path, stored.images):
        batch = piece[..., np.newaxis] if stored.axes == "NHW" else piece.transpose(*map(stored.axes.index, "NHWC"))
        images[done : done + len(batch)] = fitted(path, batch, image_shape, resize=resize)
        done += len(batch)
        rounded += fractions
        if on_progress is not None:
            on_progress(done, count)
    notes = []
    if rounded:
        notes.append(f"{rounded} of {math.prod(stored.images.shape)} values were fractions and are rounded")
    if wanted != found:
        notes.append(f"resized from {sides(found)} to {sides(wanted)}")
    samples = Samples(images, labels, true_labels, groups)
    return Dataset(samples, tuple(f"`{stored.images.name}`: {note}" for note in notes))


def _check_declared(path: Path, images: StoredArray) -> None:
    """Refuse by what the file declares, before any of it is unpacked."""
    if images.dtype.name not in _PIXEL_TYPES:
        raise DataError(
            f"{path}: `{images.name}` is {images.dtype}, expected one of {', '.join(_PIXEL_TYPES)} in 0..255"
        )
    if 0 in images.shape:
        raise DataError(f"{path}: `{images.name}` has shape {images.shape}, expected at least one image")
    if images.dtype.itemsize * math.prod(images.shape) > 64 * max(path.stat().st_size, 1 << 20):
        # Compression bombs declare far more than they hold.
        raise DataError(
            f"{path}: `{images.name}` unpacks to over 64 times the size of the file, expected plausible images"
        )


def _pixels(path: Path, stored: StoredArray) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """Yield the pixels piece by piece as uint8, in the axes of the file, and how many of them were fractions."""
    largest = 0.0
    for piece in stored.pieces(max(1, _PIECE_BYTES // (stored.dtype.itemsize * math.prod(stored.shape[1:])))):
        if piece.dtype == np.uint8:
            yield piece, 0
            continue
        low, high = float(piece.min()), float(piece.max())
        if not (low >= 0.0 and high <= 255.0):  # also when NaN
            raise DataError(f"{path}: `{stored.name}` has values from {low:g} to {high:g}, expected pixels in 0..255")
        largest = max(largest, high)
        rounded = np.rint(piece)
        yield rounded.astype(np.uint8), int(np.count_nonzero(rounded != piece))
    if 0.0 < largest <= 1.0:
        raise DataError(
            f"{path}: `{stored.name}` has values up to {largest:g} only, expected pixels in 0..255; multiply it by 255"
        )


def _read_numbers(path: Path, stored: StoredArray, count: int) -> NDArray[np.int64]:
    """Return (count,) whole numbers from 0."""
    name, shape = stored.name, stored.shape
    if len(shape) == 2 and shape[0] == count and shape[1] > 1:
        raise DataError(
            f"{path}: `{name}` has shape {shape}, expected (count,): one class number an image, not one-hot"
        )
    if shape not in ((count,), (count, 1)):
        raise DataError(f"{path}: `{name}` has shape {shape}, expected ({count},): one number for each image")
    if stored.dtype.kind not in "iuf":
        raise DataError(f"{path}: `{name}` is {stored.dtype}, expected whole numbers")
    values = np.concatenate(list(stored.pieces(count))).reshape(count)
    if not (
        np.isfinite(values).all()
        and (values == np.rint(values)).all()
        and values.min() >= 0
        and values.max() <= _LARGEST
    ):
        raise DataError(
            f"{path}: `{name}` has values from {values.min()} to {values.max()}, expected whole numbers from 0"
        )
    numbers: NDArray[np.int64] = values.astype(np.int64)
    return numbers
