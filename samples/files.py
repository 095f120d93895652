"""Images from files, as uint8 arrays.

What happens to the pixels on the way, and nothing else does:

- EXIF orientation is applied.
- Grey becomes colour by repeating the channel; colour becomes grey as 0.299 R + 0.587 G + 0.114 B. Other colour
  spaces (palette, CMYK) become RGB. An alpha channel that hides nothing is dropped.
- Only when asked to, images are resized (bicubic, without keeping the aspect ratio).

Conversions and resizing that were needed are listed in `LoadedImages.notes`.
"""

from __future__ import annotations

import struct
import tokenize
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from detector.errors import DataError, InputError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
ARRAY_SUFFIXES = (".npy", ".h5", ".hdf5")

_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
_MODE_OF_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
_GREY_MODES = ("1", "L", "LA", "La")
# What Pillow's decoders are known to raise on damaged files.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


@dataclass(frozen=True)
class LoadedImages:
    """Images and where they came from.

    Attributes:
        images: (count, height, width, channels), uint8, 0..255.
        names: (count) file names as they were given, with `[index]` where a file holds several images.
        notes: what was converted or resized, one line per file.
    """

    images: NDArray[np.uint8]
    names: tuple[str, ...]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


def load_images(
    paths: Iterable[str | Path], *, size: tuple[int, int, int] | None = None, resize: bool = False
) -> LoadedImages:
    """Read PNG, JPEG, BMP, WebP, `.npy` and HDF5 files into one array.

    Args:
        paths: files, in the order wanted. `.npy` holds uint8 of shape (height, width, channels) or
            (count, height, width, channels); HDF5 is read by `samples.hdf5`.
        size: (height, width, channels) to get; -1 takes any. None takes that of the first image.
        resize: change the height and width of images to those of `size` instead of refusing them.

    Raises:
        DataError: a file is missing, damaged, of an unknown kind, or of another size; the message names it.
        InputError: there are no files, or `resize` has no size to go by.
    """
    if resize and (size is None or min(size) < 1):
        raise InputError(f"resize: got size {size}, expected the height, width and channels to resize to")
    parts: list[NDArray[np.uint8]] = []
    names: list[str] = []
    notes: list[str] = []
    for path in map(Path, paths):
        for batch, note in _read(path, size):
            if resize and size is not None and batch.shape[1:3] != size[:2]:
                note = _joined(note, f"resized from {_sides(batch.shape[1:3])} to {_sides(size[:2])}")
                batch = np.stack([_resized(image, size[0], size[1]) for image in batch])
            _check_size(path, batch, size, hint="; --resize changes the size" if size and min(size) > 0 else "")
            if parts and batch.shape[1:] != parts[0].shape[1:]:
                raise DataError(
                    f"{path}: got {_sides(batch.shape[1:])}, but {names[0]} is {_sides(parts[0].shape[1:])}; "
                    "expected (height, width, channels) to be the same in all files; --resize makes them so"
                )
            names += [str(path)] if len(batch) == 1 else [f"{path}[{index}]" for index in range(len(batch))]
            parts.append(batch)
            if note:
                notes.append(f"{path}: {note}")
    if not parts:
        raise InputError("images: got no files, expected at least one")
    return LoadedImages(np.concatenate(parts), tuple(names), tuple(notes))
