"""The threshold: order statistics by hand, its promise by simulation, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from detector.calibration import Calibration, ThresholdRule, calibrate, fixed_threshold, normal_threshold
from detector.errors import CalibrationError, InputError, StripwireError
from detector.scores import Evidence, Thresholds
from detector.statistics import frr_range


def by_strip(entropies: NDArray[np.float64], target_frr: float) -> Calibration:
    """Calibrate on mean entropies, (images,)."""
    return calibrate(Evidence(entropies), target_frr)


def test_the_threshold_is_the_order_statistic_by_hand() -> None:
    calibration = by_strip(np.arange(1.0, 100.0), 0.05)  # 99 entropies: rank 5 of 100
    assert calibration.threshold_bits == 5.0
    assert calibration.calibration_frr == pytest.approx(5 / 99)
    assert calibration.images == 99


def test_nineteen_images_are_the_fewest_for_five_percent() -> None:
    assert by_strip(np.arange(1.0, 20.0), 0.05).threshold_bits == 1.0
    with pytest.raises(CalibrationError, match="18 clean calibration images, expected at least 19"):
        by_strip(np.arange(1.0, 19.0), 0.05)


def test_further_clean_inputs_are_rejected_at_the_target_rate_on_average() -> None:
    generator = np.random.default_rng(0)
    rates = [stats.norm.cdf(by_strip(generator.normal(0, 1, 60), 0.1).threshold_bits) for _ in range(4000)]
    assert np.mean(rates) <= 0.1 + 3 * np.std(rates) / np.sqrt(4000)
    assert np.mean(rates) == pytest.approx(6 / 61, abs=3 * np.std(rates) / np.sqrt(4000))


def test_the_range_of_the_false_rejection_rate_holds_nineteen_times_in_twenty() -> None:
    generator = np.random.default_rng(1)
    calibrations = [by_strip(generator.normal(0, 1, 200), 0.05) for _ in range(2000)]
    inside = [c.frr_low <= stats.norm.cdf(c.threshold_bits) <= c.frr_high for c in calibrations]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)


def test_ties_that_would_break_the_promise_are_refused() -> None:
    with pytest.raises(CalibrationError, match="30 of 100 calibration images"):
        by_strip(np.concatenate([np.zeros(30), np.arange(1.0, 71.0)]), 0.05)


def test_a_given_threshold_reports_what_clean_images_say_of_it() -> None:
    calibration = fixed_threshold(np.arange(1.0, 101.0), 7.5)
    assert (calibration.threshold_bits, calibration.calibration_frr, calibration.target_frr) == (7.5, 0.07, None)
    # Clopper-Pearson for 7 of 100, from published tables.
    assert calibration.frr_low == pytest.approx(0.0286, abs=1e-4)
    assert calibration.frr_high == pytest.approx(0.1389, abs=1e-4)


@pytest.mark.parametrize("target", [0.0, 1.0, -0.1, float("nan")])
def test_a_target_that_is_no_rate_is_refused(target: float) -> None:
    with pytest.raises(InputError, match="target FRR: got"):
        by_strip(np.arange(100.0), target)


@pytest.mark.parametrize("entropies", [np.empty(0), np.array([1.0, np.nan])])
def test_a_sample_that_cannot_be_ranked_is_refused(entropies: np.ndarray) -> None:  # type: ignore[type-arg]
    with pytest.raises(StripwireError, match="calibration"):
        by_strip(entropies, 0.5)


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


@pytest.mark.parametrize(
    "rule", [ThresholdRule(target_frr=0.1), ThresholdRule("normal"), ThresholdRule(threshold_bits=7)]
)
def test_the_histogram_of_clean_scores_has_a_bound_at_the_threshold(rule: ThresholdRule) -> None:
    scores = np.random.default_rng(0).gamma(20.0, 0.5, 300)
    calibration = rule.calibrate(scores[:, None])
    histogram = calibration.histogram
    assert calibration.threshold_bits in histogram.bounds_bits
    assert list(histogram.bounds_bits) == sorted(set(histogram.bounds_bits))
    assert list(histogram.counts) == [np.count_nonzero(scores <= bound) for bound in histogram.bounds_bits]
    assert histogram.counts[-1] == histogram.images == 300
    assert calibration.to_json()["histogram"]["counts"] == histogram.counts


def test_entropies_and_nll_need_an_image_each() -> None:
    images = Evidence(np.arange(1.0, 40.0), np.arange(41.0, 80.0), np.arange(39.0))
    calibration = calibrate(images, 0.05)
    # Two of 39: the first by its nll, the second by the median of its entropies.
    assert calibration.thresholds == Thresholds(1.0, None, 38.0)
    new = Evidence(np.array([1.0, 1.1, 1.1]), np.zeros(3), np.array([0.0, 38.0, 37.9]))
    assert calibration.thresholds.reject(new).tolist() == [True, True, False]
    fewer = Evidence(*(part[1:] for part in vars(images).values()))
    with pytest.raises(CalibrationError, match="38 clean calibration images, expected at least 39 images for it with"):
        calibrate(fewer, 0.05)


def test_with_more_images_the_entropy_of_the_input_as_it_came_has_a_threshold_too() -> None:
    calibration = calibrate(Evidence(np.arange(1.0, 60.0), np.arange(101.0, 160.0)[::-1], np.arange(59.0)), 0.05)
    # Image 58 by its nll, 0 by its entropies, 57 by that of the image as it came, for which 58 comes before.
    assert calibration.thresholds == Thresholds(1.0, 102.0, 58.0)


@pytest.mark.parametrize("with_nlls", [False, True])
def test_a_score_of_which_too_many_images_have_the_lowest_rejects_nothing(with_nlls: bool) -> None:
    nlls = np.arange(99.0) if with_nlls else None
    images = Evidence(np.arange(1.0, 100.0), np.concatenate([np.zeros(30), np.arange(1.0, 70.0)]), nlls)
    calibration = calibrate(images, 0.05)
    # Of five turns, those of the confidence take an image each, and reject it only if another score does.
    assert calibration.thresholds == (Thresholds(1.0, None, 96.0) if with_nlls else Thresholds(5.0))
    rejected = 4 if with_nlls else 5
    assert calibration.calibration_frr == rejected / 99
    assert calibration.note.startswith("4 of the 5 calibration images that the target FRR") == with_nlls
    assert calibration.frr_low == frr_range(rejected, 99)[0]
    assert calibration.frr_high == frr_range(5, 99)[1]
    assert len(calibration.regions.thresholds) == (3 if with_nlls else 2)  # as the server expects of consensus
    assert by_strip(np.arange(1.0, 100.0), 0.05).note == ""


def test_a_repaired_network_that_believes_nearly_everything_costs_the_others_nothing() -> None:
    nlls = np.concatenate([np.arange(1.0, 3.0), np.zeros(97)])
    calibration = calibrate(Evidence(np.arange(1.0, 100.0)[::-1], np.arange(1.0, 100.0)[::-1] * 2, nlls), 0.1)
    assert calibration.thresholds.nll is not None
    assert 0.0 < calibration.thresholds.nll < 1e-40  # any doubt at all, and no image of which there is none
    assert calibration.thresholds.plain_bits is not None
    assert calibration.thresholds.bits >= 2.0


def test_where_ties_forbid_some_rejections_the_others_are_kept_and_it_is_noted() -> None:
    calibration = by_strip(np.concatenate([np.arange(2.0), np.full(30, 2.0), np.arange(3.0, 70.0)]), 0.05)
    assert 1.0 < calibration.threshold_bits < 2.0
    assert calibration.calibration_frr == 2 / 99
    assert calibration.note.startswith("2 of the 5 calibration images that the target FRR allows are rejected")


@pytest.mark.parametrize("atom", [0.0, 0.01, 0.03, 0.2])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_ties_make_further_rejections_rarer_or_at_most_a_tenth_more_frequent(atom: float, rows: int) -> None:
    generator = np.random.default_rng(0)
    rates: list[float] = []
    for _ in range(1500):
        scores = generator.random((rows, 99 + 100))
        scores[-2:, :][generator.random(scores[-2:, :].shape) < atom] = 0.0
        scores[rows == 3 and 2 :, :] *= -1 if rows == 3 else 1
        known, new = (Evidence(*part) for part in (scores[:, :99], scores[:, 99:]))
        try:
            rates.append(float(np.mean(calibrate(known, 0.1).thresholds.reject(new))))
        except CalibrationError:
            rates.append(0.0)  # nothing is served
    tolerance = 4 * np.std(rates) / np.sqrt(len(rates))
    assert np.mean(rates) <= (0.1 if atom == 0.0 else 0.11) + tolerance
    assert np.mean(rates) > 0.02 or atom == 0.2


@pytest.mark.parametrize("target", [0.05, 0.2])
def test_what_the_blends_show_at_their_share_is_found_whatever_else_is_worth_nothing(target: float) -> None:
    generator = np.random.default_rng(1)
    bits, plain_bits = generator.gamma(2.0, 1.0, 399), generator.gamma(2.0, 1.0, 399)
    calibration = calibrate(Evidence(bits, plain_bits, generator.gamma(0.2, 0.5, 399)), target)
    alone = by_strip(bits, target / 4)
    # The repair failed: the networks agree on trojaned inputs, and the attacker hid the confidence.
    trojaned = generator.gamma(0.5, 1.0, 1000)
    found = calibration.thresholds.reject(Evidence(trojaned, np.full(1000, 9.0), np.zeros(1000)))
    assert found.mean() > 0.02
    assert (found >= alone.thresholds.reject(Evidence(trojaned))).all()


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
