"""STRIP's entropies, measured with the sentinel's ONNX graph as the server measures them. Needs no TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from detector.strip import entropy_bits, perturb, weighted_overlays

OnProgress = Callable[[str, int, int], None]
"""Told what is going on, images done and images in all."""

_MAX_BATCH_BYTES = 2**26  # of perturbations, 64 MiB: whatever the size of an image and the number of overlays
_MAX_BATCH = 32


def open_graph(graph: Path | bytes) -> onnxruntime.InferenceSession:
    """Return a CPU session on an ONNX file, or on the bytes of one, as exact as Triton's."""
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


def measure_entropies(
    session: onnxruntime.InferenceSession,
    images: NDArray[np.uint8],
    overlays: NDArray[np.uint8],
    alpha: float,
    on_progress: OnProgress | None = None,
) -> NDArray[np.float32]:
    """Return STRIP's entropy of each image, computed as the server computes it.

    Args:
        session: on the sentinel's graph.
        images: (images, height, width, channels), uint8.
        overlays: (perturbations, height, width, channels), uint8.
        alpha: weight of the input in the blend.
        on_progress: told about every batch.

    Returns:
        (images,), float32, in bits.
    """
    measured = _measure(session, images, overlays, alpha, entropy_bits, "Calibrating STRIP", on_progress)
    return np.concatenate([np.empty(0, dtype=np.float32), *measured])


def entropy_matrix(
    session: onnxruntime.InferenceSession,
    images: NDArray[np.uint8],
    overlays: NDArray[np.uint8],
    alpha: float,
    on_progress: OnProgress | None = None,
    description: str = "Comparing overlays",
) -> NDArray[np.float32]:
    """Return the entropy of each image under each overlay by itself; arguments as for `measure_entropies`.

    The mean over a row's overlays is the image's STRIP entropy with these overlays.

    Returns:
        (images, perturbations), float32, in bits.
    """

    def one_by_one(probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
        rows = probabilities.reshape(-1, 1, probabilities.shape[-1])
        entropies: NDArray[np.float32] = entropy_bits(rows).reshape(probabilities.shape[:2])
        return entropies

    measured = _measure(session, images, overlays, alpha, one_by_one, description, on_progress)
    return np.concatenate([np.empty((0, len(overlays)), dtype=np.float32), *measured])


def _measure(
    session: onnxruntime.InferenceSession,
    images: NDArray[np.uint8],
    overlays: NDArray[np.uint8],
    alpha: float,
    reduce: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    description: str,
    on_progress: OnProgress | None,
) -> list[NDArray[np.float32]]:
    """Return `reduce` of the sentinel's probabilities, (batch, perturbations, classes), for each batch of images."""
    weighted = weighted_overlays(overlays, alpha)
    step = max(1, min(_MAX_BATCH, _MAX_BATCH_BYTES // weighted.nbytes))
    measured = []
    for start in range(0, len(images), step):
        (probabilities,) = session.run(None, {"perturbations": perturb(images[start : start + step], weighted, alpha)})
        measured.append(reduce(probabilities))
        if on_progress is not None:
            on_progress(description, min(start + step, len(images)), len(images))
    return measured
