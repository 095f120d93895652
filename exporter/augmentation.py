"""What happens to pictures while a network is taught on: so that it trusts no patch, and sees more than there is.

Strong augmentation sanitises backdoors (Borgnia et al., "Strong Data Augmentation Sanitizes Poisoning and Backdoor
Attacks Without an Accuracy Tradeoff", ICASSP 2021); rectangles that hide a part of the picture are the kind that fits
triggers which are worn or stuck on. All choices come from a generator; nothing given is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, TypeAlias

import keras
import numpy as np
from numpy.typing import NDArray

Pictures: TypeAlias = "NDArray[np.uint8] | NDArray[np.float32]"
"""(batch, height, width, channels), 0..255."""

Augment: TypeAlias = Callable[[Any, np.random.Generator], NDArray[np.float32]]
"""Changes a batch of pictures; the result has the same shape, is float32 and stays in 0..255."""

MOST_RECTANGLES = 3
SIDE_SHARE = (0.1, 0.5)
"""Shortest and longest side of a rectangle, as a share of the picture's side."""
MIXED_SHARE = 0.5
VEILED_SHARE = 0.7
MOST_OPACITY = 0.3
_GRAINS = (1, 2, 4, 8)
"""Pixels on a side of a grain of noise."""
_TURN_RADIANS = 0.25
_ZOOM = (0.85, 1.2)
_SHIFT_SHARE = 0.1
_CONTRAST = (0.6, 1.5)
_BRIGHTNESS = 50.0


def hide_rectangles(pictures: Pictures, generator: np.random.Generator) -> NDArray[np.float32]:
    """Return the pictures, each under none to three rectangles of one colour, of noise, or of another picture."""
    batch, height, width, channels = pictures.shape
    hidden = pictures.astype(np.float32)
    for index, count in enumerate(generator.integers(0, MOST_RECTANGLES + 1, size=batch)):
        for _ in range(count):
            rows, columns = (max(1, round(side * generator.uniform(*SIDE_SHARE))) for side in (height, width))
            top, left = _corner(rows, columns, height, width, generator)
            area = np.s_[top : top + rows, left : left + columns]
            kind = generator.integers(3)
            if kind == 0:
                hidden[index][area] = generator.uniform(0, 255, channels)
            elif kind == 1:
                hidden[index][area] = generator.uniform(0, 255, (rows, columns, channels))
            else:
                other_top, other_left = _corner(rows, columns, height, width, generator)
                piece = np.s_[other_top : other_top + rows, other_left : other_left + columns]
                hidden[index][area] = pictures[generator.integers(batch)][piece]
    return hidden


def mix(
    pictures: Pictures, answers: NDArray[np.float32], generator: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the pictures, half of them blended with another one in any proportion, and their answers blended alike.

    Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.

    Args:
        pictures: (batch, height, width, channels), 0..255.
        answers: probabilities for each, (batch, classes), float32.
        generator: where the choices come from.
    """
    batch = len(pictures)
    share = generator.uniform(0.0, 1.0, batch)
    share = np.where(generator.uniform(size=batch) < MIXED_SHARE, share, 1.0).astype(np.float32)
    others = generator.permutation(batch)
    of_pictures, of_answers = share[:, None, None, None], share[:, None]
    mixed = of_pictures * pictures + (1.0 - of_pictures) * pictures[others]
    return mixed.astype(np.float32), of_answers * answers + (1.0 - of_answers) * answers[others]


def veil(pictures: Pictures, generator: np.random.Generator) -> NDArray[np.float32]:
    """Return the pictures under a faint veil of fine or coarse noise or of another picture, or under none."""
    batch, height, width, channels = pictures.shape
    size = int(generator.choice(_GRAINS))
    grains = generator.uniform(0, 255, (batch, -(-height // size), -(-width // size), channels)).astype(np.float32)
    noise = grains.repeat(size, axis=1).repeat(size, axis=2)[:, :height, :width]
    others = pictures[generator.permutation(batch)]
    veils = np.where(generator.uniform(size=(batch, 1, 1, 1)) < 0.5, noise, others)
    opacity = generator.uniform(0, MOST_OPACITY, (batch, 1, 1, 1))
    opacity = np.where(generator.uniform(size=opacity.shape) < VEILED_SHARE, opacity, 0.0).astype(np.float32)
    return np.asarray((1.0 - opacity) * pictures + opacity * veils, np.float32)


def move_and_recolour(pictures: Pictures, generator: np.random.Generator) -> NDArray[np.float32]:
    """Return the pictures turned, zoomed and shifted a little, with other brightness and contrast."""
    batch, height, width, _ = pictures.shape
    angle = generator.uniform(-_TURN_RADIANS, _TURN_RADIANS, batch)
    zoom = generator.uniform(*_ZOOM, batch)
    cosine, sine = np.cos(angle) / zoom, np.sin(angle) / zoom
    middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
    right = generator.uniform(-_SHIFT_SHARE, _SHIFT_SHARE, batch) * width
    down = generator.uniform(-_SHIFT_SHARE, _SHIFT_SHARE, batch) * height
    # Rows of (a0, a1, a2, b0, b1, b2, 0, 0): where a pixel of the result comes from; around the middle.
    transforms = np.stack(
        [
            *(cosine, -sine, middle_x - cosine * middle_x + sine * middle_y + right),
            *(sine, cosine, middle_y - sine * middle_x - cosine * middle_y + down),
            *(np.zeros(batch), np.zeros(batch)),
        ],
        axis=1,
    )
    moved = keras.ops.image.affine_transform(
        pictures.astype(np.float32), transforms.astype(np.float32), fill_mode="nearest"
    )
    moved = keras.ops.convert_to_numpy(moved)
    mean = moved.mean(axis=(1, 2, 3), keepdims=True)
    contrast = generator.uniform(*_CONTRAST, (batch, 1, 1, 1))
    brightness = generator.uniform(-_BRIGHTNESS, _BRIGHTNESS, (batch, 1, 1, 1))
    return np.asarray(np.clip((moved - mean) * contrast + mean + brightness, 0, 255), np.float32)


def _corner(rows: int, columns: int, height: int, width: int, generator: np.random.Generator) -> tuple[int, int]:
    return int(generator.integers(0, height - rows + 1)), int(generator.integers(0, width - columns + 1))


AUGMENTATIONS: MappingProxyType[str, Augment | None] = MappingProxyType({"occlusion": hide_rectangles, "none": None})
"""What can happen to the pictures of an epoch of fine-tuning."""
