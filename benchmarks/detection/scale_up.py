"""SCALE-UP, to compare with: a trojaned input's label survives when its pixels are multiplied.

Guo et al., "SCALE-UP: An Efficient Black-box Input-level Backdoor Detection via Analyzing Scaled Prediction
Consistency", ICLR 2023, section 4, written from the paper.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime
from numpy.typing import NDArray

FACTORS = (3, 5, 7, 9, 11)
"""What pixels are multiplied by: the paper's set S."""
THRESHOLD = 0.5
"""Inputs whose consistency is above it are rejected: the paper's T."""
_BATCH = 32


def scaled(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the images as they are and then multiplied by each of `FACTORS`, held within 0..255.

    Args:
        images: (batch, height, width, channels), uint8.

    Returns:
        (batch, 1 + factors, height, width, channels), float32.
    """
    factors = np.array([1, *FACTORS], np.float32)[:, None, None, None]
    return np.minimum(images[:, None] * factors, np.float32(255))


def consistency(labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the scaled prediction consistency, 0..1: the share of multiplied copies that keep the image's label.

    Equation 2 of the paper; the higher, the more suspicious.

    Args:
        labels: (batch, 1 + factors), the image's own first.

    Returns:
        (batch,).
    """
    kept: NDArray[np.float64] = (labels[:, 1:] == labels[:, :1]).mean(axis=1)
    return kept


def standardized(
    consistencies: NDArray[np.float64],
    seen: NDArray[np.int64],
    clean_consistencies: NDArray[np.float64],
    clean_labels: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return consistencies in standard deviations from the mean of clean images of the class that is seen.

    The data-limited variant, equations 3 and 4. A class in which fewer than two clean images differ, of which the paper
    does not speak, has the deviation of all, and one without images their mean, too.

    Args:
        consistencies: (batch,).
        seen: the network's labels for the same images, (batch,).
        clean_consistencies: of the defender's clean images, (images,).
        clean_labels: what they show, (images,).

    Returns:
        (batch,).
    """
    mean, deviation = clean_consistencies.mean(), clean_consistencies.std() or 1.0
    result = np.empty(len(consistencies))
    for label in np.unique(seen):
        own = clean_consistencies[clean_labels == label]
        middle = own.mean() if len(own) else mean
        spread = (own.std() if len(own) else 0.0) or deviation
        result[seen == label] = (consistencies[seen == label] - middle) / spread
    return result


def scaled_labels(
    session: onnxruntime.InferenceSession,
    images: NDArray[np.uint8],
    on_progress: Callable[[str, int, int], None],
) -> NDArray[np.int64]:
    """Return the network's labels for the images as they are, and multiplied: (images, 1 + factors).

    Args:
        session: on the sentinel's graph.
        images: (images, height, width, channels), uint8.
        on_progress: told about every batch.
    """
    labels = np.empty((len(images), 1 + len(FACTORS)), np.int64)
    for start in range(0, len(images), _BATCH):
        rows = slice(start, start + _BATCH)
        (probabilities,) = session.run(None, {"perturbations": scaled(images[rows])})
        labels[rows] = probabilities.argmax(axis=-1)
        on_progress("Measuring SCALE-UP", min(start + _BATCH, len(images)), len(images))
    return labels
