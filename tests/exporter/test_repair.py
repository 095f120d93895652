"""Every repair: criteria by hand, masks that hold, stopping, and the seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from detector.errors import DataError, InputError
from detector.statistics import Proportion
from exporter.keras_files import load_model
from exporter.options import check_used
from exporter.preprocessing import Preprocessing
from exporter.repair import Repair, RepairOptions, check_repairable, repair_network
from exporter.training import HeldRate, Trainer, predict_labels, score
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
    assert names[-1].startswith("epoch 1")
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


def never_given(seed: int = 0) -> tuple[keras.Model, Samples, Samples]:
    """Return a network, what it answers rightly, and attack samples of a class that it never gives."""
    model = small_network()
    images = np.random.default_rng(seed).integers(0, 256, (40, 8, 7, 3), dtype=np.uint8)
    labels = predict_labels(model, images, Preprocessing())
    return model, Samples(images, labels), Samples(images, (labels + 1) % 5)


def test_attack_samples_are_measured_and_end_the_repair_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clean, attack = never_given()
    fooled_as_it_came = Proportion(len(attack), len(attack))
    monkeypatch.setattr(
        "exporter.repair.score", lambda network, *rest: fooled_as_it_came if network is model else score(network, *rest)
    )
    for stop in (True, False):
        options = RepairOptions(method="magnitude", max_rounds=3, epochs=0, allowed_drop=0.99, stop_on_attack=stop)
        repair = repair_network(model, clean, clean, preprocessing=Preprocessing(), options=options, attack=attack)
        assert repair.stopped == ("attack success fell under 1%" if stop else "all 3 rounds were run")
        assert len(repair.steps) == (2 if stop else 4)
        assert repair.steps[-1].attack_success is not None


def test_samples_that_fool_nobody_cannot_end_a_repair() -> None:
    model, clean, attack = never_given()
    options = RepairOptions(method="finetune", epochs=2, allowed_drop=0.99)
    assert repair_network(
        model, clean, clean, preprocessing=Preprocessing(), options=options, attack=attack
    ).changed  # where they only measure, anything goes
    options = replace(options, stop_on_attack=True)
    with pytest.raises(DataError, match=r"stop on attack: got attack samples of which 0\.0 %.*cannot tell whether"):
        repair_network(model, clean, clean, preprocessing=Preprocessing(), options=options, attack=attack)
    with pytest.raises(InputError, match="stop on attack: got no attack samples"):
        repair_network(model, clean, clean, preprocessing=Preprocessing(), options=options)


def taught_with(monkeypatch: pytest.MonkeyPatch, accuracies: list[float], options: RepairOptions) -> Repair:
    """Repair a network whose clean accuracy is 1 as it came, and as listed after each epoch; no attack works then."""
    model, clean, attack = never_given()
    after_epochs, taught = iter(accuracies), False
    run = Trainer.run

    def measured(network: keras.Model, samples: Samples, _: Preprocessing) -> Proportion:
        if samples is not clean:
            return Proportion(len(samples) if network is model else 0, len(samples))
        return Proportion(round(40 * next(after_epochs)), 40) if taught else Proportion(40, 40)

    def running(self: Trainer, *arguments: Any, **named: Any) -> None:
        nonlocal taught
        taught = True
        run(self, *arguments, **named)

    monkeypatch.setattr("exporter.repair.score", measured)
    monkeypatch.setattr(Trainer, "run", running)
    return repair_network(model, clean, clean, preprocessing=Preprocessing(), options=options, attack=attack)


def test_a_step_that_costs_too_much_does_not_end_the_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    options = RepairOptions(method="finetune", epochs=3, allowed_drop=0.2, stop_on_attack=True)
    repair = taught_with(monkeypatch, [0.5, 0.9, 0.9], options)
    assert [step.name for step in repair.steps] == ["as received", "epoch 1, taken back", "epoch 2"]
    assert repair.kept == "epoch 2"
    assert repair.stopped == "attack success fell under 1%"


def test_an_epoch_that_costs_too_much_is_taken_back_and_gentler_ones_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []

    def gentler(_: HeldRate, share: float) -> None:
        shares.append(share)

    monkeypatch.setattr(HeldRate, "share", property(lambda _: shares[-1] if shares else 1.0, gentler))
    options = RepairOptions(method="finetune", epochs=20, allowed_drop=0.2)
    repair = taught_with(monkeypatch, [0.5, 0.9, 0.5, 0.5, 0.8, 0.5, 0.5], options)
    taken_back = [step.name.endswith("taken back") for step in repair.steps]
    assert taken_back == [False, True, False, True, True, False, True, True]
    assert shares == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32]
    assert repair.kept == "epoch 5"
    assert repair.stopped == "epoch 7 cost too much accuracy even at 6% of the rate"


def test_an_epoch_that_costs_less_than_twice_what_is_allowed_may_be_made_good(monkeypatch: pytest.MonkeyPatch) -> None:
    options = RepairOptions(method="finetune", epochs=3, allowed_drop=0.2)
    repair = taught_with(monkeypatch, [0.7, 0.9, 0.7], options)
    assert [step.name for step in repair.steps] == ["as received", "epoch 1", "epoch 2", "epoch 3"]
    assert repair.kept == "epoch 2"
    assert repair.stopped == "all 3 epochs were run"


def test_what_is_taken_back_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    one = RepairOptions(method="finetune", epochs=1, allowed_drop=0.2)
    repair = taught_with(monkeypatch, [0.5], one)
    assert not repair.changed
    model = never_given()[0]
    for old, new in zip(model.get_weights(), repair.model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_rate_is_what_is_left_of_it() -> None:
    rate = HeldRate(0.1, 100)
    assert float(rate(50)) == pytest.approx(0.1)
    rate.share = 0.25
    assert float(rate(50)) == pytest.approx(0.025)
    assert rate.share == 0.25


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
    with pytest.raises(InputError, match="without a convolution"):
        check_repairable(keras.Model(dense.inputs, dense.outputs[0]), "magnitude")


@pytest.mark.parametrize("method", ["bounds", "distill"])
def test_a_network_without_activations_is_refused_where_they_are_bounded(method: str) -> None:
    linear = keras.Sequential([keras.Input((8, 7, 3)), keras.layers.Flatten(), keras.layers.Dense(2, "softmax")])
    with pytest.raises(InputError, match="without an activation function before its output, expected one to bound"):
        check_repairable(keras.Model(linear.inputs, linear.outputs[0]), method)


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
        ("learning_rate", 1.0),
        ("optimizer", "rmsprop"),
        ("batch_size", 0),
        ("seed", -1),
    ],
)
def test_an_option_that_makes_no_sense_is_named(option: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"got {value!r}, expected"):
        RepairOptions(**{option: value})


@pytest.mark.parametrize("method", ["distill", "finetune"])
def test_no_epochs_at_all_leave_nothing_to_do(method: str) -> None:
    with pytest.raises(InputError, match=f"epochs: got 0 with --repair {method}, expected at least 1; or say"):
        RepairOptions(method=method, epochs=0)


@pytest.mark.parametrize(
    ("option", "method", "using"),
    [
        ("max_rounds", "finetune", "expected magnitude; leave it out"),
        ("augment", "distill", "expected magnitude, activation, finetune; leave it out"),
        ("epochs", "bounds", "expected distill, magnitude, activation, finetune; leave it out"),
        ("stop_on_attack", "distill", "expected magnitude, activation, finetune; leave it out"),
    ],
)
def test_an_option_that_a_repair_does_not_use_is_refused(option: str, method: str, using: str) -> None:
    named = option.replace("_", " ")
    with pytest.raises(InputError, match=f"{named}: got it with --repair {method}, which does not use it, {using}"):
        check_used(option, method)
