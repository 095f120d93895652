"""The independent reference: STRIP as its equations read, one number at a time, in float64."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
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


def lower_median(entropies: NDArray[Any]) -> float:
    """Return the lower median of one input's entropies, (perturbations,)."""
    return float(statistics.median_low(entropies.tolist()))


def deepid(weights: Sequence[NDArray[Any]], pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return DeepID's probabilities, (batch, classes), from scaled pixels (batch, height, width, channels), in float64.

    Args:
        weights: kernel and bias of conv_1, conv_2, conv_3, conv_4, fc_1, fc_2 and output, in that order.
        pixels: scaled as the network was trained.
    """
    kernels = [array.astype(np.float64) for array in weights]
    pool_1 = _pool(_relu(_convolve(pixels, kernels[0], kernels[1])))
    pool_2 = _pool(_relu(_convolve(pool_1, kernels[2], kernels[3])))
    pool_3 = _pool(_relu(_convolve(pool_2, kernels[4], kernels[5])))
    conv_4 = _relu(_convolve(pool_3, kernels[6], kernels[7]))
    fc_1 = pool_3.reshape(len(pixels), -1) @ kernels[8] + kernels[9]
    fc_2 = conv_4.reshape(len(pixels), -1) @ kernels[10] + kernels[11]
    logits = _relu(fc_1 + fc_2) @ kernels[12] + kernels[13]
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: NDArray[np.float64] = odds / odds.sum(axis=1, keepdims=True)
    return probabilities


def _convolve(images: NDArray[Any], kernel: NDArray[Any], bias: NDArray[Any]) -> NDArray[Any]:
    rows, columns = images.shape[1] - kernel.shape[0] + 1, images.shape[2] - kernel.shape[1] + 1
    total: NDArray[Any] = np.zeros((len(images), rows, columns, kernel.shape[3])) + bias
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            total += images[:, i : i + rows, j : j + columns] @ kernel[i, j]
    return total


def _pool(maps: NDArray[Any]) -> NDArray[Any]:
    height, width = maps.shape[1] // 2 * 2, maps.shape[2] // 2 * 2
    blocks = maps[:, :height, :width].reshape(len(maps), height // 2, 2, width // 2, 2, -1)
    return np.asarray(blocks.max(axis=(2, 4)))


def _relu(maps: NDArray[Any]) -> NDArray[Any]:
    return np.maximum(maps, 0.0)
