"""Detectors are judged by thresholds that clean calibration images alone set."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.detection.cases import TARGETS
from benchmarks.detection.detectors import CALIBRATION, CLEAN, alone, judge_evidence, rejects
from detector.calibration import SHARES, calibrate
from detector.conformal import peel
from detector.scores import Evidence

GENERATOR = np.random.default_rng(0)


def spread(count: int) -> NDArray[np.float64]:
    return GENERATOR.gamma(2.0, 1.0, count)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scores", [1, 2, 3])
def test_thresholds_are_those_of_the_detector(target: float, scores: int) -> None:
    known = Evidence(*(spread(1999) for _ in range(scores)))
    judged = Evidence(*(spread(5000) * factor for factor in (0.1, 0.1, 2.0)[:scores]))
    calibration = calibrate(known, target)
    found = rejects(peel(known.scores(), SHARES[scores]), target, judged.scores())
    assert 0 < found.sum() < 5000
    np.testing.assert_array_equal(found, calibration.thresholds.reject(judged))


def test_far_counts_trojaned_images_over_the_threshold_and_frr_clean_ones_under_it() -> None:
    calibration = np.arange(1.0, 100.0)  # of 99, the first is the threshold for 1 %, the fifth the one for 5 %
    scores = {CALIBRATION: calibration, CLEAN: np.array([1.0, 4.0, 6.0, 9.0]), "patch": np.array([0.5, 1.0, 5.0, 5.5])}
    found = judge_evidence(alone(scores))["patch"]
    assert found["at_0.001"] is None  # takes 999 images
    assert (found["at_0.01"]["far"]["successes"], found["at_0.01"]["frr"]["successes"]) == (2, 1)
    assert (found["at_0.05"]["far"]["successes"], found["at_0.05"]["frr"]["successes"]) == (1, 2)
    assert found["at_0.05"]["far"]["count"] == 4
    # Of the 16 pairs, trojaned below clean: 4 + 3.5 + 2 + 2.
    assert found["auroc"] == pytest.approx(11.5 / 16)


def test_a_threshold_that_a_detector_comes_with_is_used_as_it_is() -> None:
    scores = {CALIBRATION: np.ones(20), CLEAN: np.array([0.4, 0.6]), "patch": np.array([0.5, 0.1, 0.7])}
    found = judge_evidence(alone(scores), at=0.5, calibrated=False)["patch"]
    assert set(found) == {"auroc", "fixed"}
    assert (found["fixed"]["far"]["successes"], found["fixed"]["frr"]["successes"]) == (1, 1)


def test_ties_that_leave_no_threshold_reject_nothing() -> None:
    ties = np.concatenate([np.zeros(10), np.ones(89)])
    scores = {CALIBRATION: ties, CLEAN: np.zeros(5), "patch": np.zeros(5)}
    found = judge_evidence(alone(scores))["patch"]
    assert found["at_0.05"]["far"]["rate"] == 1.0
    assert found["at_0.05"]["frr"]["rate"] == 0.0
    assert found["auroc"] == 0.5


def test_consensus_needs_twice_as_many_images() -> None:
    scores = {CALIBRATION: spread(150), CLEAN: spread(5), "patch": spread(5)}
    assert judge_evidence(alone(scores))["patch"]["at_0.01"] is not None
    found = judge_evidence({name: Evidence(part, part, part) for name, part in scores.items()})["patch"]
    assert found["at_0.01"] is None
    assert found["at_0.05"] is not None
