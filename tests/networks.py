"""Small untrained networks for tests that are about plumbing."""

from __future__ import annotations

import math
from pathlib import Path

import keras
import numpy as np
from numpy.typing import NDArray

from detector.calibration import fixed_threshold
from exporter.convert import repaired_graph, sentinel_graph, to_onnx
from exporter.preprocessing import Preprocessing
from exporter.repository import ServedModel, write_repository


def small_network(shape: tuple[int, int, int] = (8, 7, 3), classes: int = 5) -> keras.Model:
    """Return a convolutional classifier with seeded weights."""
    keras.utils.set_random_seed(0)
    layers = keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Conv2D(4, 3, activation="relu", name="conv_1"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Flatten(),
            keras.layers.Dense(classes, activation="softmax", name="output"),
        ]
    )
    return keras.Model(layers.inputs, layers.outputs[0])  # functional, as the loader returns every network


def write_small_repository(
    folder: Path, shape: tuple[int, int, int] = (8, 7, 3), classes: int = 5, overlays: int = 4
) -> None:
    """Write the repository of a small network, whose guard rejects everything."""
    network = to_onnx(small_network(shape, classes))
    served = ServedModel(
        sentinel_graph(network, Preprocessing()),
        repaired_graph(network, Preprocessing()),
        np.random.default_rng(0).integers(0, 256, (overlays, *shape), dtype=np.uint8),
        0.5,
        fixed_threshold(np.array([1.0, 2.0]), 10.0),  # above log2 of 1000 classes
        classes,
        {},
    )
    write_repository(folder, served)


def classifier(
    *begin: keras.layers.Layer, shape: tuple[int, int, int] = (8, 7, 3), classes: int = 5, seed: int = 0
) -> keras.Model:
    """Return a small classifier that begins with some layers, see `shaken`."""
    head = [keras.layers.Flatten(), keras.layers.Dense(classes, activation="softmax")]
    layers = keras.Sequential([keras.Input(shape), *begin, *head])
    return shaken(keras.Model(layers.inputs[0], layers.outputs[0]), seed)


def shaken(model: keras.Model, seed: int = 0) -> keras.Model:
    """Give a network kernels and biases by a seed, have it be sure of some images and not of others, and return it.

    A layer draws its kernel by a seed that it got when it was made, whatever is seeded afterwards.
    """
    generator = np.random.default_rng(seed)

    def drawn(array: NDArray[np.float32]) -> NDArray[np.float64]:
        if array.ndim == 1:
            return array + generator.uniform(0.05, 0.2, array.shape)
        return generator.normal(0.0, math.sqrt(2.0 / math.prod(array.shape[:-1])), array.shape)

    model.set_weights([drawn(array) for array in model.get_weights()])
    answers = model.predict_on_batch(generator.normal(size=(64, *model.input_shape[1:])))
    last = [layer for layer in model.layers if isinstance(layer, keras.layers.Dense)][-1]
    last.kernel.assign(last.kernel * 2.5 / np.log(answers + 1e-9).std(axis=0).mean())
    return model


def images_of(shape: tuple[int, ...], count: int, seed: int) -> NDArray[np.uint8]:
    """Return uint8 images, noise of less contrast and of more, which networks are more sure of and less."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, *shape))
    lowest = generator.integers(0, 256, (count, 1, 1, 1))
    return np.maximum(images, lowest).astype(np.uint8)
