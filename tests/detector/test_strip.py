"""STRIP's maths against a float64 reference and cases worked by hand."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detector.errors import InputError
from detector.strip import entropy_bits, guarded_labels, is_trojaned, perturb, weighted_overlays
from tests.detector import reference


def as_numpy(array: Any) -> Any:
    return array.get() if hasattr(array, "get") else np.asarray(array)


def test_a_blend_is_the_weighted_mean_by_hand(xp: ModuleType) -> None:
    image = xp.asarray(np.full((1, 1, 1, 1), 100, dtype=np.uint8))
    overlays = xp.asarray(np.array([0, 255], dtype=np.uint8).reshape(2, 1, 1, 1))
    blended = perturb(image, weighted_overlays(overlays, 0.7, xp=xp), 0.7, xp=xp)
    np.testing.assert_allclose(as_numpy(blended).ravel(), [70.0, 146.5], rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.7])
def test_perturbations_match_the_float64_reference(xp: ModuleType, alpha: float) -> None:
    generator = np.random.default_rng(1)
    images = generator.integers(0, 256, (3, 5, 4, 2), dtype=np.uint8)
    overlays = generator.integers(0, 256, (4, 5, 4, 2), dtype=np.uint8)
    blended = as_numpy(perturb(xp.asarray(images), weighted_overlays(xp.asarray(overlays), alpha, xp=xp), alpha, xp=xp))
    assert blended.shape == (3, 4, 5, 4, 2)
    assert blended.dtype == np.float32
    for index, image in enumerate(images):
        for number, overlay in enumerate(overlays):
            np.testing.assert_allclose(blended[index, number], reference.blend(image, overlay, alpha), atol=1e-4)


def test_entropy_by_hand_is_in_bits_over_classes_averaged_over_perturbations(xp: ModuleType) -> None:
    certain, undecided = [1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]
    half = [0.5, 0.5, 0.0, 0.0]
    probabilities = xp.asarray(np.array([[certain, certain], [undecided, undecided], [half, certain]], np.float32))
    np.testing.assert_allclose(as_numpy(entropy_bits(probabilities, xp=xp)), [0.0, 2.0, 0.5], atol=1e-6)


def test_entropy_over_the_wrong_axis_would_reverse_this_order(xp: ModuleType) -> None:
    always_the_same = np.tile(np.eye(4, dtype=np.float32)[0], (4, 1))  # a trigger wins every blend
    each_its_own = np.eye(4, dtype=np.float32) * 0.7 + 0.075  # a clean input follows the overlay
    entropy = as_numpy(entropy_bits(xp.asarray(np.stack([always_the_same, each_its_own])), xp=xp))
    assert entropy[0] < entropy[1]


@given(
    batch=st.integers(1, 4),
    perturbations=st.integers(1, 12),
    classes=st.integers(2, 50),
    seed=st.integers(0, 2**32 - 1),
)
def test_entropy_matches_the_float64_reference(batch: int, perturbations: int, classes: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, generator.uniform(0.1, 30), (batch, perturbations, classes))
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities = (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)
    expected = [reference.entropy_bits(rows) for rows in probabilities]
    np.testing.assert_allclose(entropy_bits(probabilities), expected, atol=1e-5)


def test_an_entropy_at_the_threshold_is_rejected(xp: ModuleType) -> None:
    verdicts = is_trojaned(xp.asarray(np.array([0.49, 0.5, 0.51], np.float32)), 0.5, xp=xp)
    assert as_numpy(verdicts).tolist() == [True, True, False]


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_an_entropy_that_is_not_finite_is_rejected(xp: ModuleType, broken: float) -> None:
    assert as_numpy(is_trojaned(xp.asarray(np.array([broken], np.float32)), 0.5, xp=xp)).tolist() == [True]


@pytest.mark.parametrize("broken", [np.nan, -0.5])
def test_what_is_no_probability_makes_an_input_rejected(xp: ModuleType, broken: float) -> None:
    entropy = entropy_bits(xp.asarray(np.array([[[broken, 0.5, 0.5]]], np.float32)), xp=xp)
    assert as_numpy(is_trojaned(entropy, 0.0, xp=xp)).tolist() == [True]


def test_a_blocked_input_gets_one_past_the_last_class(xp: ModuleType) -> None:
    probabilities = xp.asarray(np.array([[0.1, 0.9, 0.0], [0.8, 0.1, 0.1]], np.float32))
    trojaned = xp.asarray(np.array([True, False]))
    assert as_numpy(guarded_labels(probabilities, trojaned, block=True, xp=xp)).tolist() == [3, 0]
    assert as_numpy(guarded_labels(probabilities, trojaned, block=False, xp=xp)).tolist() == [1, 0]


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, float("nan")])
def test_an_alpha_that_is_no_blend_is_refused(alpha: float) -> None:
    with pytest.raises(InputError, match="alpha: got"):
        weighted_overlays(np.zeros((1, 2, 2, 3), np.uint8), alpha)


@pytest.mark.parametrize(
    "overlays", [np.zeros((2, 2, 3), np.uint8), np.zeros((0, 2, 2, 3), np.uint8), np.zeros((1, 2, 2, 3))]
)
def test_overlays_that_are_no_images_are_refused(overlays: Any) -> None:
    with pytest.raises(InputError, match="overlays: got"):
        weighted_overlays(overlays, 0.5)
