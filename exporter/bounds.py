"""Repair by bounds: no feature may be stronger than clean pictures make it.

A trigger works by features that it drives farther than anything clean does, or where nothing clean does. Every output
of every activation function is held below a high quantile of what it is on clean pictures, position by position and
channel by channel; nothing is trained. (Activation clipping: Wang et al., "Improved Activation Clipping for Universal
Backdoor Mitigation and Test-Time Detection", 2023, choose one bound for a layer; here each feature has its own.)
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import keras
import numpy as np
from numpy.typing import NDArray

from exporter.classifier import activation_name, ending, unused_name
from exporter.preprocessing import Preprocessing
from exporter.training import Progress

FeatureBounds: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Lowest and highest value of each feature, both of the shape of one picture's features."""

BEYOND = 0.01
"""Share of clean pictures that may drive a feature beyond its bound, at either end."""
MOST_IMAGES = 2000
"""Bounds are measured on at most so many pictures, and on fewer where they would not fit into memory."""
_BATCH = 64
_MOST_BYTES = 2**27
"""Of what a layer makes of a batch, of the largest values kept of each feature, and of the smallest: 128 MiB each."""


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
    """
    activations = activation_layers(model)
    spread = np.linspace(0, len(images) - 1, min(len(images), MOST_IMAGES)).astype(np.int64)
    bounds = {}
    for number, layer in enumerate(activations, start=1):
        features = keras.Model(model.inputs[0], layer.output)
        bounds[layer.name] = _extremes(features, images, spread, preprocessing)
        if on_progress is not None:
            on_progress("Bounding features", number, len(activations))
    return bounds


def bounded(model: keras.Model, bounds: dict[str, FeatureBounds]) -> keras.Model:
    """Return a copy of a network in which features are held within `bounds`, as `measure_bounds` returned them."""

    def call(layer: keras.layers.Layer, *inputs: Any, **options: Any) -> Any:
        features = layer(*inputs, **options)
        if layer.name not in bounds:
            return features
        return Bounds(*bounds[layer.name], name=unused_name(model, f"{layer.name}_bounds"))(features)

    copy = keras.models.clone_model(model, call_function=call)
    # The bounds are no weights.
    copy.set_weights(model.get_weights())
    return copy


def activation_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Return the layers whose output an activation function makes, without those that make the network's output."""
    makers, _ = ending(model)
    return [layer for layer in model.layers if activation_name(layer) != "linear" and layer not in makers]


def plan(features: int, widest: int, images: int) -> tuple[int, int]:
    """Return of how many images to measure features, and how many at once, so that memory stays bounded.

    Args:
        features: numbers that one picture gives.
        widest: numbers that one picture gives in the largest layer on the way to them.
        images: at hand.
    """
    fit, pass_through = (max(1, _MOST_BYTES // (4 * numbers)) for numbers in (features, widest))
    most = int((fit - 1) / BEYOND) + 1  # of which a share of `BEYOND` is kept, and one more
    return min(images, MOST_IMAGES, most), min(_BATCH, pass_through)


def _extremes(
    features: keras.Model, images: NDArray[np.uint8], spread: NDArray[np.int64], preprocessing: Preprocessing
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the bounds of each feature: so many of its values, a share of `BEYOND`, lie beyond them at either end."""
    shape = features.output_shape[1:]
    widest = max(
        math.prod(tensor.shape[1:]) for layer in features.layers for tensor in keras.tree.flatten(layer.output)
    )
    count, batch = plan(math.prod(shape), widest, len(spread))
    chosen = spread[np.linspace(0, len(spread) - 1, count).astype(np.int64)]
    kept = int(count * BEYOND) + 1  # of the largest and the smallest values; all would not fit into memory
    lowest = highest = np.empty((0, *shape), np.float32)
    for start in range(0, count, batch):
        outputs = features.predict_on_batch(preprocessing.apply(images[chosen[start : start + batch]]))
        highest = _outermost(np.concatenate([highest, outputs]), kept, slice(-kept, None))
        lowest = _outermost(np.concatenate([lowest, outputs]), kept, slice(None, kept))
    return lowest.max(axis=0), highest.min(axis=0)


def _outermost(values: NDArray[np.float32], count: int, where: slice) -> NDArray[np.float32]:
    """Return the `count` largest or smallest along the first axis, in any order."""
    if len(values) <= count:
        return values
    values.partition(len(values) - count if where.start else count - 1, axis=0)
    return values[where].copy()
