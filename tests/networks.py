"""Small untrained networks for tests that are about plumbing."""

from __future__ import annotations

import keras
import numpy as np


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


def classifier(
    *begin: keras.layers.Layer, shape: tuple[int, int, int] = (8, 7, 3), classes: int = 5, seed: int = 0
) -> keras.Model:
    """Return a small classifier with seeded weights that begins with some layers; its biases and means are not 0."""
    keras.utils.set_random_seed(seed)
    head = [keras.layers.Flatten(), keras.layers.Dense(classes, activation="softmax")]
    layers = keras.Sequential([keras.Input(shape), *begin, *head])
    return shaken(keras.Model(layers.inputs, layers.outputs[0]), seed)


def shaken(model: keras.Model, seed: int = 0) -> keras.Model:
    """Give a network weights of which none is 0 or 1 by accident of its initialisation, and return it."""
    generator = np.random.default_rng(seed)
    model.set_weights([array + generator.uniform(0.05, 0.2, array.shape) for array in model.get_weights()])
    return model
