"""Rates with their sample size and 95 % interval: nothing is reported without both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.optimize import brentq

from detector.errors import InputError

CONFIDENCE = 0.95

_BESIDE = 1e-12


@dataclass(frozen=True)
class Proportion:
    """`successes` out of `count`, with the exact (Clopper-Pearson 1934) 95 % interval.

    Attributes:
        successes: how often it happened.
        count: out of how many; 0 leaves rate and interval undefined (NaN).
    """

    successes: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.successes <= self.count:
            raise InputError(f"proportion: got {self.successes} of {self.count}, expected 0 <= successes <= count")

    @property
    def rate(self) -> float:
        """The share, 0..1."""
        return self.successes / self.count if self.count else float("nan")

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The exact 95 % interval of the rate, (low, high), each 0..1."""
        if not self.count:
            return float("nan"), float("nan")
        interval = stats.binomtest(self.successes, self.count).proportion_ci(CONFIDENCE, method="exact")
        return float(interval.low), float(interval.high)

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.interval[0]

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.interval[1]

    def __str__(self) -> str:
        if not self.count:
            return "n/a (n=0)"
        return f"{100 * self.rate:.1f} % ({100 * self.low:.1f}-{100 * self.high:.1f}, n={self.count})"

    def to_json(self) -> dict[str, float | int | None]:
        """Return the rate, its interval and what they rest on; undefined figures are null."""
        if not self.count:
            return {"rate": None, "low": None, "high": None, "successes": 0, "count": 0}
        return {
            "rate": self.rate,
            "low": self.low,
            "high": self.high,
            "successes": self.successes,
            "count": self.count,
        }


def frr_range(rank: int, count: int) -> tuple[float, float]:
    """Return the central 95 % range of the FRR when the threshold is the `rank`-th smallest of `count` clean entropies.

    The share of further clean entropies at or under an order statistic is Beta(rank, count + 1 - rank) distributed.
    """
    low, high = stats.beta.interval(CONFIDENCE, rank, count + 1 - rank)
    return float(low), float(high)


def auroc(clean_scores: ArrayLike, trojaned_scores: ArrayLike) -> float:
    """Return the chance that a trojaned image scores above a clean one, ties counting half, 0..1.

    Args:
        clean_scores: (count,), higher is more suspicious; for entropies, pass them negated.
        trojaned_scores: (count,), likewise.

    Raises:
        InputError: a side is empty or holds NaN.
    """
    clean, trojaned = np.asarray(clean_scores, np.float64), np.asarray(trojaned_scores, np.float64)
    for side, scores in (("clean", clean), ("trojaned", trojaned)):
        if scores.ndim != 1 or not len(scores) or np.isnan(scores).any():
            raise InputError(f"auroc: got {side} scores of shape {scores.shape}, expected (count,), none of them NaN")
    # The asymptotic method only concerns the p-value, which is thrown away.
    wins = stats.mannwhitneyu(trojaned, clean, alternative="greater", method="asymptotic").statistic
    return float(wins / (len(clean) * len(trojaned)))


def auroc_interval(area: float, clean: int, trojaned: int) -> tuple[float, float]:
    """Return the 95 % interval of an AUROC, (low, high), each 0..1, from the area and how many images it rests on.

    Those areas that are less than 1.96 of their own standard errors away (Newcombe 2006, Statistics in Medicine 25,
    559-573, method 5), the error being that of scores that are exponentially distributed (Hanley and McNeil 1982),
    which does for others as well.

    Args:
        area: see `auroc`.
        clean: how many clean images there were.
        trojaned: how many trojaned ones.

    Raises:
        InputError: the area is none, or a side is empty.
    """
    if not (0.0 <= area <= 1.0 and clean > 0 and trojaned > 0):
        raise InputError(
            f"auroc interval: got {area} of {clean} clean and {trojaned} trojaned images, expected an area of 0 to 1, "
            "and an image of each at least"
        )
    errors = float(stats.norm.isf((1.0 - CONFIDENCE) / 2.0))
    others = (clean + trojaned) / 2.0 - 1.0

    def beyond(true: float) -> float:
        spread = 1.0 + others * ((1.0 - true) / (2.0 - true) + true / (1.0 + true))
        return abs(area - true) - errors * math.sqrt(true * (1.0 - true) * spread / (clean * trojaned))

    # At 0 and 1 themselves nothing is spread: what is looked for begins beside them.
    low = 0.0 if area == 0.0 else brentq(beyond, 0.0, min(area, 1.0 - _BESIDE))
    high = 1.0 if area == 1.0 else brentq(beyond, max(area, _BESIDE), 1.0)
    return float(low), float(high)
