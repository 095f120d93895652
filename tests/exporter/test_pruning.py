"""What is pruned, by weight and by activation, in any kind of convolution."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from detector.errors import InputError
from exporter.architectures import convnet, deepid, resnet
from exporter.preprocessing import Preprocessing
from exporter.pruning import Pruning, channel_activations, magnitude_mask

RAW = Preprocessing("raw")


def test_the_criterion_by_hand_is_signed_and_per_kernel() -> None:
    kernel = np.array([-1.0, -0.9, -0.8, -0.1, 0.0, 0.1, 0.5, 1.0])  # range 2: 5 % reaches up to -0.9
    assert magnitude_mask(kernel, 0.05).tolist() == [False, False, True, True, True, True, True, True]
    assert magnitude_mask(kernel, 0.55).tolist() == [False, False, False, False, False, False, True, True]


def test_every_kernel_of_every_convolution_is_pruned() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.Conv2D(4, 3, name="plain"),
            layers.DepthwiseConv2D(3, name="depthwise"),
            layers.SeparableConv2D(5, 3, name="separable"),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    pruning = Pruning(model)
    assert len(pruning.kernels) == 4
    before = [kernel.numpy() for kernel in pruning.kernels]
    pruning.by_magnitude(0.4)
    for kernel, values in zip(pruning.kernels, before, strict=True):
        np.testing.assert_array_equal(kernel.numpy(), values * magnitude_mask(values, 0.4))
    assert 0.2 < pruning.share < 0.6


@pytest.mark.parametrize(
    ("build", "expected"),
    [(deepid, ["conv_4"]), (convnet, ["conv_3_2"]), (resnet, ["conv_3_2", "conv_3_2_bn"])],
)
def test_the_last_convolution_is_the_one_farthest_from_the_input(build: type, expected: list[str]) -> None:
    assert [layer.name for layer in Pruning(build(7)).last_convolution] == expected


def test_a_channels_activation_is_the_mean_over_images_and_positions() -> None:
    model = keras.Sequential([keras.Input((2, 2, 1)), layers.Conv2D(2, 1, activation="relu", name="conv")])
    model.get_layer("conv").set_weights([np.array([[[[1.0, -1.0]]]]), np.array([0.0, 10.0])])
    images = np.array([[1, 2, 3, 4], [5, 6, 7, 20]], np.uint8).reshape(2, 2, 2, 1)
    found = channel_activations(model, model.get_layer("conv"), images, RAW)
    assert found.tolist() == [48 / 8, (9 + 8 + 7 + 6 + 5 + 4 + 3 + 0) / 8]


@pytest.mark.parametrize("build", [deepid, convnet, resnet])
def test_dormant_channels_go_first_become_silent_and_come_back(build: type) -> None:
    keras.utils.set_random_seed(0)
    model = build(7)
    images = np.random.default_rng(0).integers(0, 256, (30, *model.input_shape[1:]), dtype=np.uint8)
    before = [weight.copy() for weight in model.get_weights()]
    pruning = Pruning(model)
    last = pruning.last_convolution[-1]
    activations = channel_activations(model, last, images, Preprocessing())
    prune = pruning.by_activation(images, Preprocessing())
    prune(20)
    features = keras.Model(model.inputs[0], last.output).predict_on_batch(Preprocessing().apply(images))
    silent = np.abs(features).max(axis=(0, 1, 2)) == 0
    assert set(np.argsort(activations)[:20]) <= set(np.flatnonzero(silent))
    prune(0)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def normalised(**options: bool) -> keras.Model:
    keras.utils.set_random_seed(0)
    tail = [layers.BatchNormalization(name="norm", **options), layers.ReLU(name="relu"), layers.Flatten()]
    model = keras.Sequential([keras.Input((6, 5, 3)), layers.Conv2D(8, 3, name="conv"), *tail, layers.Dense(2)])
    norm = model.get_layer("norm")
    norm.moving_mean.assign(np.linspace(-2, 2, 8))
    return keras.Model(model.inputs, model.outputs[0])


@pytest.mark.parametrize("options", [{}, {"scale": False}, {"scale": False, "center": False}])
def test_a_pruned_channel_is_silent_behind_any_normalisation(options: dict[str, bool]) -> None:
    model = normalised(**options)
    images = np.random.default_rng(0).integers(0, 256, (30, 6, 5, 3), dtype=np.uint8)
    pruning = Pruning(model)
    pruning.by_activation(images, Preprocessing())(8)
    last = keras.Model(model.inputs[0], model.get_layer("relu").output)
    assert not last.predict_on_batch(Preprocessing().apply(images)).any()


def test_a_normalisation_of_another_axis_is_left_alone() -> None:
    model = keras.Sequential(
        [keras.Input((6, 5, 3)), layers.Conv2D(8, 3, name="conv"), layers.BatchNormalization(axis=1), layers.Flatten()]
    )
    model.add(layers.Dense(2))
    pruning = Pruning(keras.Model(model.inputs, model.outputs[0]))
    assert [layer.name for layer in pruning.last_convolution] == ["conv"]


def test_channels_that_cannot_be_silenced_are_refused() -> None:
    model = keras.Sequential([keras.Input((6, 5, 3)), layers.Conv2D(8, 3, activation="softplus", name="conv")])
    model.add(layers.Flatten())
    model.add(layers.Dense(2))
    with pytest.raises(InputError, match=r"got activation softplus behind the last convolution \(layer 'conv'\)"):
        _ = Pruning(keras.Model(model.inputs, model.outputs[0])).last_convolution


def test_there_are_no_channels_to_prune_without_a_convolution() -> None:
    dense = keras.Sequential([keras.Input((8, 7, 3)), layers.Flatten(), layers.Dense(2)])
    with pytest.raises(InputError, match=r"without a convolution that makes channels.*use another --repair"):
        _ = Pruning(keras.Model(dense.inputs, dense.outputs[0])).last_convolution
