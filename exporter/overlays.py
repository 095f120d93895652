"""Choosing overlays from clean images alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.calibration import quantile_rank
from detector.errors import InputError

OVERLAY_CHOICES = ("random", "greedy")


def low_entropies(entropies: NDArray[np.floating[Any]], target_frr: float) -> NDArray[np.floating[Any]]:
    """Return the threshold that the order statistic would choose, for each column of entropies.

    Args:
        entropies: of clean images, (images, columns), in bits.
        target_frr: the false rejection rate aimed at; where the images are too few for it, the lowest entropy counts.

    Returns:
        (columns,), in bits.
    """
    rank = max(1, quantile_rank(target_frr, len(entropies)))
    lowest: NDArray[np.floating[Any]] = np.partition(entropies, rank - 1, axis=0)[rank - 1]
    return lowest


def choose_greedily(entropies: NDArray[np.floating[Any]], count: int, target_frr: float) -> NDArray[np.int64]:
    """Choose overlays one by one, each time the one with which the threshold for `target_frr` comes out highest.

    The higher the lowest clean entropies, the higher the threshold may be, and the fewer trojaned inputs pass over it.

    Args:
        entropies: of each clean image under each candidate overlay, (images, candidates), in bits.
        count: how many overlays to choose, 1 to candidates.
        target_frr: the false rejection rate that the threshold will aim at, 0 < target_frr < 1.

    Returns:
        Which candidates, (count,), int64, in the order of choice; of equally good ones the first.

    Raises:
        InputError: `count` is out of range, or there are no images.
    """
    images, candidates = entropies.shape
    if not (images and 1 <= count <= candidates):
        raise InputError(
            f"overlays: got {count} to choose from {candidates} candidates on {images} images, expected 1 to "
            f"{candidates} and at least one image"
        )
    total = np.zeros((images, 1))
    left = list(range(candidates))
    chosen = []
    for _ in range(count):
        # The mean over the overlays is the sum over their number, which is the same for every candidate.
        best = left.pop(int(np.argmax(low_entropies(total + entropies[:, left], target_frr))))
        total += entropies[:, [best]]
        chosen.append(best)
    return np.array(chosen, dtype=np.int64)
