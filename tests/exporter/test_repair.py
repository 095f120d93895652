"""Every repair: criteria by hand, masks that hold, stopping, and the seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from detector.errors import DataError, InputError
from exporter.keras_files import load_model
from exporter.preprocessing import Preprocessing
from exporter.repair import RepairOptions, repair_network
from exporter.training import predict_labels
from samples.hdf5 import read_hdf5
from samples.types import Samples
from tests.networks import small_network


@pytest.fixture(scope="module")
def faces(badnet: Path) -> tuple[keras.Model, Samples, Samples, Samples]:
    clean = read_hdf5(badnet / "clean_validation_data.h5")
    order = np.random.default_rng(0).permutation(len(clean))
    trojaned = read_hdf5(badnet / "sunglasses_poisoned_data.h5")
    return load_model(badnet / "bd_net.keras"), clean.take(order[:300]), clean.take(order[300:]), trojaned


def test_pruned_weights_stay_zero_through_fine_tuning(faces: tuple[keras.Model, Samples, Samples, Samples]) -> None:
    model, clean, validation, _ = faces
    options = RepairOptions(method="magnitude", max_rounds=2, epochs=1, allowed_drop=0.9)
    repair = repair_network(model, clean, validation, preprocessing=Preprocessing(), options=options)
    assert [step.name for step in repair.steps] == ["as received", "round 1", "round 2", "epoch 1"]
    assert repair.kept == "epoch 1"
    shares = [step.pruned_share for step in repair.steps]
    assert shares[0] == 0.0
    assert 0.0 < shares[1] <= shares[2] == shares[3]
    for name in ("conv_1", "conv_2", "conv_3", "conv_4"):
        before, after = model.get_layer(name).kernel.numpy(), repair.model.get_layer(name).kernel.numpy()
        assert np.all(after[before == before.min()] == 0.0)  # the most negative weight goes first
        assert not np.array_equal(before, after)


METHODS = ("distill", "magnitude", "activation", "finetune")


@pytest.mark.parametrize("method", METHODS)
def test_the_network_that_came_is_not_changed(
    faces: tuple[keras.Model, Samples, Samples, Samples], method: str
) -> None:
    model, clean, validation = faces[0], faces[1].take(np.arange(100)), faces[2].take(np.arange(20))
    before = [array.copy() for array in model.get_weights()]
    repair_network(
        model,
        clean,
        validation,
        preprocessing=Preprocessing(),
        options=RepairOptions(method=method, max_rounds=1, epochs=1),
    )
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_network(
    faces: tuple[keras.Model, Samples, Samples, Samples], method: str
) -> None:
    model, clean, validation = faces[0], faces[1].take(np.arange(100)), faces[2].take(np.arange(20))

    def repaired(seed: int) -> list[Any]:
        options = RepairOptions(method=method, max_rounds=1, epochs=1, allowed_drop=0.9, seed=seed)
        return list(
            repair_network(model, clean, validation, preprocessing=Preprocessing(), options=options).model.get_weights()
        )

    first, second, other = repaired(1), repaired(1), repaired(2)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_dormant_channels_are_pruned_while_accuracy_allows_it_and_stay_silent(
    faces: tuple[keras.Model, Samples, Samples, Samples],
) -> None:
    model, clean, validation, _ = faces
    options = RepairOptions(method="activation", epochs=1, allowed_drop=0.01)
    repair = repair_network(model, clean, validation, preprocessing=Preprocessing(), options=options)
    names = [step.name for step in repair.steps]
    assert names[:3] == ["as received", "4 of 80 channels pruned", "8 of 80 channels pruned"]
    assert names[-1] == "epoch 1"
    pruned = [step for step in repair.steps if step.name.endswith("pruned")]
    within = [step for step in pruned if step.clean_accuracy >= repair.steps[0].clean_accuracy - options.allowed_drop]
    assert within == pruned[: len(within)]
    assert len(pruned) - len(within) <= 1
    kernel = repair.model.get_layer("conv_4").kernel.numpy()
    assert np.count_nonzero(np.abs(kernel).max(axis=(0, 1, 2)) == 0) == 4 * len(within)


def test_it_keeps_the_last_network_inside_the_budget(faces: tuple[keras.Model, Samples, Samples, Samples]) -> None:
    model, clean, validation, _ = faces
    options = RepairOptions(method="magnitude", max_rounds=20, epochs=0, augment="none", allowed_drop=0.02)
    repair = repair_network(model, clean, validation, preprocessing=Preprocessing(), options=options)
    accuracies = {step.name: step.clean_accuracy for step in repair.steps}
    budget = accuracies["as received"] - 0.02
    assert accuracies[repair.kept] >= budget
    assert repair.steps[-1].clean_accuracy < budget
    assert "lost more than 2.0%" in repair.stopped
    kept_accuracy = np.mean(predict_labels(repair.model, validation.images, Preprocessing()) == validation.labels)
    assert kept_accuracy == pytest.approx(accuracies[repair.kept])


def test_with_attack_samples_it_stops_when_the_attack_fails() -> None:
    model = small_network()
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (40, 8, 7, 3), dtype=np.uint8)
    labels = predict_labels(model, images, Preprocessing())
    clean = Samples(images, labels)
    attack = Samples(images, (labels + 1) % 5)  # a class that the network never gives
    options = RepairOptions(method="magnitude", max_rounds=5, allowed_drop=0.99)
    repair = repair_network(model, clean, clean, preprocessing=Preprocessing(), options=options, attack=attack)
    assert repair.stopped == "attack success fell under 1%"
    assert repair.steps[-1].attack_success == 0.0


def test_no_repair_returns_the_network_as_it_came() -> None:
    model = small_network()
    images = np.zeros((3, 8, 7, 3), np.uint8)
    nothing = Samples(images[:0], np.empty(0, np.int64))
    some = Samples(images, np.zeros(3, np.int64))
    repair = repair_network(model, nothing, some, preprocessing=Preprocessing(), options=RepairOptions(method="none"))
    assert repair.kept == "as received"
    assert not repair.changed
    for old, new in zip(model.get_weights(), repair.model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_without_images_to_learn_from_it_is_refused() -> None:
    nothing = Samples(np.empty((0, 8, 7, 3), np.uint8), np.empty(0, np.int64))
    with pytest.raises(DataError, match="repair split: got no images"):
        repair_network(small_network(), nothing, nothing, preprocessing=Preprocessing(), options=RepairOptions())


def test_a_network_without_convolutions_is_refused() -> None:
    dense = keras.Sequential([keras.Input((8, 7, 3)), keras.layers.Flatten(), keras.layers.Dense(2, "softmax")])
    some = Samples(np.zeros((3, 8, 7, 3), np.uint8), np.zeros(3, np.int64))
    with pytest.raises(InputError, match="without a convolution"):
        repair_network(dense, some, some, preprocessing=Preprocessing(), options=RepairOptions(method="magnitude"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("method", "bleach"),
        ("augment", "mixup"),
        ("max_rounds", 0),
        ("max_rounds", 21),
        ("epochs", -1),
        ("allowed_drop", 1.0),
        ("allowed_drop", -0.1),
        ("learning_rate", 0.0),
        ("batch_size", 0),
    ],
)
def test_an_option_that_makes_no_sense_is_named(option: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"got {value!r}, expected"):
        RepairOptions(**{option: value})
