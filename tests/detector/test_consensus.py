"""What the repaired network makes of the sentinel's label."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from detector.consensus import LEAST_BITS, geometric_mean_bits, is_disputed, negative_log_likelihood


def test_the_geometric_mean_forgives_a_few_overlays_that_hide_the_trigger() -> None:
    got = geometric_mean_bits(np.array([[0.001, 0.001, 1.0], [0.0, 0.5, 2.0]], np.float32))
    np.testing.assert_allclose(got, [0.01, LEAST_BITS ** (1 / 3)], rtol=1e-5)
    assert got.dtype == np.float32
    assert np.isnan(geometric_mean_bits(np.array([[np.nan, 1.0]]))).all()


def test_entropies_that_are_next_to_nothing_are_still_told_apart() -> None:
    got = geometric_mean_bits(np.array([[1e-20, 1e-20], [1e-30, 1e-30], [0.0, 0.0]], np.float32))
    np.testing.assert_allclose(got, [1e-20, 1e-30, LEAST_BITS], rtol=2e-5)


def test_the_geometric_mean_runs_on_any_namespace(xp: ModuleType) -> None:
    got = geometric_mean_bits(xp.asarray([[0.25, 1.0]], dtype=xp.float32), xp=xp)
    np.testing.assert_allclose(np.asarray(got), [0.5], rtol=1e-6)


def test_the_nll_is_minus_the_logarithm_of_the_probability_of_the_label() -> None:
    repaired = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], np.float32)
    got = negative_log_likelihood(repaired, np.array([1, 2], np.int32))
    np.testing.assert_allclose(got, [np.log(4.0), -np.log(0.7)], rtol=1e-6)
    assert got.dtype == np.float32


def test_no_probability_at_all_is_finite_and_what_is_broken_is_not() -> None:
    repaired = np.array([[0.0, 1.0], [np.nan, 1.0], [-0.1, 1.1]], np.float32)
    got = negative_log_likelihood(repaired, np.zeros(3, np.int32))
    assert 87 < got[0] < 88
    assert np.isnan(got[1:]).all()
    assert is_disputed(got, 100.0).tolist() == [False, True, True]
    assert is_disputed(np.array([1.0, 1.1], np.float32), 1.0625).tolist() == [False, True]
