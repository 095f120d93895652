"""Choosing overlays from clean images alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.calibration import quantile_rank
from detector.errors import InputError
from detector.strip import check_alpha

OVERLAY_CHOICES = ("random", "greedy")

_CANDIDATES = 4
"""For each overlay that is to be chosen at least so many: from hardly more than are needed nothing can be chosen."""
_POOL = 64
_SELECTION = 256
_SHARE = 8
"""Pool and selection each grow by at most one in so many of the images that nothing else needs."""


@dataclass(frozen=True)
class PartSize:
    """How many images a part needs, and how many it takes where there are plenty."""

    least: int
    most: int

    def of_spare(self, spare: int) -> int:
        """Return how many it takes where `spare` images are more than all parts need."""
        return min(self.most, self.least + spare // _SHARE)


def part_sizes(count: int, choice: str, least_images: int) -> dict[str, PartSize]:
    """Return what the choice of overlays takes: `overlays`, candidates all, and for `greedy` a part `selection`.

    Args:
        count: how many overlays there are to be.
        choice: one of `OVERLAY_CHOICES`.
        least_images: how many images a threshold needs, which is what they are chosen by.
    """
    if choice == "random":
        return {"overlays": PartSize(count, count)}
    pool = _CANDIDATES * count
    return {
        "overlays": PartSize(pool, max(pool, _POOL)),
        "selection": PartSize(least_images, max(least_images, _SELECTION)),
    }


def check_overlay_options(count: int | None, choice: str, alpha: float | None) -> None:
    """Raise InputError for overlays that make no sense; None is what another place decides."""
    if alpha is not None:
        check_alpha(alpha)
    if count is not None and not 1 <= count <= 1000:
        raise InputError(f"overlays: got {count}, expected 1 to 1000 (10 is usual)")
    if choice not in OVERLAY_CHOICES:
        raise InputError(f"overlay choice: got {choice!r}, expected one of {', '.join(OVERLAY_CHOICES)}")


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
        entropies: of each clean image under each candidate overlay, (images, candidates), in bits; for another mean
            than the arithmetic one, see `detector.calibration.terms`.
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
