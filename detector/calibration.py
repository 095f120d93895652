"""Choosing the entropy threshold from clean images alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.errors import CalibrationError, InputError
from detector.statistics import Proportion, frr_range


@dataclass(frozen=True)
class Calibration:
    """A threshold and what clean images say about it.

    Attributes:
        threshold_bits: inputs whose entropy is at or under it are rejected.
        method: `quantile` (from a target FRR) or `fixed` (given by the user).
        target_frr: the false rejection rate asked for, 0..1; None when the threshold was given.
        calibration_frr: share of the calibration images that the threshold rejects. For `quantile` it is chosen on
            those very images, so it is not an estimate; `frr_low` and `frr_high` are the honest statement.
        frr_low: lower end of the 95 % range for the FRR on further clean images.
        frr_high: upper end of it.
        images: how many clean images the statement rests on.
    """

    threshold_bits: float
    method: str
    target_frr: float | None
    calibration_frr: float
    frr_low: float
    frr_high: float
    images: int


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
    rank = math.floor(target_frr * (count + 1) + 1e-9)
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


def least_images(target_frr: float) -> int:
    """Return how many clean calibration images a target FRR needs at least."""
    return math.ceil(1 / target_frr - 1 - 1e-9)


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
    frr = Proportion(int(np.count_nonzero(entropies <= threshold_bits)), len(entropies))
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


def _check_finite(entropies: NDArray[np.floating[Any]]) -> None:
    if len(entropies) == 0:
        raise CalibrationError("calibration: got no clean images, expected at least one")
    broken = int(np.count_nonzero(~np.isfinite(entropies)))
    if broken:
        raise CalibrationError(
            f"calibration: {broken} of {len(entropies)} clean images have an entropy that is not finite, expected "
            "none; the sentinel network does not return probabilities for them"
        )
