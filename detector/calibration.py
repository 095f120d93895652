"""Choosing the thresholds from clean images alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from detector.conformal import Floats, Regions, peel
from detector.errors import CalibrationError, InputError
from detector.scores import DETECTORS, Evidence, Thresholds, score_bits
from detector.statistics import Proportion, frr_range

SHARES = {1: (1.0,), 2: (0.5, 0.5), 3: (0.25, 0.25, 0.5)}
"""What part of the false rejections each of so many scores may make, in the order of `Evidence`; docs/detection.md."""

ALPHAS = {"strip": 0.5, "consensus": 0.7}
"""Weight of the input in the blend that each detector has by default; STRIP's is the source report's."""

METHODS = ("quantile", "normal", "fixed")
"""How a threshold comes about: an order statistic, a fitted normal distribution, or as given."""

_QUANTILES = (0.001, 0.002, 0.005, 0.01, 0.02, *np.arange(0.05, 1.0, 0.05), 0.98, 0.99, 1.0)
"""Of clean scores, where buckets of live ones end."""

_ONLY_IF_NORMAL = (
    "the threshold reaches its target FRR only if clean entropies are normally distributed; the range is what the "
    "calibration images say, on which it was fitted"
)


@dataclass(frozen=True)
class Histogram:
    """Of what clean calibration images have of a score; where live traffic drifts, it has another one.

    Attributes:
        bounds_bits: upper bounds of the buckets, ascending, in bits; the threshold is one of them.
        counts: images at or under each, ascending.
        images: how many there are.
    """

    bounds_bits: tuple[float, ...]
    counts: tuple[int, ...]
    images: int

    @classmethod
    def of(cls, bits: Floats, threshold_bits: float) -> Histogram:
        """Return the histogram of finite scores, (images,), with buckets at quantiles, and at the threshold."""
        bounds = np.unique([*np.quantile(bits, _QUANTILES, method="inverted_cdf"), threshold_bits]).astype(np.float64)
        counts = np.searchsorted(np.sort(bits), bounds, side="right")
        return cls(tuple(bounds.tolist()), tuple(counts.tolist()), len(bits))


@dataclass(frozen=True)
class Calibration:
    """Thresholds and what clean images say about them.

    Attributes:
        detector: one of `DETECTORS`.
        threshold_bits: inputs whose entropies' score, see `detector.scores`, is at or under it are rejected.
        threshold_plain_bits: so are inputs for which the entropy of the sentinel's answer to them as they came is at or
            under it; None where that plays no part, as with the detector `strip`.
        threshold_nll: and those whose nll, in nats, is at or over it; None where the repaired network is not asked, by
            the detector `strip` and where the repair changed nothing.
        method: one of `METHODS`.
        target_frr: the false rejection rate asked for, 0..1; None when the threshold was given.
        calibration_frr: share of the calibration images that the threshold rejects. For `quantile` it is chosen on
            those very images, so it is not an estimate; `frr_low` and `frr_high` are the honest statement.
        frr_low: lower end of the 95 % range for the FRR on further clean images.
        frr_high: upper end of it.
        images: how many clean images the statement rests on.
        note: what to know before relying on it; empty where the range is all there is to say.
        regions: what p-values are read off, whatever the method.
        histogram: of the entropies' scores.
    """

    detector: str
    threshold_bits: float
    threshold_plain_bits: float | None
    threshold_nll: float | None
    method: str
    target_frr: float | None
    calibration_frr: float
    frr_low: float
    frr_high: float
    images: int
    regions: Regions = field(compare=False, repr=False)
    histogram: Histogram = field(compare=False, repr=False)
    note: str = ""

    @property
    def asks_repaired(self) -> bool:
        """Whether the repaired network has a say."""
        return self.threshold_nll is not None

    @property
    def looks_at_plain(self) -> bool:
        """Whether the sentinel is shown each input as it came, too."""
        return self.detector != "strip"

    @property
    def thresholds(self) -> Thresholds:
        """At or beyond which inputs are rejected."""
        return Thresholds(self.threshold_bits, self.threshold_plain_bits, self.threshold_nll)

    def to_json(self) -> dict[str, Any]:
        """Return all but the regions, as plain values."""
        plain = {name: value for name, value in vars(self).items() if name != "regions"}
        return plain | {"histogram": asdict(self.histogram)}


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
                "false rejection rate that several thresholds share; or --detector strip"
            )

    @property
    def _by_order(self) -> bool:
        return self.method != "normal" and self.threshold_bits is None

    @property
    def least_images(self) -> int:
        """How many clean calibration images it needs at least."""
        return least_images(self.target_frr, with_nlls=self.detector == "consensus") if self._by_order else 2

    def calibrate(
        self, entropies_bits: Floats, plain_bits: Floats | None = None, nlls: Floats | None = None
    ) -> Calibration:
        """Choose the thresholds on clean calibration images; see the function of each method.

        Args:
            entropies_bits: of each image with each overlay, (images, overlays).
            plain_bits: of the sentinel's answers to the images as they are, (images,), for the detector `consensus`.
            nlls: of the images, (images,), in nats, likewise. None, where the repair changed nothing, leaves all of the
                false rejection rate to the entropies: a network always agrees with itself.
        """
        bits = score_bits(entropies_bits, self.detector)
        if self.threshold_bits is not None:
            return fixed_threshold(bits, self.threshold_bits)
        if self.method == "normal":
            return normal_threshold(bits, self.target_frr)
        if self.detector == "strip":
            return calibrate(Evidence(bits), self.target_frr)
        if plain_bits is None:
            raise InputError("calibration: got no entropies of the images as they are, which consensus looks at")
        return calibrate(Evidence(bits, plain_bits, nlls), self.target_frr)


def calibrate(evidence: Evidence, target_frr: float) -> Calibration:
    """Choose thresholds whose false rejection rate is at most `target_frr` on average.

    They bound the largest of the regions of `detector.conformal` whose p-value is at most `target_frr`. With k images
    of n peeled, further clean inputs are rejected at a rate of k / (n + 1) on average over calibration samples, and
    Beta(k, n + 1 - k) distributed given this sample. With one score this is the order statistic of split conformal
    prediction. With more, each has its part of the k images, see `SHARES`: whatever the others are worth, it keeps
    that.

    Args:
        evidence: on clean calibration images; of the detector `strip` where it is one score, and else of `consensus`.
        target_frr: false rejection rate to aim at, 0 < target_frr < 1.

    Raises:
        InputError: `target_frr` is outside (0, 1).
        CalibrationError: too few images for the target, a score that is not finite, or images that are all alike.
    """
    check_target_frr(target_frr)
    scores = evidence.scores()
    regions = peel(scores, SHARES[len(scores)])
    detector, count = "strip" if len(scores) == 1 else "consensus", scores.shape[1]
    rank, needed = quantile_rank(target_frr, count), least_images(target_frr, with_nlls=evidence.nlls is not None)
    if count < needed:
        raise CalibrationError(
            f"target FRR: got {target_frr:g} with {count} clean calibration images, expected at least {needed} images "
            f"for it with the detector {detector}; give more clean images, or a higher target FRR"
        )
    bits, *others = (float(threshold) for threshold in regions.thresholds[:, rank - 1])
    plain_bits = others[0] if evidence.plain_bits is not None and others[0] >= 0.0 else None
    thresholds = Thresholds(bits, plain_bits, None if evidence.nlls is None else -others[-1])
    rejected = int(np.count_nonzero(thresholds.reject(evidence)))
    if rejected == 0:
        alike = int(np.count_nonzero(evidence.bits == evidence.bits.min()))
        raise CalibrationError(
            f"target FRR: {alike} of {count} calibration images have the lowest entropy of all, so no threshold can "
            f"reject as few as {target_frr:.1%}; the network answers alike whatever is blended in. Choose another "
            "--alpha or more overlays"
        )
    note = ""
    if rejected < rank:
        note = (
            f"{rejected} of the {rank} calibration images that the target FRR allows are rejected, because others are "
            "equally suspicious: the network answers them alike"
        )
    return Calibration(
        detector=detector,
        threshold_bits=thresholds.bits,
        threshold_plain_bits=thresholds.plain_bits,
        threshold_nll=thresholds.nll,
        method="quantile",
        target_frr=target_frr,
        calibration_frr=rejected / count,
        frr_low=frr_range(rejected, count)[0],
        frr_high=frr_range(rank, count)[1],
        images=count,
        regions=regions,
        histogram=Histogram.of(evidence.bits, bits),
        note=note,
    )


def quantile_rank(target_frr: float, count: int) -> int:
    """Return which of `count` clean entropies, counted from the lowest, is the threshold; 0 where they are too few."""
    return math.floor(target_frr * (count + 1) + 1e-9)


def least_images(target_frr: float, *, with_nlls: bool = False) -> int:
    """Return how many clean calibration images a target FRR needs: entropies and nlls each have to reject one."""
    return math.ceil((2 if with_nlls else 1) / target_frr - 1 - 1e-9)


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
    regions = peel(entropies[None])
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
    histogram = Histogram.of(entropies, threshold)
    return _of_strip(threshold, "normal", target_frr, frr, regions, histogram, _ONLY_IF_NORMAL)


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
    regions = peel(entropies[None])
    frr = _rejected_by(threshold_bits, entropies)
    histogram = Histogram.of(entropies, threshold_bits)
    return _of_strip(float(threshold_bits), "fixed", None, frr, regions, histogram)


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


def _of_strip(
    threshold_bits: float,
    method: str,
    target_frr: float | None,
    frr: Proportion,
    regions: Regions,
    histogram: Histogram,
    note: str = "",
) -> Calibration:
    """Return what a threshold of the detector `strip` rejects of these very images."""
    return Calibration(
        detector="strip",
        threshold_bits=threshold_bits,
        threshold_plain_bits=None,
        threshold_nll=None,
        method=method,
        target_frr=target_frr,
        calibration_frr=frr.rate,
        frr_low=frr.low,
        frr_high=frr.high,
        images=frr.count,
        regions=regions,
        histogram=histogram,
        note=note,
    )


def _rejected_by(threshold_bits: float, entropies: Floats) -> Proportion:
    return Proportion(int(np.count_nonzero(entropies <= threshold_bits)), len(entropies))
