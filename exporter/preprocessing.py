"""What happens to pixels before a network sees them, in training, in conversion and in the served graph alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.errors import InputError

SCALES = {"unit": 1.0 / 255.0, "raw": 1.0}
"""What a pixel of 0..255 is multiplied with."""


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects of pixels: `(pixel * scale - mean) / std`, channel by channel.

    Attributes:
        scale: `unit` (pixel / 255) or `raw` (0..255).
        mean: of the scaled pixels, one for every channel or one for all; empty subtracts nothing.
        std: likewise; empty divides by nothing.
    """

    scale: str = "unit"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Raise InputError for numbers that make no sense."""
        if self.scale not in SCALES:
            raise InputError(
                f"scale: got {self.scale!r}, expected one of {', '.join(SCALES)} (unit: pixel / 255, raw: 0..255)"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not all(math.isfinite(value) for value in values):
                raise InputError(f"{name}: got {_listed(values)}, expected finite numbers")
        if not all(value > 0 for value in self.std):
            raise InputError(f"std: got {_listed(self.std)}, expected numbers above 0")

    def check_channels(self, channels: int) -> None:
        """Raise InputError unless there are as many means and deviations as `channels`, or one for all."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (0, 1, channels):
                raise InputError(
                    f"{name}: got {len(values)} numbers ({_listed(values)}), expected one, or {channels} as the "
                    "network's images have channels"
                )

    @property
    def factor(self) -> NDArray[np.float32]:
        """What pixels are multiplied with, (channels,) or (1,), float32."""
        return np.asarray(SCALES[self.scale] / np.array(self.std or (1.0,)), dtype=np.float32)

    @property
    def offset(self) -> NDArray[np.float32] | None:
        """What is added then, (channels,) or (1,), float32; None where nothing is."""
        if not self.mean:
            return None
        return np.asarray(-np.array(self.mean) / np.array(self.std or (1.0,)), dtype=np.float32)

    def apply(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Return what the network sees: (..., channels) of 0..255 to the same shape, float32."""
        pixels = images.astype(np.float32) * self.factor
        return pixels if self.offset is None else pixels + self.offset

    def __str__(self) -> str:
        mean = f", mean {_listed(self.mean)}" if self.mean else ""
        std = f", std {_listed(self.std)}" if self.std else ""
        return f"{self.scale}{mean}{std}"


def _listed(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
