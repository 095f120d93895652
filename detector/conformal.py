"""How often clean inputs look as suspicious as this one: conformal p-values over one score or several.

Clean calibration images are peeled off one by one, the most suspicious first, by one score or by several that take
turns. What lies at or under the scores of the last images peeled, by any of them, is a rejection region; the regions
are nested, and each holds one image more.

Of n exchangeable images, the k-th region holds a further clean input with probability k / (n + 1), exactly, whatever
the scores' distribution and however they depend on each other (Wald, "An extension of Wilks' method for setting
tolerance limits", 1943; Tukey's statistically equivalent blocks, 1947). The lowest such share among the regions that
hold an input is its conformal p-value (Vovk et al., "Algorithmic Learning in a Random World", 2005).

That supposes that no two inputs have the same score. Where the last image peeled ties with one that is left, its region
ends just before that score, and holds less. Where it ties with none by chance only, because about one in n inputs has
that very score, the region holds up to a tenth more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.errors import CalibrationError, InputError

Floats = NDArray[np.floating[Any]]

_NEVER = -np.inf
"""A threshold that rejects nothing."""


@dataclass(frozen=True, eq=False)
class Regions:
    """Nested rejection regions: the k-th holds an input if any score of it is at or under the k-th threshold.

    Attributes:
        thresholds: (scores, regions), float64, each row ascending; minus infinity where a score plays no part yet.
        p_values: (regions,), float64, ascending, 0..1: how often a clean input is in the region.
    """

    thresholds: NDArray[np.float64]
    p_values: NDArray[np.float64]

    def is_whole(self) -> bool:
        """Say whether these can be regions that a calibration gave."""
        if self.thresholds.ndim != 2 or self.p_values.ndim != 1 or self.thresholds.shape[1] != len(self.p_values):
            return False
        rows = np.vstack([self.thresholds, self.p_values])
        ascending = bool((rows[:, 1:] >= rows[:, :-1]).all()) and not np.isnan(rows).any()
        return self.thresholds.size > 0 and ascending and bool(self.p_values[0] > 0.0 and self.p_values[-1] < 1.0)

    def p_value(self, scores: Floats) -> NDArray[np.float32]:
        """Return how often a clean input looks at least as suspicious, (inputs,), float32, 0..1.

        Args:
            scores: (scores, inputs), the lower, the more suspicious; one that is not finite is as suspicious as can be.
        """
        return self._rounded[self._first(scores)]

    @cached_property
    def _rounded(self) -> NDArray[np.float32]:
        """The p-value of each region, and of what is in none, (regions + 1,); a server reads them with every batch."""
        rounded = np.append(self.p_values, 1.0).astype(np.float32)
        # Never up: at a target of 5 %, an input of 5 % is rejected, however that is written.
        up = rounded[:-1] > self.p_values
        rounded[:-1][up] = np.nextafter(rounded[:-1][up], np.float32(0.0))
        return rounded

    def _first(self, scores: Floats) -> NDArray[np.intp]:
        """Return the smallest region that holds each input, counted from 0; one past the last where none does."""
        lowest = np.finfo(np.float64).min  # which any threshold that there is rejects
        first = [
            np.searchsorted(thresholds, np.where(np.isfinite(row), row, lowest))
            for thresholds, row in zip(self.thresholds, scores, strict=True)
        ]
        return np.asarray(np.min(first, axis=0))


def peel(scores: Floats, shares: Sequence[float] = (1.0,)) -> Regions:
    """Return the regions that clean calibration images give.

    Args:
        scores: of the images, (scores, images), finite; the lower, the more suspicious.
        shares: of the regions, how many are peeled by each score, 0 for one that plays no part; they sum to one. Of the
            scores that are furthest behind their share, the first one is next.

    Raises:
        InputError: there is no share for each score, or they do not sum to one.
        CalibrationError: there are no images, or a score is not finite.
    """
    if len(shares) != len(scores) or min(shares) < 0.0 or abs(sum(shares) - 1.0) > 1e-9:
        raise InputError(f"shares: got {tuple(shares)} for {len(scores)} scores, expected one for each that sum to 1")
    _check_scores(scores)
    count = scores.shape[1]
    queues = [iter(np.argsort(row, kind="stable")) for row in scores]
    thresholds, current = np.empty((len(scores), count)), np.full(len(scores), _NEVER)
    left, turns = np.ones(count, bool), np.zeros(len(scores))
    for region in range(count):
        turn = int(np.argmax(np.round(np.multiply(shares, region + 1) - turns, 9)))
        image = next(image for image in queues[turn] if left[image])
        left[image] = False
        turns[turn] += 1
        score = scores[turn, image]
        tied = bool((scores[turn, left] == score).any())
        current[turn] = max(current[turn], np.nextafter(np.float32(score), np.float32(_NEVER)) if tied else score)
        thresholds[:, region] = current
    return Regions(thresholds, np.arange(1, count + 1) / (count + 1))


def _check_scores(scores: Floats) -> None:
    """Raise CalibrationError unless there are scores, (scores, images), and all of them finite."""
    images = scores.shape[1]
    if images == 0:
        raise CalibrationError("calibration: got no clean images, expected at least one")
    broken = int(np.count_nonzero(~np.isfinite(scores).all(axis=0)))
    if broken:
        raise CalibrationError(
            f"calibration: {broken} of {images} clean images have a score that is not finite, expected none; the "
            "network does not return probabilities for them"
        )
