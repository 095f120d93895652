"""P-values from clean scores: nested regions by hand, their promise by simulation, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from detector.calibration import calibrate
from detector.conformal import peel
from detector.errors import CalibrationError, InputError

Array = np.ndarray[Any, Any]


def test_one_score_gives_the_textbook_p_value() -> None:
    regions = peel(np.array([3.0, 1.0, 2.0, 4.0]))
    assert regions.entropies_bits.tolist() == [1.0, 2.0, 3.0, 4.0]
    got = regions.p_value(np.array([0.5, 1.0, 1.5, 4.0, 4.5]))
    np.testing.assert_allclose(got, [0.2, 0.2, 0.4, 0.8, 1.0])
    assert got.dtype == np.float32


def test_two_scores_are_peeled_in_turns_by_hand() -> None:
    entropies, nlls = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.1, 5.0, 4.0, 0.2])
    regions = peel(entropies, nlls, 0.5)
    # Image 0 by entropy, 1 by nll, then of images 2 and 3 image 2 by entropy, 3 by nll.
    assert regions.entropies_bits.tolist() == [1.0, 1.0, 3.0, 3.0]
    assert regions.nlls.tolist() == [np.inf, 5.0, 5.0, 0.2]
    np.testing.assert_allclose(regions.p_value(np.array([9.0, 9.0, 0.9]), np.array([6.0, 4.9, 0.0])), [0.4, 0.8, 0.2])


@settings(deadline=None)
@given(
    pairs=st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)), min_size=1, max_size=30),
    new=st.tuples(st.floats(0, 9), st.floats(0, 9)),
    share=st.sampled_from([0.3, 0.5, 0.8]),
)
def test_the_p_value_is_that_of_peeling_image_by_image(
    pairs: list[tuple[float, float]], new: tuple[float, float], share: float
) -> None:
    entropies, nlls = np.array(pairs).T
    if len(set(entropies)) < len(pairs) or len(set(nlls)) < len(pairs):
        return  # ties, which the test below is about
    left, turn, expected = list(pairs), 0, 1.0
    while left:
        with_strip = math.ceil(share * (turn + 1) - 1e-9) > math.ceil(share * turn - 1e-9)
        peeled = min(left, key=lambda pair: pair[0]) if with_strip else max(left, key=lambda pair: pair[1])
        left.remove(peeled)
        turn += 1
        if new[0] <= peeled[0] if with_strip else new[1] >= peeled[1]:
            expected = turn / (len(pairs) + 1)
            break
    got = peel(entropies, nlls, share).p_value(np.array([new[0]]), np.array([new[1]]))
    assert got[0] == np.float32(expected)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_strip_gets_its_share_of_the_regions_and_the_first_of_them(share: float) -> None:
    generator = np.random.default_rng(0)
    regions = peel(generator.normal(size=400), generator.normal(size=400), share)
    by_entropy = np.diff(regions.entropies_bits, prepend=-np.inf) > 0
    assert by_entropy[0]
    assert (np.abs(np.cumsum(by_entropy) - share * np.arange(1, 401)) < 1).all()


@pytest.mark.parametrize("dependence", [-0.9, 0.0, 0.9])
def test_a_further_clean_input_is_in_a_region_as_often_as_promised(dependence: float) -> None:
    generator = np.random.default_rng(1)
    covariance = [[1.0, dependence], [dependence, 1.0]]
    rejected, p_values = [], []
    for _ in range(300):
        scores = generator.multivariate_normal([0.0, 0.0], covariance, 99 + 200)
        calibration = calibrate(scores[:99, 0], 0.1, scores[:99, 1])
        assert calibration.threshold_nll is not None
        new = scores[99:]
        rejected.append(np.mean((new[:, 0] <= calibration.threshold_bits) | (new[:, 1] >= calibration.threshold_nll)))
        p_values.append(calibration.regions.p_value(new[:, 0], new[:, 1]))
    assert np.mean(rejected) == pytest.approx(0.1, abs=4 * np.std(rejected) / np.sqrt(300))
    for level in (0.02, 0.05, 0.5):
        assert np.mean(np.concatenate(p_values) <= level) == pytest.approx(level, abs=0.02)


scores = arrays(np.float64, st.shared(st.integers(1, 40), key="images"), elements=st.integers(0, 12).map(float))


@settings(deadline=None)
@given(entropies=scores, nlls=scores, share=st.sampled_from([0.3, 0.5, 0.8]))
def test_a_p_value_is_the_share_of_clean_images_in_the_region(entropies: Array, nlls: Array, share: float) -> None:
    regions = peel(entropies, nlls, share)
    assert regions.is_whole()
    p_values = regions.p_value(entropies, nlls)
    # Whatever ties there are: no more than this share of the images is at least as suspicious.
    for p_value in p_values:
        assert np.count_nonzero(p_values <= p_value) <= round(p_value * (len(entropies) + 1))


@settings(deadline=None)
@given(entropies=scores, nlls=scores, target=st.sampled_from([0.1, 0.25, 0.5]), consensus=st.booleans())
def test_verdict_and_p_value_agree(entropies: Array, nlls: Array, target: float, consensus: bool) -> None:
    try:
        calibration = calibrate(entropies, target, nlls if consensus else None)
    except CalibrationError:
        return  # too few images, or ties
    new_entropies, new_nlls = np.linspace(-1, 13, 57), np.tile(np.linspace(13, -1, 19), 3)
    rejected = new_entropies <= calibration.threshold_bits
    if calibration.threshold_nll is not None:
        rejected |= new_nlls >= calibration.threshold_nll
    p_values = calibration.regions.p_value(new_entropies, new_nlls if consensus else None)
    np.testing.assert_array_equal(rejected, p_values <= np.float32(target))


def test_what_cannot_be_compared_is_as_suspicious_as_can_be() -> None:
    regions = peel(np.arange(1.0, 5.0), np.arange(4.0), 0.5)
    np.testing.assert_allclose(regions.p_value(np.array([np.nan, np.inf]), np.zeros(2)), [0.2, 0.2])
    assert regions.p_value(np.array([9.0]), np.array([np.nan]))[0] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("nlls", "share", "message"),
    [(None, 0.5, "STRIP's share"), (np.ones(3), 1.0, "STRIP's share"), (np.ones(3), 0.0, "STRIP's share")],
)
def test_a_share_that_makes_no_sense_is_refused(nlls: Array | None, share: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        peel(np.ones(3), nlls, share)


def test_scores_that_are_not_finite_are_refused_by_name() -> None:
    with pytest.raises(CalibrationError, match="1 of 2 clean images have an nll that is not finite"):
        peel(np.ones(2), np.array([1.0, np.nan]), 0.5)
