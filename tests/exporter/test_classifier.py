"""Whatever a classifier ends in, probabilities come out, or it is refused by name."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from detector.errors import ModelRefusedError
from exporter.classifier import with_probabilities
from exporter.preprocessing import Preprocessing

UNIT = Preprocessing()


def network(*tail: keras.layers.Layer) -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((6, 5, 3)), *tail])


def test_a_softmax_is_left_as_it_is() -> None:
    model = network(layers.Flatten(), layers.Dense(4, activation="softmax"))
    assert with_probabilities(model, UNIT) == (model, "probabilities")


@pytest.mark.parametrize(
    "tail",
    [
        (layers.Flatten(), layers.Dense(4)),
        (layers.Conv2D(4, 1), layers.GlobalAveragePooling2D()),
        (layers.Flatten(), layers.Dense(4), layers.Activation("linear")),
    ],
    ids=["dense", "pooled", "linear"],
)
def test_logits_get_a_softmax(tail: tuple[keras.layers.Layer, ...]) -> None:
    model = network(*tail)
    wrapped, outputs = with_probabilities(model, UNIT)
    assert outputs == "logits"
    images = np.random.default_rng(0).uniform(size=(7, 6, 5, 3)).astype(np.float32)
    logits = model.predict_on_batch(images).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(wrapped.predict_on_batch(images), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("last", "named"),
    [
        (layers.Dense(4, activation="sigmoid", name="scores"), r"ends in sigmoid \(layer 'scores'\)"),
        (layers.Dense(4, activation="tanh"), "ends in tanh"),
        (layers.Dense(4, activation="relu"), "ends in relu"),
        (layers.ReLU(), "ends in relu"),
        (layers.LeakyReLU(), "ends in leakyrelu"),
    ],
)
def test_scores_that_are_no_logits_are_refused_by_name(last: keras.layers.Layer, named: str) -> None:
    with pytest.raises(ModelRefusedError, match=f"the network {named}.*expected a softmax over the classes"):
        with_probabilities(network(layers.Flatten(), layers.Dense(4), last), UNIT)


@pytest.mark.parametrize(
    "tail",
    [
        (layers.Conv2D(4, 1, activation="sigmoid", name="scores"), layers.GlobalAveragePooling2D()),
        (layers.Flatten(), layers.Dense(4, activation="sigmoid", name="scores"), layers.Dropout(0.5)),
        (layers.Flatten(), layers.Dense(4, activation="sigmoid", name="scores"), layers.Reshape((4,))),
        (layers.Flatten(), layers.Dense(4, activation="sigmoid", name="scores"), layers.Activation("linear")),
        (layers.Flatten(), layers.Dense(4, activation="sigmoid", name="scores"), layers.Rescaling(3.0)),
        (layers.Flatten(), layers.Dense(4, activation="sigmoid", name="scores"), layers.BatchNormalization()),
    ],
    ids=["pooled", "dropout", "reshaped", "linear", "rescaled", "normalised"],
)
def test_squashed_scores_are_refused_whatever_hands_them_on(tail: tuple[keras.layers.Layer, ...]) -> None:
    with pytest.raises(ModelRefusedError, match=r"the network ends in sigmoid \(layer 'scores'\)"):
        with_probabilities(network(*tail), UNIT)


@pytest.mark.parametrize("last", [layers.Dropout(0.5), layers.Activation("linear"), layers.Rescaling(2.0)])
def test_relus_are_refused_whatever_hands_them_on(last: keras.layers.Layer) -> None:
    with pytest.raises(ModelRefusedError, match=r"the network ends in relu \(layer 'scores'\)"):
        with_probabilities(network(layers.Flatten(), layers.Dense(4, activation="relu", name="scores"), last), UNIT)


@pytest.mark.parametrize("join", [layers.Add(), layers.Concatenate()])
def test_one_squashed_part_of_the_output_is_enough_to_refuse_it(join: keras.layers.Layer) -> None:
    inputs = keras.Input((6, 5, 3))
    flat = layers.Flatten()(inputs)
    parts = [layers.Dense(4)(flat), layers.Dense(4, activation="sigmoid", name="scores")(flat)]
    with pytest.raises(ModelRefusedError, match=r"the network ends in sigmoid \(layer 'scores'\)"):
        with_probabilities(keras.Model(inputs, join(parts)), UNIT)


def test_pooled_relus_may_be_logits() -> None:
    model = network(layers.Conv2D(4, 1, activation="relu"), layers.GlobalAveragePooling2D())
    assert with_probabilities(model, UNIT)[1] == "logits"


def test_a_name_that_the_network_already_has_is_not_used_again() -> None:
    model = network(layers.Flatten(), layers.Dense(4, name="stripwire_softmax"))
    wrapped, _ = with_probabilities(model, UNIT)
    assert wrapped.layers[-1].name == "stripwire_softmax_1"


def test_outputs_that_are_not_finite_are_refused() -> None:
    model = network(layers.Flatten(), layers.Dense(4))
    model.set_weights([np.full_like(weight, np.inf) for weight in model.get_weights()])
    with pytest.raises(ModelRefusedError, match="outputs on noise are not finite, expected probabilities or logits"):
        with_probabilities(model, UNIT)
