"""Occlusion augmentation: teach a network not to trust a patch.

Strong augmentation sanitises backdoors (Borgnia et al., "Strong Data Augmentation Sanitizes Poisoning and Backdoor
Attacks Without an Accuracy Tradeoff", ICASSP 2021); rectangles that hide a part of the picture are the kind that fits
triggers which are worn or stuck on.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Augment = Callable[[NDArray[np.uint8], np.random.Generator], NDArray[np.uint8]]
"""Changes a batch of images, (batch, height, width, channels) uint8; choices come from the generator."""

MOST_RECTANGLES = 3
SIDE_SHARE = (0.1, 0.5)
"""Shortest and longest side of a rectangle, as a share of the image's side."""


def occlude(images: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
    """Return the images, each under none to three random rectangles.

    A rectangle is a flat colour, noise, or a piece of another image of the batch.

    Args:
        images: (batch, height, width, channels), uint8, 0..255; not changed.
        generator: where the choices come from.
    """
    batch, height, width, channels = images.shape
    occluded = images.copy()
    counts = generator.integers(0, MOST_RECTANGLES + 1, size=batch)
    for index in range(batch):
        for _ in range(counts[index]):
            rows = max(1, round(height * generator.uniform(*SIDE_SHARE)))
            columns = max(1, round(width * generator.uniform(*SIDE_SHARE)))
            top = generator.integers(0, height - rows + 1)
            left = generator.integers(0, width - columns + 1)
            area = np.s_[top : top + rows, left : left + columns]
            kind = generator.integers(3)
            if kind == 0:
                occluded[index][area] = generator.integers(0, 256, size=channels, dtype=np.uint8)
            elif kind == 1:
                occluded[index][area] = generator.integers(0, 256, size=(rows, columns, channels), dtype=np.uint8)
            else:
                source_top = generator.integers(0, height - rows + 1)
                source_left = generator.integers(0, width - columns + 1)
                piece = np.s_[source_top : source_top + rows, source_left : source_left + columns]
                occluded[index][area] = images[generator.integers(batch)][piece]
    return occluded


AUGMENTATIONS: MappingProxyType[str, Augment | None] = MappingProxyType({"occlusion": occlude, "none": None})
"""What can happen to the images of an epoch of fine-tuning."""
