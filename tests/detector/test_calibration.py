"""The threshold: order statistics by hand, its promise by simulation, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from detector.calibration import calibrate, fixed_threshold
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
