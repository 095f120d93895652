"""What the repaired network makes of the sentinel's label."""

from __future__ import annotations

import numpy as np

from detector.consensus import is_disputed, negative_log_likelihood


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
