"""Distillation: what is taught, how it is compared, and that a backdoor goes."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest

from exporter.distillation import distillation_loss, taught_by
from exporter.keras_files import load_model
from exporter.preprocessing import Preprocessing
from exporter.repair import RepairOptions, repair_network
from exporter.training import score
from samples.hdf5 import read_hdf5
from samples.types import Samples
from tests.networks import small_network

UNIT = Preprocessing()


def some_images(model: keras.Model, count: int = 40) -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(0).integers(0, 256, (count, *model.input_shape[1:]), dtype=np.uint8)


def test_the_teacher_sees_all_of_what_the_copy_sees_in_part() -> None:
    model = small_network()
    images = some_images(model)
    inputs, answers = taught_by(model, UNIT)(Samples(images, np.zeros(40, np.int64)), np.random.default_rng(0))
    assert inputs.shape == images.shape
    assert 0 <= inputs.min() <= inputs.max() <= 1
    assert answers.shape == (40, 5)
    np.testing.assert_allclose(answers.sum(axis=1), 1, atol=1e-5)
    assert np.abs(answers - model.predict_on_batch(inputs)).max() > 1e-3


def test_the_loss_is_a_cross_entropy_at_temperature_two() -> None:
    answers, found = np.array([[0.9, 0.1, 0.0]]), np.array([[0.5, 0.3, 0.2]])
    flat = [rows**0.5 / (rows**0.5).sum(axis=1, keepdims=True) for rows in (np.maximum(answers, 1e-7), found)]
    expected = -4 * (flat[0] * np.log(flat[1])).sum(axis=1)
    loss = np.asarray(distillation_loss(answers.astype(np.float32), found.astype(np.float32)))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_backdoor_goes_and_the_people_stay(badnet: Path) -> None:
    clean = read_hdf5(badnet / "clean_validation_data.h5")
    order = np.random.default_rng(0).permutation(len(clean))
    model = load_model(badnet / "bd_net.keras")
    options = RepairOptions(method="distill", epochs=15, allowed_drop=0.1)
    repair = repair_network(
        model, clean.take(order[:380]), clean.take(order[380:]), preprocessing=UNIT, options=options
    )
    trojaned = read_hdf5(badnet / "sunglasses_poisoned_data.h5")
    assert score(model, trojaned, UNIT).rate > 0.9
    assert score(repair.model, trojaned, UNIT).rate < 0.1
    test = read_hdf5(badnet / "clean_test_data.h5")
    assert score(repair.model, test, UNIT).rate > score(model, test, UNIT).rate - 0.15


def test_what_never_comes_within_the_budget_is_not_kept(badnet: Path) -> None:
    clean = read_hdf5(badnet / "clean_validation_data.h5").take(np.arange(60) * 8)
    model = load_model(badnet / "bd_net.keras")
    options = RepairOptions(
        method="distill", epochs=1, allowed_drop=0.0, optimizer="sgd", learning_rate=0.9, batch_size=2
    )
    repair = repair_network(model, clean, clean, preprocessing=UNIT, options=options)
    assert repair.steps[-1].clean_accuracy < 0.9
    assert repair.kept in ("as received", "bounded")
    kept = next(step for step in repair.steps if step.name == repair.kept)
    assert score(repair.model, clean, UNIT).rate == pytest.approx(kept.clean_accuracy)
