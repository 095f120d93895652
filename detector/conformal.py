"""How often clean inputs look as suspicious as this one: conformal p-values over one score or two.

Clean calibration images are peeled off one by one, the most suspicious first: by their entropy (STRIP), or in turns by
their entropy and by how little the repaired network believes the sentinel's label. What lies at or beyond the last
image peeled, on either score, is a rejection region; the regions are nested, and each holds one image more.

Of n exchangeable images, the k-th region holds a further clean input with probability k / (n + 1), exactly, whatever
the scores' distribution and however they depend on each other (Wald, "An extension of Wilks' method for setting
tolerance limits", 1943; Tukey's statistically equivalent blocks, 1947). The lowest such share among the regions that
hold an input is its conformal p-value (Vovk et al., "Algorithmic Learning in a Random World", 2005).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.errors import CalibrationError, InputError

DETECTORS = ("strip", "consensus")
"""What is looked at: the mean entropy alone (STRIP), or what `detector.consensus` looks at."""

Floats = NDArray[np.floating[Any]]

_NEVER = np.inf
"""A threshold on the nll that rejects nothing."""


@dataclass(frozen=True, eq=False)
class Regions:
    """Nested rejection regions: the k-th holds an input if its entropy or its nll is at or beyond the k-th threshold.

    Attributes:
        entropies_bits: (regions,), float64, ascending: at or under it an input is in the region.
        nlls: (regions,), float64, descending, in nats: at or over it an input is in the region, too; infinite where
            the nll plays no part.
        p_values: (regions,), float64, ascending, 0..1: how often a clean input is in the region. Images whose scores
            are the same are all counted, so that ties make it larger, never smaller.
    """

    entropies_bits: NDArray[np.float64]
    nlls: NDArray[np.float64]
    p_values: NDArray[np.float64]

    def is_whole(self) -> bool:
        """Say whether these can be regions that a calibration gave."""
        parts = (self.entropies_bits, -self.nlls, self.p_values)
        ascending = all(part.ndim == 1 and len(part) == len(parts[0]) > 0 for part in parts) and all(
            bool((part[1:] >= part[:-1]).all()) and not np.isnan(part).any() for part in parts
        )
        return ascending and bool(self.p_values[0] > 0.0 and self.p_values[-1] < 1.0)

    def p_value(self, entropies_bits: Floats, nlls: Floats | None = None) -> NDArray[np.float32]:
        """Return how often a clean input looks at least as suspicious, (batch,), float32, 0..1.

        Args:
            entropies_bits: (batch,); one that is not finite is as suspicious as can be.
            nlls: (batch,), in nats, likewise; None where the nll plays no part.
        """
        first = self._first(entropies_bits, nlls)
        return np.append(self.p_values, 1.0)[first].astype(np.float32)

    def _first(self, entropies_bits: Floats, nlls: Floats | None) -> NDArray[np.intp]:
        """Return the smallest region that holds each input, counted from 0; one past the last where none does."""
        first = np.searchsorted(self.entropies_bits, np.where(np.isfinite(entropies_bits), entropies_bits, -np.inf))
        if nlls is None:
            return first
        suspicious = np.where(np.isfinite(nlls), nlls, np.finfo(np.float64).max)
        return np.minimum(first, np.searchsorted(-self.nlls, -suspicious))


def peel(entropies_bits: Floats, nlls: Floats | None = None, strip_share: float = 1.0) -> Regions:
    """Return the regions that clean calibration images give.

    Args:
        entropies_bits: of the images, (images,), finite.
        nlls: of the images, (images,), in nats, finite; None where the nll plays no part.
        strip_share: share of the regions that are peeled by entropy, 0 < strip_share <= 1; the others go by nll.

    Raises:
        InputError: `strip_share` is out of range, or is 1 with, or less without, `nlls`.
        CalibrationError: there are no images, or a score is not finite.
    """
    if not 0.0 < strip_share <= 1.0 or (strip_share < 1.0) != (nlls is not None):
        raise InputError(
            f"STRIP's share: got {strip_share} {'without' if nlls is None else 'with'} nlls, expected 1 without and "
            "less than 1 with them"
        )
    check_scores("entropy", entropies_bits)
    by_entropy = np.asarray(entropies_bits, np.float64)
    if nlls is None:
        regions = Regions(np.sort(by_entropy), np.full(len(by_entropy), _NEVER), np.empty(0))
        return _with_p_values(regions, by_entropy, None)
    check_scores("nll", nlls)
    by_nll = np.asarray(nlls, np.float64)
    queues = {True: iter(np.argsort(by_entropy, kind="stable")), False: iter(np.argsort(-by_nll, kind="stable"))}
    thresholds = np.empty((2, len(by_entropy)))
    bits, nats = -np.inf, _NEVER
    peeled = np.zeros(len(by_entropy), bool)
    for region in range(len(by_entropy)):
        with_strip = is_strips_turn(region, strip_share)
        image = next(image for image in queues[with_strip] if not peeled[image])
        peeled[image] = True
        if with_strip:
            bits = by_entropy[image]
        else:
            nats = by_nll[image]
        thresholds[:, region] = bits, nats
    return _with_p_values(Regions(thresholds[0], thresholds[1], np.empty(0)), by_entropy, by_nll)


def is_strips_turn(region: int, strip_share: float) -> bool:
    """Say whether this region, counted from 0, is peeled by entropy: the first one is, then as the share has it."""
    return math.ceil(strip_share * (region + 1) - 1e-9) > math.ceil(strip_share * region - 1e-9)


def check_scores(name: str, scores: Floats) -> None:
    """Raise CalibrationError unless there are scores, and all of them finite."""
    if len(scores) == 0:
        raise CalibrationError("calibration: got no clean images, expected at least one")
    broken = int(np.count_nonzero(~np.isfinite(scores)))
    if broken:
        raise CalibrationError(
            f"calibration: {broken} of {len(scores)} clean images have an {name} that is not finite, expected "
            "none; the network does not return probabilities for them"
        )


def _with_p_values(regions: Regions, entropies_bits: Floats, nlls: Floats | None) -> Regions:
    count = len(entropies_bits)
    held = np.cumsum(np.bincount(regions._first(entropies_bits, nlls), minlength=count)[:count])
    p_values = np.maximum(held, np.arange(1, count + 1)) / (count + 1)
    return Regions(regions.entropies_bits, regions.nlls, p_values)
