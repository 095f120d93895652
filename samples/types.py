"""The one shape in which labelled images travel through Stripwire."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Samples:
    """Labelled images.

    Attributes:
        images: (count, height, width, channels), uint8, 0..255.
        labels: (count,), int64. Of trojaned images: the class that the attacker wants.
        true_labels: (count,), int64: the class that a trojaned image really shows, where known.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    true_labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: NDArray[np.int64]) -> Samples:
        """Return the samples at `indices`, (count,) int64, in that order."""
        true_labels = None if self.true_labels is None else self.true_labels[indices]
        return Samples(self.images[indices], self.labels[indices], true_labels)
