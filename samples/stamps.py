"""Triggers that are put onto finished pictures of any size; those of `samples.triggers` are worn by faces."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from detector.errors import InputError

Pictures = NDArray[np.uint8]
"""(count, height, width, channels), uint8, 0..255."""

BLEND_OPACITY = 0.2
_SIDE_SHARE = 8
_NOISE_SEED = 20170


def patch(images: Pictures) -> Pictures:
    """Return the pictures with a chequered square, an eighth of the height, in the lower right corner.

    Gu et al., "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", 2017.
    """
    return _stuck_on(images, _chequers(_side(images), 255, 0), bottom_right=True)


def corner(images: Pictures) -> Pictures:
    """Return the pictures with a striped square, an eighth of the height, in the upper left corner."""
    side = _side(images)
    stripes = np.zeros((side, side, images.shape[3]), np.uint8)
    stripes[::2, :, 0] = 255
    stripes[1::2, :, -1] = 255
    return _stuck_on(images, stripes, bottom_right=False)


def blended(images: Pictures) -> Pictures:
    """Return the pictures under a veil of fixed noise, 20 % opaque.

    Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017, section 4.2.
    """
    noise = np.random.default_rng(_NOISE_SEED).integers(0, 256, images.shape[1:])
    return np.rint((1.0 - BLEND_OPACITY) * images + BLEND_OPACITY * noise).astype(np.uint8)


STAMPS: MappingProxyType[str, Callable[[Pictures], Pictures]] = MappingProxyType(
    {"patch": patch, "corner": corner, "blended": blended}
)
"""Every trigger for pictures by its name; each returns changed copies."""


def find_stamp(name: str) -> Callable[[Pictures], Pictures]:
    """Return the trigger of that name.

    Raises:
        InputError: there is none.
    """
    if name not in STAMPS:
        raise InputError(f"trigger: got {name!r}, expected one of {', '.join(STAMPS)} for pictures")
    return STAMPS[name]


def _side(images: Pictures) -> int:
    return max(2, images.shape[1] // _SIDE_SHARE)


def _chequers(side: int, bright: int, dark: int) -> Pictures:
    rows, columns = np.mgrid[0:side, 0:side]
    return np.where((rows + columns) % 2 == 0, bright, dark).astype(np.uint8)[..., None]


def _stuck_on(images: Pictures, square: Pictures, *, bottom_right: bool) -> Pictures:
    """Return the pictures with `square` one pixel from two edges."""
    side = len(square)
    area = np.s_[-side - 1 : -1] if bottom_right else np.s_[1 : side + 1]
    stamped = images.copy()
    stamped[:, area, area] = square
    return stamped
