"""P-values from clean scores: nested regions by hand, their promise by simulation, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from detector.calibration import SHARES, calibrate
from detector.conformal import Regions, peel
from detector.errors import CalibrationError, InputError
from detector.scores import Evidence

Array = np.ndarray[Any, Any]


def test_one_score_gives_the_textbook_p_value() -> None:
    regions = peel(np.array([[3.0, 1.0, 2.0, 4.0]]))
    assert regions.thresholds.tolist() == [[1.0, 2.0, 3.0, 4.0]]
    got = regions.p_value(np.array([[0.5, 1.0, 1.5, 4.0, 4.5]]))
    np.testing.assert_allclose(got, [0.2, 0.2, 0.4, 0.8, 1.0])
    assert got.dtype == np.float32


def test_two_scores_are_peeled_in_turns_by_hand() -> None:
    regions = peel(np.array([[1.0, 2.0, 3.0, 4.0], [-0.1, -5.0, -4.0, -0.2]]), (0.5, 0.5))
    # Image 0 by the first, 1 by the second, then of images 2 and 3 image 2 by the first, 3 by the second.
    assert regions.thresholds.tolist() == [[1.0, 1.0, 3.0, 3.0], [-np.inf, -5.0, -5.0, -0.2]]
    np.testing.assert_allclose(regions.p_value(np.array([[9.0, 9.0, 0.9], [-6.0, -4.9, 0.0]])), [0.4, 0.8, 0.2])


@settings(deadline=None)
@given(
    images=st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9), st.floats(0, 9)), min_size=1, max_size=30),
    new=st.tuples(st.floats(0, 9), st.floats(0, 9), st.floats(0, 9)),
    parts=st.sampled_from([(1, 1, 1), (1, 1, 2), (3, 1, 1), (1, 0, 1)]),
)
def test_the_p_value_is_that_of_peeling_image_by_image(
    images: list[tuple[float, ...]], new: tuple[float, ...], parts: tuple[int, ...]
) -> None:
    if any(len(set(row)) < len(images) for row in zip(*images, strict=True)):
        return  # ties, which the test below is about
    left, had, expected = list(images), [0, 0, 0], 1.0
    for count in range(1, len(images) + 1):
        behind = [part * count - sum(parts) * turns for part, turns in zip(parts, had, strict=True)]
        turn = behind.index(max(behind))
        had[turn] += 1
        peeled = min(left, key=lambda image: image[turn])
        left.remove(peeled)
        if new[turn] <= peeled[turn]:
            expected = count / (len(images) + 1)
            break
    got = peel(np.array(images).T, [part / sum(parts) for part in parts]).p_value(np.array(new)[:, None])
    assert got[0] == pytest.approx(expected, abs=1e-7)
    assert float(got[0]) <= expected


def turns_of(regions: Regions) -> NDArray[np.bool_]:
    """Return by which score each region was peeled, (scores, regions)."""
    before = np.concatenate([np.full((len(regions.thresholds), 1), -np.inf), regions.thresholds[:, :-1]], axis=1)
    return np.asarray(regions.thresholds > before)


@pytest.mark.parametrize("shares", [*SHARES.values(), (0.2, 0.7, 0.1), (0.5, 0.0, 0.5)])
def test_every_score_gets_its_share_of_the_regions(shares: tuple[float, ...]) -> None:
    turns = turns_of(peel(np.random.default_rng(0).normal(size=(len(shares), 400)), shares))
    assert (turns.sum(axis=0) == 1).all()
    assert (np.abs(np.cumsum(turns, axis=1) - np.multiply.outer(shares, np.arange(1, 401))) < 1).all()


def test_the_nll_comes_first_and_the_entropies_of_the_blends_next() -> None:
    turns = turns_of(peel(np.random.default_rng(0).normal(size=(3, 400)), SHARES[3])).argmax(axis=0)
    assert turns[:8].tolist() == [2, 0, 1, 2, 2, 0, 1, 2]


@pytest.mark.parametrize("dependence", [-0.45, 0.0, 0.9])
def test_a_further_clean_input_is_in_a_region_as_often_as_promised(dependence: float) -> None:
    generator = np.random.default_rng(1)
    covariance = np.full((3, 3), dependence) + (1.0 - dependence) * np.eye(3)
    rejected, p_values = [], []
    for _ in range(300):
        scores = generator.multivariate_normal([9.0, 9.0, 0.0], covariance, 99 + 200).T
        calibration = calibrate(evidence(scores[:, :99]), 0.1)
        assert calibration.threshold_nll is not None
        new = evidence(scores[:, 99:])
        rejected.append(np.mean(calibration.thresholds.reject(new)))
        p_values.append(calibration.regions.p_value(new.scores()))
    assert np.mean(rejected) == pytest.approx(0.1, abs=4 * np.std(rejected) / np.sqrt(300))
    for level in (0.02, 0.05, 0.5):
        assert np.mean(np.concatenate(p_values) <= level) == pytest.approx(level, abs=0.02)


def evidence(scores: Array) -> Evidence:
    """Return evidence of one to three scores, (scores, images)."""
    rows: list[Array | None] = [*scores, None, None][:3]
    assert rows[0] is not None
    return Evidence(rows[0], rows[1], None if rows[2] is None else -rows[2])


tied = st.shared(st.integers(1, 40), key="images").flatmap(
    lambda images: arrays(
        np.float64, st.tuples(st.integers(1, 3), st.just(images)), elements=st.integers(0, 12).map(float)
    )
)


@settings(deadline=None)
@given(scores=tied)
def test_no_more_images_are_in_a_region_than_were_peeled(scores: Array) -> None:
    regions = peel(scores, SHARES[len(scores)])
    assert regions.is_whole()
    p_values = regions.p_value(scores).astype(float)
    for p_value in p_values[p_values < 1.0]:
        assert np.count_nonzero(p_values <= p_value) <= round(p_value * (scores.shape[1] + 1))


@settings(deadline=None)
@given(scores=tied, target=st.sampled_from([0.05, 0.1, 0.25, 0.5]))
def test_verdict_and_p_value_agree(scores: Array, target: float) -> None:
    try:
        calibration = calibrate(evidence(scores), target)
    except CalibrationError:
        return  # too few images, or all alike
    assert np.mean(calibration.thresholds.reject(evidence(scores))) == pytest.approx(calibration.calibration_frr)
    new = np.random.default_rng(0).uniform(0, 13, (len(scores), 60)).round().astype(np.float32)
    p_values = [float(p_value) for p_value in calibration.regions.p_value(new)]
    rejected = calibration.thresholds.reject(evidence(new)).tolist()
    assert rejected == [p_value <= target for p_value in p_values]


def test_what_cannot_be_compared_is_as_suspicious_as_can_be() -> None:
    regions = peel(np.array([np.arange(1.0, 5.0), -np.arange(4.0)]), (0.5, 0.5))
    np.testing.assert_allclose(regions.p_value(np.array([[np.nan, np.inf], [0.0, 0.0]])), [0.2, 0.2])
    assert regions.p_value(np.array([[9.0], [np.nan]]))[0] == pytest.approx(0.4)


@pytest.mark.parametrize("shares", [(1.0,), (0.5, 0.6), (1.5, -0.5), (0.3, 0.3, 0.4)])
def test_shares_that_make_no_sense_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="shares: got"):
        peel(np.ones((2, 3)), shares)


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CalibrationError, match="1 of 2 clean images have a score that is not finite"):
        peel(np.array([[1.0, 1.0], [1.0, np.nan]]), (0.5, 0.5))
