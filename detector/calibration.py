"""Choosing the thresholds from clean images alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from detector.conformal import DETECTORS, Floats, Regions, peel
from detector.consensus import is_disputed
from detector.errors import CalibrationError, InputError
from detector.scores import score_bits
from detector.statistics import Proportion, frr_range
from detector.strip import is_trojaned

STRIP_SHARE = 0.5
"""STRIP's share of the false rejections that the consensus detector may make; see docs/detection.md."""

ALPHAS = {"strip": 0.5, "consensus": 0.7}
"""Weight of the input in the blend that each detector has by default; STRIP's is the source report's."""

METHODS = ("quantile", "normal", "fixed")
"""How a threshold comes about: an order statistic, a fitted normal distribution, or as given."""

_ONLY_IF_NORMAL = (
    "the threshold reaches its target FRR only if clean entropies are normally distributed; the range is what the "
    "calibration images say, on which it was fitted"
)


@dataclass(frozen=True)
class Calibration:
    """Thresholds and what clean images say about them.

    Attributes:
        detector: one of `DETECTORS`.
        threshold_bits: inputs whose score, see `detector.scores`, is at or under it are rejected.
        threshold_nll: inputs whose nll, in nats, is at or over it are rejected as well; None where the repaired network
            is not asked, by the detector `strip` and where the repair changed nothing.
        method: one of `METHODS`.
        target_frr: the false rejection rate asked for, 0..1; None when the threshold was given.
        calibration_frr: share of the calibration images that the threshold rejects. For `quantile` it is chosen on
            those very images, so it is not an estimate; `frr_low` and `frr_high` are the honest statement.
        frr_low: lower end of the 95 % range for the FRR on further clean images.
        frr_high: upper end of it.
        images: how many clean images the statement rests on.
        note: what to know before relying on it; empty where the range is all there is to say.
        regions: what p-values are read off, whatever the method.
    """

    detector: str
    threshold_bits: float
    threshold_nll: float | None
    method: str
    target_frr: float | None
    calibration_frr: float
    frr_low: float
    frr_high: float
    images: int
    regions: Regions = field(compare=False, repr=False)
    note: str = ""

    @property
    def asks_repaired(self) -> bool:
        """Whether the repaired network has a say."""
        return self.threshold_nll is not None

    def rejects(self, entropies_bits: Floats, nlls: Floats | None = None) -> NDArray[np.bool_]:
        """Return the verdicts on inputs, (batch,): what `detector.serving` says of the same scores.

        Args:
            entropies_bits: scores, see `detector.scores`, (batch,).
            nlls: (batch,), in nats; not looked at where there is no threshold for them.
        """
        rejected = is_trojaned(entropies_bits, self.threshold_bits)
        if self.threshold_nll is not None:
            rejected = rejected | is_disputed(nlls, self.threshold_nll)
        return np.asarray(rejected)

    def to_json(self) -> dict[str, Any]:
        """Return all but the regions, as plain values."""
        return {name: value for name, value in vars(self).items() if name != "regions"}


@dataclass(frozen=True)
class ThresholdRule:
    """How to choose the thresholds.

    Attributes:
        method: one of `METHODS`; None is `fixed` with a threshold and `quantile` without.
        target_frr: false rejection rate to aim at, 0 < target_frr < 1; not used by `fixed`.
        threshold_bits: the threshold of `fixed`, in bits.
        detector: one of `DETECTORS`; `consensus` goes with `quantile` alone.

    Raises:
        InputError: a value makes no sense, or does not go with the method.
    """

    method: str | None = None
    target_frr: float = 0.05
    threshold_bits: float | None = None
    detector: str = "strip"

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
        if self.detector not in DETECTORS:
            raise InputError(f"detector: got {self.detector!r}, expected one of {', '.join(DETECTORS)}")
        if self.detector == "consensus" and not self._by_order:
            given = (
                f"calibration method {self.method}" if self.threshold_bits is None else "a threshold (--threshold-bits)"
            )
            raise InputError(
                f"detector: got consensus with {given}, expected the calibration method quantile, which alone keeps a "
                "false rejection rate that two thresholds share"
            )

    @property
    def _by_order(self) -> bool:
        return self.method != "normal" and self.threshold_bits is None

    @property
    def least_images(self) -> int:
        """How many clean calibration images it needs at least."""
        return least_images(self.target_frr, self.detector) if self._by_order else 2

    def calibrate(self, entropies_bits: Floats, nlls: Floats | None = None) -> Calibration:
        """Choose the thresholds on clean calibration images; see the function of each method.

        Args:
            entropies_bits: of each image with each overlay, (images, overlays).
            nlls: of the images, (images,), in nats, for the detector `consensus`. None, where the repair changed
                nothing, leaves all of the false rejection rate to the entropy: a network always agrees with itself.
        """
        bits = score_bits(entropies_bits, self.detector)
        if self.threshold_bits is not None:
            return fixed_threshold(bits, self.threshold_bits)
        if self.method == "normal":
            return normal_threshold(bits, self.target_frr)
        return calibrate(bits, self.target_frr, nlls if self.detector == "consensus" else None, detector=self.detector)


def calibrate(
    entropies_bits: Floats, target_frr: float, nlls: Floats | None = None, *, detector: str = "strip"
) -> Calibration:
    """Choose thresholds whose false rejection rate is at most `target_frr` on average.

    They bound the largest of the regions of `detector.conformal` whose p-value is at most `target_frr`. With k images
    of n in it, further clean inputs are rejected at a rate of k / (n + 1) on average over calibration samples, and
    Beta(k, n + 1 - k) distributed given this sample. Without nlls this is the order statistic of split conformal
    prediction. With them, `STRIP_SHARE` of the k images are rejected by entropy, and the others by nll: whatever the
    nll is worth, STRIP keeps its share.

    Args:
        entropies_bits: scores of clean calibration images, see `detector.scores`, (images,).
        target_frr: false rejection rate to aim at, 0 < target_frr < 1.
        nlls: of the same images, (images,), in nats, for the detector `consensus`.
        detector: whose scores they are.

    Raises:
        InputError: `target_frr` is outside (0, 1).
        CalibrationError: too few images for the target, or a score that is not finite.
    """
    check_target_frr(target_frr)
    regions = peel(entropies_bits, nlls, 1.0 if nlls is None else STRIP_SHARE)
    count = len(entropies_bits)
    rank = quantile_rank(target_frr, count)
    needed = least_images(target_frr, "strip" if nlls is None else "consensus")
    if count < needed:
        raise CalibrationError(
            f"target FRR: got {target_frr:g} with {count} clean calibration images, expected at least {needed} images "
            f"for it with the detector {detector}; give more clean images, or a higher target FRR"
        )
    threshold_bits, nll = float(regions.entropies_bits[rank - 1]), float(regions.nlls[rank - 1])
    rejected = round(regions.p_values[rank - 1] * (count + 1))
    if rejected / (count + 1) > target_frr:  # ties at a threshold: every one of them would be rejected
        at = f"an entropy of at most {threshold_bits:.6g} bits" + ("" if nlls is None else f", or an nll of {nll:.6g}")
        raise CalibrationError(
            f"target FRR: {rejected} of {count} calibration images have {at}, so no threshold can reject as few as "
            f"{target_frr:.1%}; the network answers alike whatever is blended in. Choose another --alpha or more "
            "overlays"
        )
    low, high = frr_range(rank, count)
    threshold_nll = None if nlls is None else nll
    frr = rejected / count
    return Calibration(detector, threshold_bits, threshold_nll, "quantile", target_frr, frr, low, high, count, regions)


def quantile_rank(target_frr: float, count: int) -> int:
    """Return which of `count` clean entropies, counted from the lowest, is the threshold; 0 where they are too few."""
    return math.floor(target_frr * (count + 1) + 1e-9)


def least_images(target_frr: float, detector: str = "strip") -> int:
    """Return how many clean calibration images a target FRR needs: of `consensus`, each threshold has to reject one."""
    return math.ceil((2 if detector == "consensus" else 1) / target_frr - 1 - 1e-9)


def normal_threshold(entropies: Floats, target_frr: float) -> Calibration:
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
    regions = peel(entropies)
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
    return Calibration(
        "strip", threshold, None, "normal", target_frr, frr.rate, frr.low, frr.high, frr.count, regions, _ONLY_IF_NORMAL
    )


def fixed_threshold(entropies: Floats, threshold_bits: float) -> Calibration:
    """Return what clean images say about a threshold that was given.

    Args:
        entropies: of clean calibration images, (images,), in bits.
        threshold_bits: the threshold, finite and not negative, in bits.

    Raises:
        InputError: `threshold_bits` is negative or not finite.
        CalibrationError: there are no entropies, or one is not finite.
    """
    check_threshold(threshold_bits)
    regions = peel(entropies)
    frr = _rejected_by(threshold_bits, entropies)
    bits = float(threshold_bits)
    return Calibration("strip", bits, None, "fixed", None, frr.rate, frr.low, frr.high, frr.count, regions)


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


def _rejected_by(threshold_bits: float, entropies: Floats) -> Proportion:
    return Proportion(int(np.count_nonzero(entropies <= threshold_bits)), len(entropies))
