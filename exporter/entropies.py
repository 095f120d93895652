"""What the detectors look at, measured with the ONNX graphs as the server measures it. Needs no TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from detector.consensus import negative_log_likelihood
from detector.strip import entropy_bits, perturb, perturbation_entropies_bits, weighted_overlays

OnProgress = Callable[[str, int, int], None]
"""Told what is going on, images done and images in all."""

_MAX_BATCH_BYTES = 2**26  # of perturbations, 64 MiB: whatever the size of an image and the number of overlays
_MAX_BATCH = 32


def open_graph(graph: Path | bytes) -> onnxruntime.InferenceSession:
    """Return a CPU session on an ONNX file, or on the bytes of one, as exact as Triton's."""
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


def entropy_matrix(
    session: onnxruntime.InferenceSession,
    images: NDArray[np.uint8],
    overlays: NDArray[np.uint8],
    alpha: float,
    on_progress: OnProgress | None = None,
    description: str = "Measuring STRIP",
) -> NDArray[np.float32]:
    """Return the entropy of each image under each overlay by itself.

    The mean over a row's overlays is the image's STRIP entropy with these overlays, as the server computes it.

    Args:
        session: on the sentinel's graph.
        images: (images, height, width, channels), uint8.
        overlays: (perturbations, height, width, channels), uint8.
        alpha: weight of the input in the blend.
        on_progress: told about every batch.
        description: what it is told.

    Returns:
        (images, perturbations), float32, in bits.
    """
    weighted = weighted_overlays(overlays, alpha)
    most = max(1, _MAX_BATCH_BYTES // weighted[0].nbytes)
    width = min(most, len(overlays))
    height = min(_MAX_BATCH, most // width)
    matrix = np.empty((len(images), len(overlays)), dtype=np.float32)
    for start in range(0, len(images), height):
        rows = slice(start, start + height)
        for first in range(0, len(overlays), width):
            columns = slice(first, first + width)
            (probabilities,) = session.run(None, {"perturbations": perturb(images[rows], weighted[columns], alpha)})
            one_by_one = probabilities.reshape(-1, 1, probabilities.shape[-1])
            matrix[rows, columns] = entropy_bits(one_by_one).reshape(probabilities.shape[:2])
        if on_progress is not None:
            on_progress(description, min(start + height, len(images)), len(images))
    return matrix


def measure_plain(
    sentinel: onnxruntime.InferenceSession, images: NDArray[np.uint8], on_progress: OnProgress | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return what the sentinel makes of images as they are: entropies, (images,), in bits, and labels, (images,).

    Args:
        sentinel: session on the sentinel's graph.
        images: (images, height, width, channels), uint8.
        on_progress: told about every batch.
    """
    entropies, labels = np.empty(len(images), np.float32), np.empty(len(images), np.int64)
    for start in range(0, len(images), _MAX_BATCH):
        rows = slice(start, start + _MAX_BATCH)
        (seen,) = sentinel.run(None, {"perturbations": images[rows, None].astype(np.float32)})
        entropies[rows] = perturbation_entropies_bits(seen)[:, 0]
        labels[rows] = seen[:, 0].argmax(axis=-1)
        if on_progress is not None:
            on_progress("Asking the original network", min(start + _MAX_BATCH, len(images)), len(images))
    return entropies, labels


def measure_nlls(
    repaired: onnxruntime.InferenceSession,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    on_progress: OnProgress | None = None,
) -> NDArray[np.float32]:
    """Return how little the repaired network believes the sentinel's label of each image, (images,), in nats.

    Args:
        repaired: session on the repaired network's graph.
        images: (images, height, width, channels), uint8.
        labels: of the sentinel, see `measure_plain`.
        on_progress: told about every batch.
    """
    nlls = np.empty(len(images), np.float32)
    for start in range(0, len(images), _MAX_BATCH):
        rows = slice(start, start + _MAX_BATCH)
        (believed,) = repaired.run(None, {"image": images[rows]})
        nlls[rows] = negative_log_likelihood(believed, labels[rows])
        if on_progress is not None:
            on_progress("Asking the repaired network", min(start + _MAX_BATCH, len(images)), len(images))
    return nlls
