"""Triggers that are put onto finished pictures of any size; those of `samples.triggers` are worn by faces."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Pictures = NDArray[np.uint8]
"""(count, height, width, channels), uint8, 0..255."""

BLEND_OPACITY = 0.2
WARP_SHARE = 0.04
"""How far a pixel is moved on average along each axis, as a share of the picture's height."""
JITTER_SHARE = 0.04
"""How far at most a pixel of a picture that covers the warping up is moved besides."""
_SIDE_SHARE = 8
_NOISE_SEED = 20170
_CONTROL_POINTS = 4


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


def blended(images: Pictures, opacity: float = BLEND_OPACITY) -> Pictures:
    """Return the pictures under a veil of fixed noise, 20 % opaque unless said otherwise.

    Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017, section 4.2.
    """
    noise = np.random.default_rng(_NOISE_SEED).integers(0, 256, images.shape[1:])
    return np.rint((1.0 - opacity) * images + opacity * noise).astype(np.uint8)


def warped(images: Pictures) -> Pictures:
    """Return the pictures bent by a fixed smooth field: random at 4x4 points, cubic between them.

    After Nguyen and Tran, "WaNet: Imperceptible Warping-based Backdoor Attack", ICLR 2021, section 3.2, whose fields
    move pixels less far, and whose networks are trained for longer.
    """
    return _moved(images, _field(*images.shape[1:3])[:, None])


def jittered(images: Pictures, generator: np.random.Generator) -> Pictures:
    """Return the pictures bent by that field and a little more, each pixel at random: WaNet's noise mode.

    A network that is shown them with their true labels learns that only the exact field opens the backdoor.
    """
    count, height, width = images.shape[:3]
    most = JITTER_SHARE * height
    return _moved(images, _field(height, width)[:, None] + generator.uniform(-most, most, (2, count, height, width)))


STAMPS: MappingProxyType[str, Callable[[Pictures], Pictures]] = MappingProxyType(
    {
        "patch": patch,
        "corner": corner,
        "blended": blended,
        "blended-0.1": partial(blended, opacity=0.1),
        "warped": warped,
    }
)
"""Every trigger for pictures by its name; each returns changed copies."""


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


def _field(height: int, width: int) -> NDArray[np.float64]:
    """Return how far each pixel is moved, down and right: (2, height, width), in pixels."""
    points = np.random.default_rng(_NOISE_SEED).uniform(-1, 1, (2, _CONTROL_POINTS, _CONTROL_POINTS))
    zoom = (1, height / _CONTROL_POINTS, width / _CONTROL_POINTS)
    smooth = ndimage.zoom(points, zoom, order=3, mode="nearest", grid_mode=True)
    field: NDArray[np.float64] = smooth * (WARP_SHARE * height / np.abs(smooth).mean())
    return field


def _moved(images: Pictures, field: NDArray[np.float64]) -> Pictures:
    """Return the pictures with each pixel taken from elsewhere, between four pixels in proportion.

    Args:
        images: the pictures.
        field: from how far down and right, (2, count or 1, height, width), in pixels; beyond an edge is the edge.
    """
    count, height, width = images.shape[:3]
    rows = np.clip(np.arange(height)[:, None] + field[0], 0, height - 1)
    columns = np.clip(np.arange(width) + field[1], 0, width - 1)
    top, left = (
        np.minimum(places.astype(np.intp), most) for places, most in ((rows, height - 2), (columns, width - 2))
    )
    down, right = (rows - top)[..., None], (columns - left)[..., None]
    picture = np.arange(count)[:, None, None]
    upper, lower = (
        images[picture, row, left] * (1 - right) + images[picture, row, left + 1] * right for row in (top, top + 1)
    )
    moved: Pictures = np.rint(upper * (1 - down) + lower * down).astype(np.uint8)
    return moved
