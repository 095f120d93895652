"""The threshold: order statistics by hand, its promise by simulation, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from detector.calibration import ThresholdRule, calibrate, fixed_threshold, normal_threshold
from detector.errors import CalibrationError, InputError, StripwireError


def test_the_threshold_is_the_order_statistic_by_hand() -> None:
    calibration = calibrate(np.arange(1.0, 100.0), 0.05)  # 99 entropies: rank 5 of 100
    assert calibration.threshold_bits == 5.0
    assert calibration.calibration_frr == pytest.approx(5 / 99)
    assert calibration.images == 99


def test_nineteen_images_are_the_fewest_for_five_percent() -> None:
    assert calibrate(np.arange(1.0, 20.0), 0.05).threshold_bits == 1.0
    with pytest.raises(CalibrationError, match="18 clean calibration images, expected at least 19"):
        calibrate(np.arange(1.0, 19.0), 0.05)


def test_further_clean_inputs_are_rejected_at_the_target_rate_on_average() -> None:
    generator = np.random.default_rng(0)
    rates = [stats.norm.cdf(calibrate(generator.normal(0, 1, 60), 0.1).threshold_bits) for _ in range(4000)]
    assert np.mean(rates) <= 0.1 + 3 * np.std(rates) / np.sqrt(4000)
    assert np.mean(rates) == pytest.approx(6 / 61, abs=3 * np.std(rates) / np.sqrt(4000))


def test_the_range_of_the_false_rejection_rate_holds_nineteen_times_in_twenty() -> None:
    generator = np.random.default_rng(1)
    calibrations = [calibrate(generator.normal(0, 1, 200), 0.05) for _ in range(2000)]
    inside = [c.frr_low <= stats.norm.cdf(c.threshold_bits) <= c.frr_high for c in calibrations]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)


def test_ties_that_would_break_the_promise_are_refused() -> None:
    with pytest.raises(CalibrationError, match="30 of 100 calibration images"):
        calibrate(np.concatenate([np.zeros(30), np.arange(1.0, 71.0)]), 0.05)


def test_a_given_threshold_reports_what_clean_images_say_of_it() -> None:
    calibration = fixed_threshold(np.arange(1.0, 101.0), 7.5)
    assert (calibration.threshold_bits, calibration.calibration_frr, calibration.target_frr) == (7.5, 0.07, None)
    # Clopper-Pearson for 7 of 100, from published tables.
    assert calibration.frr_low == pytest.approx(0.0286, abs=1e-4)
    assert calibration.frr_high == pytest.approx(0.1389, abs=1e-4)


@pytest.mark.parametrize("target", [0.0, 1.0, -0.1, float("nan")])
def test_a_target_that_is_no_rate_is_refused(target: float) -> None:
    with pytest.raises(InputError, match="target FRR: got"):
        calibrate(np.arange(100.0), target)


@pytest.mark.parametrize("entropies", [np.empty(0), np.array([1.0, np.nan])])
def test_a_sample_that_cannot_be_ranked_is_refused(entropies: np.ndarray) -> None:  # type: ignore[type-arg]
    with pytest.raises(StripwireError, match="calibration"):
        calibrate(entropies, 0.5)


@pytest.mark.parametrize("threshold", [-0.1, float("inf"), float("nan")])
def test_a_threshold_that_is_no_entropy_is_refused(threshold: float) -> None:
    with pytest.raises(InputError, match="threshold: got"):
        fixed_threshold(np.arange(100.0), threshold)


def test_the_normal_threshold_is_the_fitted_quantile() -> None:
    entropies = np.random.default_rng(0).normal(3.0, 0.5, 500).astype(np.float32)
    calibration = normal_threshold(entropies, 0.01)
    mean, deviation = stats.norm.fit(entropies.astype(np.float64))
    assert calibration.threshold_bits == pytest.approx(stats.norm.ppf(0.01, mean, deviation), abs=1e-6)
    assert (calibration.method, calibration.target_frr, calibration.images) == ("normal", 0.01, 500)
    rejected = stats.binomtest(int(np.count_nonzero(entropies <= calibration.threshold_bits)), 500).proportion_ci()
    assert (calibration.frr_low, calibration.frr_high) == pytest.approx((rejected.low, rejected.high))
    assert "only if clean entropies are normally distributed" in calibration.note


def test_the_normal_threshold_does_not_keep_its_target_on_skewed_entropies() -> None:
    generator = np.random.default_rng(2)
    fresh = np.sort(5.0 - generator.exponential(1.0, 100_000).clip(0.0, 5.0))
    calibration = normal_threshold(5.0 - generator.exponential(1.0, 2000).clip(0.0, 5.0), 0.01)
    frr = np.searchsorted(fresh, calibration.threshold_bits) / len(fresh)
    assert frr > 0.025  # asked for one percent
    assert calibration.frr_low <= frr <= calibration.frr_high  # but the range says so


def test_a_normal_threshold_at_or_under_zero_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"at -0\.\d+ bits, expected a positive one"):
        normal_threshold(np.array([0.1, 0.2, 1.5, 0.05]), 0.01)


def test_a_normal_distribution_of_one_value_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no two different entropies"):
        normal_threshold(np.full(20, 1.5), 0.05)


@pytest.mark.parametrize(
    ("rule", "threshold", "method", "least"),
    [
        (ThresholdRule(target_frr=0.1), 2.0, "quantile", 9),
        (ThresholdRule("quantile", 0.1), 2.0, "quantile", 9),
        (ThresholdRule("normal", 0.1), 3.1102, "normal", 2),
        (ThresholdRule(threshold_bits=3.5), 3.5, "fixed", 2),
        (ThresholdRule("fixed", threshold_bits=3.5), 3.5, "fixed", 2),
    ],
)
def test_a_rule_chooses_by_its_method(rule: ThresholdRule, threshold: float, method: str, least: int) -> None:
    calibration = rule.calibrate(np.arange(1.0, 21.0)[:, None])
    assert calibration.threshold_bits == pytest.approx(threshold, abs=1e-3)
    assert (calibration.method, rule.least_images) == (method, least)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("median",), "calibration method: got 'median'"),
        (("fixed",), "got fixed with threshold None, expected a threshold with fixed"),
        (("quantile", 0.05, 1.0), "got quantile with threshold 1.0"),
        (("normal", 0.05, 1.0), "got normal with threshold 1.0"),
        (("quantile", 0.0), "target FRR: got 0.0"),
        (("fixed", 0.05, -1.0), "threshold: got -1.0"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(values: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ThresholdRule(*values)


def test_consensus_needs_an_image_for_each_of_its_thresholds() -> None:
    entropies, nlls = np.arange(1.0, 40.0), np.arange(39.0)
    calibration = calibrate(entropies, 0.05, nlls, detector="consensus")
    assert (calibration.threshold_bits, calibration.threshold_nll) == (1.0, 38.0)
    assert calibration.rejects(np.array([1.0, 1.1, 1.1]), np.array([0.0, 38.0, 37.9])).tolist() == [True, True, False]
    with pytest.raises(CalibrationError, match="38 clean calibration images, expected at least 39 images for it with"):
        calibrate(entropies[1:], 0.05, nlls[1:], detector="consensus")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"detector": "luck"}, "detector: got 'luck', expected one of strip, consensus"),
        ({"detector": "consensus", "method": "normal"}, "detector: got consensus with calibration method normal"),
        ({"detector": "consensus", "threshold_bits": 0.5}, "detector: got consensus with a threshold"),
    ],
)
def test_a_detector_that_cannot_be_calibrated_so_is_refused(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ThresholdRule(**rule)
