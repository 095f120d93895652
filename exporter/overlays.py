"""Choosing overlays from clean images alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from detector.calibration import quantile_rank
from detector.errors import InputError
from detector.scores import lower_middle
from detector.strip import check_alpha

OVERLAY_CHOICES = ("random", "greedy")

Count: TypeAlias = int | Literal["auto"]
"""How many overlays there are to be; `auto` leaves it to `enough_overlays`."""

_SLOPE = 0.01
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


def part_sizes(count: Count, choice: str, least_images: int) -> dict[str, PartSize]:
    """Return what the choice of overlays takes: `overlays`, candidates all, and for `greedy` a part `selection`.

    Args:
        count: how many overlays there are to be.
        choice: one of `OVERLAY_CHOICES`.
        least_images: how many images a threshold needs, which is what they are chosen by.
    """
    if choice == "random" and count != "auto":
        return {"overlays": PartSize(count, count)}
    pool = _POOL if count == "auto" else _CANDIDATES * count
    return {
        "overlays": PartSize(pool, max(pool, _POOL)),
        "selection": PartSize(least_images, max(least_images, _SELECTION)),
    }


def check_overlay_options(count: Count | None, choice: str | None, alpha: float | None) -> None:
    """Raise InputError for overlays that make no sense; None is what another place decides."""
    if alpha is not None:
        check_alpha(alpha)
    if count == "auto":
        if choice == "random":
            raise InputError("overlays: got auto with overlay choice random, expected greedy, which looks at images")
    elif count is not None and not 1 <= count <= 1000:
        raise InputError(f"overlays: got {count}, expected 1 to 1000 (10 is usual)")
    if choice is not None and choice not in OVERLAY_CHOICES:
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


def enough_overlays(entropies: NDArray[np.floating[Any]]) -> int:
    """Return how many overlays are enough: with one more, clean entropies would spread less than 1 % less.

    STRIP's authors let N grow until the slope of the standard deviation of the clean images' mean entropies is small
    (Gao et al., ACSAC 2019, on detection time); the 1 % is ours. The spread is a + b / N, with a the variance between
    images and b that between the entropies of one image, which are estimated from all candidates as in a two-way
    analysis of variance: it does not hang on which overlays come first.

    Args:
        entropies: of each clean image under each candidate overlay, (images, candidates), at least two of each, in
            bits.

    Returns:
        1..50; 50 where images differ by chance alone.
    """
    images, candidates = entropies.shape
    centred = entropies.astype(np.float64) - entropies.mean(axis=0, dtype=np.float64)
    of_images = centred.mean(axis=1, keepdims=True)
    within = float(np.sum((centred - of_images) ** 2)) / ((images - 1) * (candidates - 1))
    between = max(float(np.var(of_images, ddof=1)) - within / candidates, 0.0)
    count = 1
    while between + within / (count + 1) < (1.0 - _SLOPE) ** 2 * (between + within / count):
        count += 1
    return count


def choose_greedily(
    entropies: NDArray[np.floating[Any]], count: Count, target_frr: float, detector: str = "strip"
) -> NDArray[np.int64]:
    """Choose overlays one by one, each time the one with which the threshold for `target_frr` comes out highest.

    The higher the lowest clean entropies, the higher the threshold may be, and the fewer trojaned inputs pass over it.

    Args:
        entropies: of each clean image under each candidate overlay, (images, candidates), in bits.
        count: how many overlays to choose, 1 to candidates, or `auto` for as many as are enough.
        target_frr: the false rejection rate that the threshold will aim at, 0 < target_frr < 1.
        detector: whose score, see `detector.scores`, the threshold is for.

    Returns:
        Which candidates, (count,), int64, in the order of choice; of equally good ones the first.

    Raises:
        InputError: `count` is out of range, or there are no images.
    """
    images, candidates = entropies.shape
    if count == "auto":
        count = enough_overlays(entropies)
    if not (images and 1 <= count <= candidates):
        raise InputError(
            f"overlays: got {count} to choose from {candidates} candidates on {images} images, expected 1 to "
            f"{candidates} and at least one image"
        )
    with_one_more = _mean_with_one_more if detector == "strip" else _median_with_one_more
    left = list(range(candidates))
    chosen: list[int] = []
    for _ in range(count):
        of_each = with_one_more(entropies[:, chosen].astype(np.float64), entropies[:, left])
        chosen.append(left.pop(int(np.argmax(low_entropies(of_each, target_frr)))))
    return np.array(chosen, dtype=np.int64)


def _mean_with_one_more(chosen: NDArray[np.float64], candidates: NDArray[Any]) -> NDArray[np.floating[Any]]:
    """Return the mean of the entropies chosen, (images, chosen), and of each candidate by itself with them."""
    mean: NDArray[np.float64] = (chosen.sum(axis=1, keepdims=True) + candidates) / (chosen.shape[1] + 1)
    return mean


def _median_with_one_more(chosen: NDArray[np.float64], candidates: NDArray[Any]) -> NDArray[np.floating[Any]]:
    """Return likewise the lower median: the candidate, but no further out than its neighbours in the middle."""
    ends = np.full((len(chosen), 1), np.inf)
    ascending = np.concatenate([-ends, np.sort(chosen, axis=1), ends], axis=1)
    below = lower_middle(chosen.shape[1] + 1)
    between: NDArray[np.float64] = np.clip(candidates, ascending[:, [below]], ascending[:, [below + 1]])
    return between
