"""What detectors compare with their thresholds."""

from __future__ import annotations

import numpy as np
import pytest

from detector.scores import DETECTORS, score_bits
from tests.detector import reference


def test_the_median_forgives_overlays_that_hide_the_trigger_and_the_mean_does_not() -> None:
    entropies = np.array([[0.001, 3.0, 0.002, 2.0], [0.3, 0.1, 0.2, 9.0]], np.float32)
    np.testing.assert_array_equal(score_bits(entropies, "consensus"), np.array([0.002, 0.2], np.float32))
    np.testing.assert_allclose(score_bits(entropies, "strip"), [1.25075, 2.4])


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_the_median_is_one_of_the_entropies(count: int) -> None:
    entropies = np.random.default_rng(count).gamma(0.1, 1.0, (50, count)).astype(np.float32)
    expected = [reference.lower_median(row) for row in entropies]
    np.testing.assert_array_equal(score_bits(entropies, "consensus"), np.array(expected, np.float32))


@pytest.mark.parametrize("detector", DETECTORS)
def test_only_the_blends_that_ran_count(detector: str) -> None:
    entropies = np.random.default_rng(0).gamma(1.0, 1.0, (6, 5)).astype(np.float32)
    ran = np.array([5, 2, 3, 2, 1, 5], np.int32)
    expected = [score_bits(row[None, :count], detector)[0] for row, count in zip(entropies, ran, strict=True)]
    found = score_bits(np.where(np.arange(5) < ran[:, None], entropies, np.nan), detector, ran)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float32


@pytest.mark.parametrize("detector", DETECTORS)
def test_one_entropy_that_is_not_a_number_is_enough_for_the_score_to_be_none(detector: str) -> None:
    scores = score_bits(np.array([[0.1, np.nan, 0.2], [0.1, 0.2, 0.2]], np.float32), detector)
    assert np.isnan(scores).tolist() == [True, False]
