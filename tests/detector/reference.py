"""The independent reference: STRIP as its equations read, one number at a time, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def blend(image: NDArray[Any], overlay: NDArray[Any], alpha: float) -> NDArray[np.float64]:
    """Return one perturbation: (height, width, channels), float64."""
    return alpha * image.astype(np.float64) + (1.0 - alpha) * overlay.astype(np.float64)


def entropy_bits(perturbation_probabilities: NDArray[Any]) -> float:
    """Return the mean entropy of one input: (perturbations, classes) to bits."""
    total = 0.0
    for row in perturbation_probabilities:
        total += -sum(float(y) * math.log2(float(y)) for y in row if y > 0)
    return total / len(perturbation_probabilities)
