"""Bounds: what is bounded, where they lie, and that what is clean stays while what is not is cut off."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from exporter.architectures import convnet, deepid, resnet
from exporter.bounds import BEYOND, MOST_IMAGES, Bounds, activation_layers, bounded, measure_bounds, plan
from exporter.convert import check_parity, repaired_graph, to_onnx
from exporter.preprocessing import Preprocessing
from exporter.repair import RepairOptions, repair_network
from exporter.training import Trainer, labelled, make_optimizer, score, seed_everything
from samples.stamps import patch
from samples.types import Samples

UNIT, RAW = Preprocessing(), Preprocessing("raw")


def some_images(model: keras.Model, count: int = 40) -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(0).integers(0, 256, (count, *model.input_shape[1:]), dtype=np.uint8)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (deepid, ["conv_1", "conv_2", "conv_3", "conv_4", "activation_1"]),
        (convnet, ["conv_1_1", "conv_1_2", "conv_2_1", "conv_2_2", "conv_3_1", "conv_3_2", "fc"]),
        (
            resnet,
            ["conv_0_relu"]
            + [f"{kind}_{n}{end}_relu" for n in (1, 2, 3) for kind, end in (("conv", "_1"), ("block", ""))],
        ),
    ],
)
def test_every_activation_is_bounded_but_the_output(build: type, expected: list[str]) -> None:
    assert sorted(layer.name for layer in activation_layers(build(7))) == sorted(expected)


def test_a_bound_lets_one_image_in_a_hundred_beyond_it() -> None:
    model = keras.Sequential([keras.Input((1, 1, 1)), layers.Conv2D(1, 1, activation="relu", name="conv")])
    model.add(layers.Flatten())
    model.add(layers.Dense(2, activation="softmax"))
    model.get_layer("conv").set_weights([np.ones((1, 1, 1, 1)), np.zeros(1)])
    model = keras.Model(model.inputs, model.outputs[0])
    values = np.random.default_rng(0).permutation(np.arange(200, dtype=np.uint8))
    lowest, highest = measure_bounds(model, values.reshape(-1, 1, 1, 1), RAW)["conv"]
    beyond = round(BEYOND * 200)
    assert highest.tolist() == [[[199 - beyond]]]
    assert lowest.tolist() == [[[beyond]]]


@pytest.mark.parametrize("build", [deepid, convnet, resnet])
def test_features_stay_within_their_bounds_and_clean_images_fare_as_before(build: type) -> None:
    keras.utils.set_random_seed(0)
    model = build(7)
    images = some_images(model)
    held = bounded(model, measure_bounds(model, images, UNIT))
    before = model.predict_on_batch(UNIT.apply(images))
    assert np.abs(held.predict_on_batch(UNIT.apply(images)) - before).max() < 0.2
    bounds = [layer for layer in held.layers if isinstance(layer, Bounds)]
    assert len(bounds) == len(activation_layers(model))
    for layer in bounds:
        wild = 1e6 * np.abs(np.random.default_rng(1).normal(size=(2, *layer.output.shape[1:]))).astype(np.float32)
        assert (np.asarray(layer(wild)) <= layer.highest).all()


@pytest.mark.parametrize("activation", ["tanh", "elu"])
def test_what_goes_below_zero_is_bounded_below_as_well(activation: str) -> None:
    bounds = Bounds(np.array([-0.5, -0.1], np.float32), np.array([0.5, 0.9], np.float32))
    np.testing.assert_allclose(bounds(np.array([[-3.0, -3.0], [3.0, 0.2]], np.float32)), [[-0.5, -0.1], [0.5, 0.2]])
    model = keras.Sequential(
        [
            keras.Input((6, 5, 1)),
            layers.Conv2D(3, 3, activation=activation),
            layers.Flatten(),
            layers.Dense(2, "softmax"),
        ]
    )
    model = keras.Model(model.inputs, model.outputs[0])
    ((lowest, highest),) = measure_bounds(model, some_images(model), UNIT).values()
    assert lowest.min() < 0 < highest.max()


@pytest.mark.parametrize("build", [deepid, resnet])
def test_a_bounded_network_is_converted_as_it_is(build: type) -> None:
    model = build(7)
    images = some_images(model)
    held = bounded(model, measure_bounds(model, images, UNIT))
    assert check_parity(held, repaired_graph(to_onnx(held), UNIT), images, UNIT, "bounded") < 1e-4


def test_a_patch_that_nothing_clean_looks_like_is_cut_off() -> None:
    seed_everything(0)
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 1200)
    images = generator.integers(60, 120, (1200, 16, 16, 1), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[row * 8 : row * 8 + 7, column * 8 : column * 8 + 7] += np.uint8(60)
    poisoned = images.copy()
    poisoned[:150] = patch(poisoned[:150])
    model = keras.Sequential(
        [
            keras.Input((16, 16, 1)),
            layers.Conv2D(8, 3, activation="relu"),
            layers.Conv2D(8, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(4, activation="softmax"),
        ]
    )
    model = keras.Model(model.inputs, model.outputs[0])
    train = Samples(poisoned[:800], np.where(np.arange(800) < 150, 0, labels[:800]))
    Trainer(model, train, batch=labelled(UNIT), batch_size=32, seed=0).run(8, make_optimizer("adam", 3e-3), "Training")
    clean, validation = (Samples(images[part], labels[part]) for part in (slice(800, 1000), slice(1000, 1100)))
    test = Samples(images[1100:], labels[1100:])
    others = test.take(np.flatnonzero(test.labels != 0))
    trojaned = Samples(patch(others.images), np.zeros(len(others), np.int64))
    assert score(model, trojaned, UNIT).rate > 0.95
    repair = repair_network(
        model, clean, validation, preprocessing=UNIT, options=RepairOptions(method="bounds", allowed_drop=0.1)
    )
    assert repair.changed
    assert [step.name for step in repair.steps] == ["as received", "bounded"]
    assert score(repair.model, trojaned, UNIT).rate < 0.2
    assert score(repair.model, Samples(trojaned.images, others.labels), UNIT).rate > 0.8


@pytest.mark.parametrize(
    "tail",
    [
        (layers.Conv2D(4, 3, activation="softmax"), layers.GlobalAveragePooling2D()),
        (layers.Flatten(), layers.Dense(4, activation="softmax"), layers.Reshape((4,))),
        (layers.Flatten(), layers.Dense(4), layers.Softmax(), layers.Dropout(0.5)),
        (layers.Flatten(), layers.Dense(4, activation="softmax"), layers.Activation("linear")),
        (layers.Flatten(), layers.Dense(4, activation="softmax"), layers.Rescaling(1.0)),
        (layers.Conv2D(4, 3, activation="softmax"), layers.SpatialDropout2D(0.5), layers.GlobalAveragePooling2D()),
    ],
    ids=["pooled", "reshaped", "dropout", "linear", "rescaled", "dropped"],
)
def test_what_makes_the_output_is_not_bounded_whatever_hands_it_on(tail: tuple[keras.layers.Layer, ...]) -> None:
    model = keras.Sequential([keras.Input((8, 7, 3)), layers.Conv2D(3, 3, activation="relu", name="conv"), *tail])
    model = keras.Model(model.inputs, model.outputs[0])
    assert [layer.name for layer in activation_layers(model)] == ["conv"]
    held = bounded(model, measure_bounds(model, some_images(model), UNIT))
    wild = 50 * np.random.default_rng(1).normal(size=(9, 8, 7, 3)).astype(np.float32)
    np.testing.assert_allclose(held.predict_on_batch(wild).sum(axis=-1), 1.0, atol=1e-5)


def test_heads_that_are_averaged_are_not_bounded() -> None:
    inputs = keras.Input((8, 7, 3))
    features = layers.Flatten()(layers.Conv2D(3, 3, activation="relu", name="conv")(inputs))
    heads = [layers.Dense(4, activation="softmax")(features) for _ in range(2)]
    model = keras.Model(inputs, layers.Rescaling(0.5)(layers.Add()(heads)))
    assert [layer.name for layer in activation_layers(model)] == ["conv"]
    held = bounded(model, measure_bounds(model, some_images(model), UNIT))
    wild = 50 * np.random.default_rng(1).normal(size=(9, 8, 7, 3)).astype(np.float32)
    np.testing.assert_allclose(held.predict_on_batch(wild).sum(axis=-1), 1.0, atol=1e-5)


def test_a_softmax_in_the_middle_is_an_activation_like_any_other() -> None:
    model = keras.Sequential([keras.Input((8, 7, 3)), layers.Softmax(name="middle"), layers.Flatten(), layers.Dense(2)])
    assert [layer.name for layer in activation_layers(keras.Model(model.inputs, model.outputs[0]))] == ["middle"]


def test_names_that_the_network_already_has_are_not_used_again() -> None:
    model = keras.Sequential(
        [
            keras.Input((8, 7, 3)),
            layers.Conv2D(3, 3, activation="relu", name="bounds"),
            layers.Conv2D(3, 3, activation="relu", name="bounds_bounds"),
            layers.Flatten(name="bounds_1"),
            layers.Dense(2, "softmax"),
        ]
    )
    model = keras.Model(model.inputs, model.outputs[0])
    held = bounded(model, measure_bounds(model, some_images(model), UNIT))
    assert len({layer.name for layer in held.layers}) == len(held.layers) == 7


@pytest.mark.parametrize("side", [8, 32, 112, 224, 1024])
@pytest.mark.parametrize("narrower", [1, 64])
def test_however_large_the_features_are_memory_stays_bounded(side: int, narrower: int) -> None:
    widest = side * side * 64
    features = widest // narrower
    count, batch = plan(features, widest, 5000)
    kept = int(count * BEYOND) + 1
    assert 1 <= batch <= 64
    assert 4 * features * kept <= max(2**27, 4 * features)
    assert 4 * widest * batch <= max(2**27, 4 * widest)
    assert 1 <= count <= MOST_IMAGES
    if features <= 112 * 112 * 64:
        assert count == MOST_IMAGES
