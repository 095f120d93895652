"""Data sets in NumPy's `.npz`, read piece by piece: `np.load` would hold a whole array in the type of the file."""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from detector.errors import DataError
from samples.arrays import StoredArray, StoredDataset
from samples.types import Samples
from samples.writing import whole_file

_KEYS = (("images", "labels"), ("data", "label"), ("x", "y"))
_TRUE_LABELS = ("true_labels", "true_label")
_GROUPS = ("groups", "group")
# Of other kinds, zipfile unpacks as much at once as the file likes.
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What zipfile and NumPy raise at a damaged file, or at something else.
DAMAGE = (
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,  # encrypted
    SyntaxError,
    TypeError,
    ValueError,
    OverflowError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    struct.error,
    zlib.error,
)


@contextmanager
def open_npz(path: Path) -> Iterator[StoredDataset]:
    """Open a data set.

    Args:
        path: an archive of `images` and `labels` (or `data` and `label`, or `x` and `y`). Images are uint8, float32 or
            float64 in 0..255 of shape (count, height, width, channels), (count, channels, height, width), or
            (count, height, width) for grey; labels are (count,) whole numbers from 0. There may also be `true_labels`
            (or `true_label`) for trojaned images and `groups` (or `group`), likewise.

    Raises:
        DataError: the file cannot be read or does not have that layout; also while it is open.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            images, labels = _names(path, archive)
            stored = stored_array(path, archive, images)
            axes = _axes(path, stored)
            true_labels, groups = (_optional(path, archive, names) for names in (_TRUE_LABELS, _GROUPS))
            yield StoredDataset(stored, axes, stored_array(path, archive, labels), true_labels, groups)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except DataError:
        raise
    except DAMAGE as error:
        raise DataError(f"{path}: cannot be read as .npz of plain numbers ({error}); is it complete?") from error


def write_npz(path: Path, samples: Samples, *, mode: int = 0o644) -> None:
    """Write samples as `open_npz` reads them; the file appears whole or not at all.

    Raises:
        InputError: it cannot be written there.
    """
    arrays: dict[str, NDArray[Any]] = {"images": samples.images, "labels": samples.labels}
    arrays |= {name: numbers for name in ("true_labels", "groups") if (numbers := getattr(samples, name)) is not None}
    with whole_file(path, mode=mode) as file:
        write_arrays(file, arrays)


def write_arrays(file: IO[bytes], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays as `np.savez_compressed` does, which at a full disk leaves an archive that complains once more."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.save(member, np.ascontiguousarray(array), allow_pickle=False)


def _names(path: Path, archive: zipfile.ZipFile) -> tuple[str, str]:
    """Return what images and labels are called in this archive."""
    keys = sorted(name.removesuffix(".npy") for name in archive.namelist())
    found = [pair for pair in _KEYS if set(pair) & set(keys)]
    expected = "expected " + " or ".join(f"`{images}` with `{labels}`" for images, labels in _KEYS)
    if len(found) > 1:
        raise DataError(f"{path}: has {keys}, which may be images and labels in several ways; {expected}, not both")
    if not found or not set(found[0]) <= set(keys):
        raise DataError(f"{path}: has no images with labels (but {keys or 'nothing'}), {expected}")
    return found[0]


def _optional(path: Path, archive: zipfile.ZipFile, names: tuple[str, str]) -> StoredArray | None:
    found = [name for name in names if f"{name}.npy" in archive.namelist()]
    if len(found) > 1:
        raise DataError(f"{path}: has both `{names[0]}` and `{names[1]}`, expected one of them")
    return stored_array(path, archive, found[0]) if found else None


def _axes(path: Path, images: StoredArray) -> str:
    """Return the order of the images' axes, as far as their lengths leave no doubt."""
    shape, few = images.shape, (1, 3)
    if len(shape) == 3:
        return "NHW"
    if len(shape) == 4 and shape[1] in few and shape[3] in few:
        raise DataError(
            f"{path}: `{images.name}` has shape {shape}, in which both the second and the last axis may be the "
            "channels; give the images as HDF5, (count, channels, height, width)"
        )
    if len(shape) == 4 and (shape[1] in few or shape[3] in few):
        return "NCHW" if shape[1] in few else "NHWC"
    raise DataError(
        f"{path}: `{images.name}` has shape {shape}, expected (count, height, width, 1 or 3 channels), "
        "(count, 1 or 3 channels, height, width) or (count, height, width)"
    )


def stored_array(path: Path, archive: zipfile.ZipFile, name: str) -> StoredArray:
    """Return an array of the archive, to be read in pieces; reading raises DataError, or one of `DAMAGE`."""
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type not in _COMPRESSIONS:
        raise DataError(f"{path}: `{name}` is packed in a way that NumPy does not use; write it by np.savez_compressed")
    with archive.open(member) as stream:
        dtype, shape, by_columns = _read_header(stream)
    if by_columns:
        raise DataError(
            f"{path}: `{name}` is stored column by column (Fortran order), expected row by row; write it as "
            "np.ascontiguousarray"
        )

    def pieces(rows: int) -> Iterator[NDArray[Any]]:
        row_bytes = dtype.itemsize * math.prod(shape[1:])
        with archive.open(member) as stream:
            _read_header(stream)
            for start in range(0, shape[0], rows):
                count = min(rows, shape[0] - start)
                content = stream.read(count * row_bytes)
                if len(content) < count * row_bytes:
                    raise DataError(f"{path}: `{name}` ends before the shape {shape} that it declares; is it complete?")
                yield np.frombuffer(content, dtype).reshape(count, *shape[1:])
            if stream.read(1):  # at the end, zipfile compares the checksum
                raise DataError(f"{path}: `{name}` goes on after the shape {shape} that it declares")

    return StoredArray(name, dtype, shape, pieces)


def _read_header(stream: IO[bytes]) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """Return dtype, shape and whether the array is stored in Fortran order."""
    version = npy.read_magic(stream)  # type: ignore[no-untyped-call]
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the .npy format")
    read: Callable[[IO[bytes]], Any] = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, by_columns, dtype = read(stream)
    if any(length < 0 for length in shape):
        raise ValueError(f"shape {shape}")
    return dtype, shape, by_columns
