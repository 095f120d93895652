"""Images of the size that is wanted: resized on request, refused otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detector.errors import DataError, InputError

MODE_OF_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
"""What Pillow calls a picture of so many channels."""

Size = tuple[int, int, int]
"""Height, width and channels; -1 takes any."""


def check_resize(size: Size | None, resize: bool) -> None:
    """Raise InputError where images are to be resized and `size` does not say to what."""
    if resize and (size is None or min(size[:2]) < 1):
        raise InputError(f"resize: got size {size}, expected the height and width to resize to")


def fitted(path: Path, images: NDArray[np.uint8], size: Size | None, *, resize: bool) -> NDArray[np.uint8]:
    """Return images, (count, any, any, channels), in the size that is wanted.

    Raises:
        DataError: they have another size, and are not to be resized or cannot be.
    """
    if resize and size is not None and images.shape[1:3] != size[:2]:
        images = _resized(path, images, size[0], size[1])
    check_size(path, images.shape, size)
    return images


def check_size(path: Path, shape: tuple[int, ...], size: Size | None, *, like: str = "") -> None:
    """Raise DataError unless images of `shape`, (count, height, width, channels), have the size that is wanted.

    Args:
        path: where the images come from.
        shape: of the images.
        size: what is wanted; None takes any.
        like: which image set that size, if one did.
    """
    if size is not None and any(want not in (-1, side) for want, side in zip(size, shape[1:], strict=True)):
        raise DataError(
            f"{path}: got {sides(shape[1:])} (height x width x channels), expected {sides(size)}"
            f"{like and f' like {like}'}; --resize changes height and width"
        )


def sides(shape: tuple[int, ...]) -> str:
    """Return the lengths as people write them, such as `55x47x3`."""
    return "x".join("any" if side < 0 else str(side) for side in shape)


def _resized(path: Path, images: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    channels = images.shape[3]
    if channels not in MODE_OF_CHANNELS or 0 in images.shape:
        raise DataError(f"{path}: got shape {images.shape}; only images of 1, 3 or 4 channels can be resized")
    resized = np.empty((len(images), height, width, channels), np.uint8)
    for target, image in zip(resized, images, strict=True):
        picture = Image.fromarray(image[:, :, 0] if channels == 1 else image)
        target[...] = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)).reshape(target.shape)
    return resized
