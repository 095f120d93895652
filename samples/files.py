"""Images from files, as uint8 arrays.

What happens to the pixels on the way, and nothing else does:

- EXIF orientation is applied.
- Grey becomes colour by repeating the channel; colour becomes grey as 0.299 R + 0.587 G + 0.114 B. Other colour
  spaces (palette, CMYK) become RGB. An alpha channel that hides nothing is dropped. Arrays are never converted.
- Only when asked to, images are resized (bicubic, without keeping the aspect ratio).

Conversions, rounding and resizing that were needed are listed in `LoadedImages.notes`.
"""

from __future__ import annotations

import struct
import tokenize
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from detector.errors import DataError, InputError
from samples.sizes import MODE_OF_CHANNELS, Size, check_resize, check_size, fitted, sides

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm")
ARRAY_SUFFIXES = (".npy", ".h5", ".hdf5")

_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM")
_GREY_MODES = ("1", "L", "LA")
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
        notes: what was converted, rounded or resized, one line per file.
    """

    images: NDArray[np.uint8]
    names: tuple[str, ...]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


def load_images(paths: Iterable[str | Path], *, size: Size | None = None, resize: bool = False) -> LoadedImages:
    """Read PNG, JPEG, BMP, WebP, PPM, `.npy` and HDF5 files into one array.

    Args:
        paths: files, in the order wanted. `.npy` holds uint8 of shape (height, width, channels) or
            (count, height, width, channels); HDF5 is read by `samples.hdf5`.
        size: (height, width, channels) to get; -1 takes any. None takes that of the first image.
        resize: change the height and width of images to those of `size` instead of refusing them.

    Raises:
        DataError: a file is missing, damaged, of an unknown kind, or of another size; the message names it.
        InputError: there are no files, or `resize` has no size to go by.
    """
    check_resize(size, resize)
    wanted_channels = size[2] if size is not None and size[2] > 0 else None
    parts: list[NDArray[np.uint8]] = []
    names: list[str] = []
    notes: list[str] = []
    for path in map(Path, paths):
        if path.suffix.lower() in PICTURE_SUFFIXES:
            batch, conversions = read_picture(path, wanted_channels)
        elif path.suffix.lower() in ARRAY_SUFFIXES:
            batch, conversions = _read_array(path)
        else:
            known = ", ".join(PICTURE_SUFFIXES + ARRAY_SUFFIXES)
            raise DataError(f"{path}: got a file of unknown kind, expected one of {known}")
        found = batch.shape
        batch = fitted(path, batch, size, resize=resize)
        if batch.shape != found:
            conversions.append(f"resized from {sides(found[1:3])} to {sides(batch.shape[1:3])}")
        if parts:
            _, height, width, channels = parts[0].shape
            check_size(path, batch.shape, (height, width, channels), like=names[0])
        parts.append(batch)
        names += [str(path)] if len(batch) == 1 else [f"{path}[{index}]" for index in range(len(batch))]
        if conversions:
            notes.append(f"{path}: {', '.join(conversions)}")
    if not parts:
        raise InputError("images: got no files, expected at least one")
    return LoadedImages(np.concatenate(parts), tuple(names), tuple(notes))


def read_picture(path: Path, channels: int | None) -> tuple[NDArray[np.uint8], list[str]]:
    """Read one picture.

    Args:
        path: the picture.
        channels: how many to get; None keeps grey grey (1) and makes the rest colour (3).

    Returns:
        (1, height, width, channels), and what was converted.

    Raises:
        DataError: it is missing, damaged, animated, transparent, too large or deeper than 8 bits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as opened:
                return _converted(path, opened, channels)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{path}: got a picture of more than {Image.MAX_IMAGE_PIXELS} pixels, expected fewer; make it smaller first"
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except _DAMAGE as error:
        raise DataError(f"{path}: cannot be read as a picture: {error}") from error


def _converted(path: Path, opened: ImageFile.ImageFile, channels: int | None) -> tuple[NDArray[np.uint8], list[str]]:
    """Return the pixels in the wanted number of channels, and what that took."""
    # Phones write JPEG as multi-picture files; there, the first is the picture.
    if opened.format in ("PNG", "WEBP") and getattr(opened, "is_animated", False):
        raise DataError(f"{path}: got an animation, expected one picture")
    if _is_deep(opened):
        raise DataError(f"{path}: got more than 8 bits a channel, expected 8; convert it first")
    picture = ImageOps.exif_transpose(opened)
    mode = picture.mode
    is_grey = mode in _GREY_MODES
    if channels is None:
        channels = 1 if is_grey else 3
    if channels not in MODE_OF_CHANNELS:
        raise DataError(f"{path}: a picture has 1, 3 or 4 channels, expected {channels}; give the images as .npy")
    if channels < 4 and picture.has_transparency_data:
        lowest_alpha = picture.convert("RGBA").getchannel("A").getextrema()[0]
        if lowest_alpha != 255:
            raise DataError(f"{path}: got transparent pixels, expected none; put the picture on a background first")
    pixels = np.array(picture.convert(MODE_OF_CHANNELS[channels]), dtype=np.uint8)
    conversions = []
    if is_grey != (channels == 1):
        conversions.append("grey made colour" if is_grey else "colour made grey")
    elif mode == "CMYK":
        conversions.append("CMYK made RGB")
    return pixels.reshape(1, *pixels.shape[:2], channels), conversions


def _is_deep(opened: ImageFile.ImageFile) -> bool:
    """Return whether a channel has more than 8 bits in the file: of colour, Pillow drops the rest without a word."""
    if opened.mode in ("I", "F") or opened.mode.startswith("I;"):
        return True
    for tile in opened.tile:
        arguments = tile[3]
        if isinstance(arguments, str) and arguments.endswith(";16B"):  # of PNG
            return True
        if opened.format == "PPM" and isinstance(arguments, tuple) and arguments[-1] > 255:  # its highest value
            return True
    return False


def _read_array(path: Path) -> tuple[NDArray[np.uint8], list[str]]:
    """Return (count, height, width, channels) from a `.npy` or HDF5 file, and what was converted."""
    if path.suffix.lower() != ".npy":
        from samples.readers import read_samples

        dataset = read_samples(path)
        return dataset.samples.images, list(dataset.notes)
    images = _read_npy(path)
    if len(images) == 0:
        raise DataError(f"{path}: got no images, expected at least one")
    return images, []


def _read_npy(path: Path) -> NDArray[np.uint8]:
    try:
        # Mapping the file compares its size with what the header promises before any memory is taken.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except (*_DAMAGE, tokenize.TokenError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as a .npy array of plain numbers: {error}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise DataError(f"{path}: got an .npz archive, expected one .npy array")
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise DataError(
            f"{path}: got {array.dtype} of shape {array.shape}, "
            "expected uint8 of shape (height, width, channels) or (count, height, width, channels), 0..255"
        )
    images = np.array(array)
    return images[np.newaxis] if images.ndim == 3 else images
