"""Small untrained networks for tests that are about plumbing."""

from __future__ import annotations

import keras


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
