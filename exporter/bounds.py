"""Repair by bounds: no feature may be stronger than clean pictures make it.

A trigger works by features that it drives farther than anything clean does, or where nothing clean does. Every output
of every activation function is held below a high quantile of what it is on clean pictures, position by position and
channel by channel; nothing is trained. (Activation clipping: Wang et al., "Improved Activation Clipping for Universal
Backdoor Mitigation and Test-Time Detection", 2023, choose one bound for a layer; here each feature has its own.)
"""

from __future__ import annotations

from typing import Any, TypeAlias

import keras
import numpy as np
from numpy.typing import NDArray

from detector.errors import InputError
from exporter.preprocessing import Preprocessing
from exporter.training import Progress

FeatureBounds: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Lowest and highest value of each feature, both of the shape of one picture's features."""

BEYOND = 0.01
"""Share of clean pictures that may drive a feature beyond its bound, at either end."""
MOST_IMAGES = 2000
"""Bounds are measured on at most so many pictures."""
_BATCH = 64


class Bounds(keras.layers.Layer):  # type: ignore[misc]
    """Holds features between a lower and an upper bound, each of the shape of one picture's features."""

    def __init__(self, lowest: NDArray[np.float32], highest: NDArray[np.float32], **options: Any) -> None:
        super().__init__(trainable=False, **options)
        self.lowest, self.highest = lowest, highest

    def call(self, features: Any) -> Any:
        """Return the features, (batch, ...), within their bounds."""
        below = keras.ops.minimum(features, self.highest)
        # Behind a ReLU nothing is under 0.
        return keras.ops.maximum(below, self.lowest) if self.lowest.any() else below


def measure_bounds(
    model: keras.Model,
    images: NDArray[np.uint8],
    preprocessing: Preprocessing,
    *,
    on_progress: Progress | None = None,
) -> dict[str, FeatureBounds]:
    """Return the bounds of what comes out of each activation function, by the name of its layer.

    Args:
        model: the network.
        images: clean, (images, height, width, channels), uint8, on which the bounds are measured.
        preprocessing: what the network expects of pixels.
        on_progress: told about every layer.

    Raises:
        InputError: the network has no activation function before its output.
    """
    activations = activation_layers(model)
    if not activations:
        raise InputError(
            "repair: got a network without an activation function before its output, expected one to bound; "
            "use another --repair"
        )
    spread = np.linspace(0, len(images) - 1, min(len(images), MOST_IMAGES)).astype(np.int64)
    inputs = preprocessing.apply(images[spread])
    bounds = {}
    for number, layer in enumerate(activations, start=1):
        bounds[layer.name] = _extremes(keras.Model(model.inputs[0], layer.output), inputs)
        if on_progress is not None:
            on_progress("Bounding features", number, len(activations))
    return bounds


def bounded(model: keras.Model, bounds: dict[str, FeatureBounds]) -> keras.Model:
    """Return a copy of a network in which features are held within `bounds`, as `measure_bounds` returned them."""

    def call(layer: keras.layers.Layer, *inputs: Any, **options: Any) -> Any:
        features = layer(*inputs, **options)
        return Bounds(*bounds[layer.name])(features) if layer.name in bounds else features

    copy = keras.models.clone_model(model, call_function=call)
    # The bounds are no weights.
    copy.set_weights(model.get_weights())
    return copy


def activation_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Return the layers whose output an activation function makes, without the network's output."""
    output = model.outputs[0]._keras_history.operation
    return [layer for layer in model.layers if layer is not output and _activates(layer)]


def _activates(layer: keras.layers.Layer) -> bool:
    if isinstance(layer, keras.layers.ReLU | keras.layers.LeakyReLU):
        return True
    return getattr(layer, "activation", keras.activations.linear) is not keras.activations.linear


def _extremes(features: keras.Model, inputs: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the bounds of each feature: so many of its values, a share of `BEYOND`, lie beyond them at either end."""
    kept = int(len(inputs) * BEYOND) + 1  # of the largest and the smallest values; all would not fit into memory
    lowest = highest = np.empty((0, *features.output_shape[1:]), np.float32)
    for start in range(0, len(inputs), _BATCH):
        outputs = features.predict_on_batch(inputs[start : start + _BATCH])
        highest = _largest(np.concatenate([highest, outputs]), kept)
        lowest = -_largest(-np.concatenate([lowest, outputs]), kept)
    return lowest.max(axis=0), highest.min(axis=0)


def _largest(values: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Return the `count` largest along the first axis, in any order."""
    return values if len(values) <= count else np.partition(values, -count, axis=0)[-count:].copy()
