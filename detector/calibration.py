"""Choosing the entropy threshold from clean images alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from detector.errors import CalibrationError, InputError
from detector.statistics import Proportion, frr_range

METHODS = ("quantile", "normal", "fixed")
"""How a threshold comes about: an order statistic, a fitted normal distribution, or as given."""

_ONLY_IF_NORMAL = (
    "the threshold reaches its target FRR only if clean entropies are normally distributed; the range is what the "
    "calibration images say, on which it was fitted"
)


@dataclass(frozen=True)
class Calibration:
    """A threshold and what clean images say about it.

    Attributes:
        threshold_bits: inputs whose entropy is at or under it are rejected.
        method: one of `METHODS`.
        target_frr: the false rejection rate asked for, 0..1; None when the threshold was given.
        calibration_frr: share of the calibration images that the threshold rejects. For `quantile` it is chosen on
            those very images, so it is not an estimate; `frr_low` and `frr_high` are the honest statement.
        frr_low: lower end of the 95 % range for the FRR on further clean images.
        frr_high: upper end of it.
        images: how many clean images the statement rests on.
        note: what to know before relying on it; empty where the range is all there is to say.
    """

    threshold_bits: float
    method: str
    target_frr: float | None
    calibration_frr: float
    frr_low: float
    frr_high: float
    images: int
    note: str = ""


@dataclass(frozen=True)
class ThresholdRule:
    """How to choose the threshold.

    Attributes:
        method: one of `METHODS`; None is `fixed` with a threshold and `quantile` without.
        target_frr: false rejection rate to aim at, 0 < target_frr < 1; not used by `fixed`.
        threshold_bits: the threshold of `fixed`, in bits.

    Raises:
        InputError: a value makes no sense, or does not go with the method.
    """

    method: str | None = None
    target_frr: float = 0.05
    threshold_bits: float | None = None

    def __post_init__(self) -> None:
        check_target_frr(self.target_frr)
        if self.threshold_bits is not None:
            check_threshold(self.threshold_bits)
        if self.method not in (None, *METHODS):
            raise InputError(f"calibration method: got {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.method is not None and (self.method == "fixed") != (self.threshold_bits is not None):
            raise InputError(
                f"calibration method: got {self.method} with threshold {self.threshold_bits}, expected a threshold "
                "with fixed and with no other method"
            )

    @property
    def least_images(self) -> int:
        """How many clean calibration images it needs at least."""
        by_order = self.method != "normal" and self.threshold_bits is None
        return least_images(self.target_frr) if by_order else 2

    def threshold_of(self, entropies: NDArray[np.floating[Any]]) -> Calibration:
        """Choose the threshold on clean calibration entropies, (images,), in bits; see the function of each method."""
        if self.threshold_bits is not None:
            return fixed_threshold(entropies, self.threshold_bits)
        choose = normal_threshold if self.method == "normal" else calibrate
        return choose(entropies, self.target_frr)


def calibrate(entropies: NDArray[np.floating[Any]], target_frr: float) -> Calibration:
    """Choose the threshold whose false rejection rate is at most `target_frr` on average.

    With n exchangeable clean entropies, the k-th smallest of them rejects a further clean input (`H <= threshold`) with
    probability k / (n + 1) on average over calibration samples, and with a Beta(k, n + 1 - k) distributed one given
    this sample. k is the largest rank that keeps k / (n + 1) <= target_frr. (The order statistic of split conformal
    prediction; Vovk et al., "Algorithmic Learning in a Random World", 2005.)

    Args:
        entropies: of clean calibration images, (images,), in bits.
        target_frr: false rejection rate to aim at, 0 < target_frr < 1.

    Raises:
        InputError: `target_frr` is outside (0, 1).
        CalibrationError: too few images for the target, or an entropy that is not finite.
    """
    check_target_frr(target_frr)
    _check_finite(entropies)
    count = len(entropies)
    rank = quantile_rank(target_frr, count)
    if rank < 1:
        needed = least_images(target_frr)
        raise CalibrationError(
            f"target FRR: got {target_frr:g} with {count} clean calibration images, expected at least {needed} images "
            "for it; give more clean images, or a higher target FRR"
        )
    ordered = np.sort(entropies)
    threshold = float(ordered[rank - 1])
    rejected = int(np.count_nonzero(entropies <= threshold))
    if rejected / (count + 1) > target_frr:  # ties at the threshold: every one of them would be rejected
        raise CalibrationError(
            f"target FRR: {rejected} of {count} calibration images have an entropy of at most {threshold:.6g} bits, so "
            f"no threshold can reject as few as {target_frr:.1%}; the network answers alike whatever is blended in. "
            "Choose another --alpha or more overlays"
        )
    low, high = frr_range(rank, count)
    return Calibration(threshold, "quantile", target_frr, rejected / count, low, high, count)


def quantile_rank(target_frr: float, count: int) -> int:
    """Return which of `count` clean entropies, counted from the lowest, is the threshold; 0 where they are too few."""
    return math.floor(target_frr * (count + 1) + 1e-9)


def least_images(target_frr: float) -> int:
    """Return how many clean calibration images the order statistic needs for a target FRR."""
    return math.ceil(1 / target_frr - 1 - 1e-9)


def normal_threshold(entropies: NDArray[np.floating[Any]], target_frr: float) -> Calibration:
    """Choose the threshold as STRIP's authors do: the quantile of a normal distribution fitted to clean entropies.

    `mean + z * standard deviation`, with z the standard normal's quantile at the target FRR and the maximum-likelihood
    standard deviation (Gao et al., ACSAC 2019, section 4.3). Entropies are bounded and often skewed, so nothing is
    promised: the range returned is the exact 95 % interval of the share that it rejects of these very images.

    Args:
        entropies: of clean calibration images, (images,), in bits.
        target_frr: false rejection rate to aim at, 0 < target_frr < 1.

    Raises:
        InputError: `target_frr` is outside (0, 1).
        CalibrationError: fewer than two images, entropies that are all the same or not finite, or a threshold of at
            most zero, which would accept everything.
    """
    check_target_frr(target_frr)
    _check_finite(entropies)
    mean, deviation = float(np.mean(entropies, dtype=np.float64)), float(np.std(entropies, dtype=np.float64))
    if deviation == 0.0:
        raise CalibrationError(
            f"calibration: {len(entropies)} clean images have no two different entropies (all {mean:.6g} bits), so no "
            "normal distribution fits; give more clean images, or use the method quantile"
        )
    threshold = mean + float(stats.norm.ppf(target_frr)) * deviation
    if threshold <= 0.0:
        raise CalibrationError(
            f"calibration: a normal distribution with mean {mean:.4g} and standard deviation {deviation:.4g} bits puts "
            f"the threshold for a target FRR of {target_frr:g} at {threshold:.4g} bits, expected a positive one: no "
            "entropy is lower, so every input would be accepted. Use the method quantile, or a higher target FRR"
        )
    frr = _rejected_by(threshold, entropies)
    return Calibration(threshold, "normal", target_frr, frr.rate, frr.low, frr.high, frr.count, _ONLY_IF_NORMAL)


def fixed_threshold(entropies: NDArray[np.floating[Any]], threshold_bits: float) -> Calibration:
    """Return what clean images say about a threshold that was given.

    Args:
        entropies: of clean calibration images, (images,), in bits.
        threshold_bits: the threshold, finite and not negative, in bits.

    Raises:
        InputError: `threshold_bits` is negative or not finite.
        CalibrationError: there are no entropies, or one is not finite.
    """
    check_threshold(threshold_bits)
    _check_finite(entropies)
    frr = _rejected_by(threshold_bits, entropies)
    return Calibration(float(threshold_bits), "fixed", None, frr.rate, frr.low, frr.high, frr.count)


def check_target_frr(target_frr: float) -> None:
    """Raise InputError unless 0 < `target_frr` < 1."""
    if not 0.0 < target_frr < 1.0:
        raise InputError(
            f"target FRR: got {target_frr}, expected a rate between 0 and 1 (0.05 rejects 5 % of clean inputs)"
        )


def check_threshold(threshold_bits: float) -> None:
    """Raise InputError unless `threshold_bits` is finite and not negative."""
    if not (math.isfinite(threshold_bits) and threshold_bits >= 0.0):
        raise InputError(f"threshold: got {threshold_bits} bits, expected a finite number of at least 0")


def _rejected_by(threshold_bits: float, entropies: NDArray[np.floating[Any]]) -> Proportion:
    return Proportion(int(np.count_nonzero(entropies <= threshold_bits)), len(entropies))


def _check_finite(entropies: NDArray[np.floating[Any]]) -> None:
    if len(entropies) == 0:
        raise CalibrationError("calibration: got no clean images, expected at least one")
    broken = int(np.count_nonzero(~np.isfinite(entropies)))
    if broken:
        raise CalibrationError(
            f"calibration: {broken} of {len(entropies)} clean images have an entropy that is not finite, expected "
            "none; the sentinel network does not return probabilities for them"
        )
