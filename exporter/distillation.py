"""Repair by bounded distillation: what the network knows of clean pictures is handed to a copy without its last layers.

1. *Bounds.* A trigger drives features farther than clean pictures do. The features that enter the last layers are held
   between quantiles of what they are on clean pictures, in the network as it came and in the copy (Wang et al.,
   "Improved Activation Clipping for Universal Backdoor Mitigation and Test-Time Detection", 2023).
2. *Last layers anew.* The last two layers of weights on every path start from initial weights, so that what they made
   of a trigger is gone (Min et al., "Towards Stable Backdoor Purification through Feature Shift Tuning", NeurIPS 2023).
3. *Distillation.* A few clean pictures cannot teach them again what many have taught. The network as it came can: the
   copy learns its answers (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015) on clean pictures that
   are moved and recoloured without end (Beyer et al., "Knowledge Distillation: A Good Teacher Is Patient and
   Consistent", CVPR 2022). No clean picture shows the trigger, so no answer tells of it. The copy sees the pictures
   veiled and parts of them hidden, and learns that neither means anything.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from exporter.augmentation import hide_rectangles, mix, move_and_recolour, veil
from exporter.preprocessing import Preprocessing
from exporter.training import Batch
from samples.types import Samples

LAYERS_ANEW = 2
MOST_IMAGES = 1000
"""Bounds are measured on at most so many pictures, so that their features fit into memory."""
QUANTILE = 0.97
"""Of a feature on clean pictures: its upper bound; the lower bound lies as far from the other end."""
TEMPERATURE = 2.0
_LEAST = 1e-7
_BATCH = 256


class Bounds(keras.layers.Layer):  # type: ignore[misc]
    """Holds features between a lower and an upper bound, each of the shape of one picture's features."""

    def __init__(self, lowest: NDArray[np.float32], highest: NDArray[np.float32], **options: Any) -> None:
        super().__init__(trainable=False, **options)
        self._lowest, self._highest = lowest, highest

    def call(self, features: Any) -> Any:
        """Return the features, (batch, ...), within their bounds."""
        return keras.ops.clip(features, self._lowest, self._highest)


def last_layers(model: keras.Model) -> list[str]:
    """Return the names of the last two layers of weights on every path from input to output.

    Normalisation belongs to the layer of weights before it.
    """
    depths = {operation.name: 0 for operation in model.operations}
    names = []
    for operation in reversed(model.operations):  # each one after all that read it
        normalises = isinstance(operation, keras.layers.BatchNormalization)
        depth = depths[operation.name] + (bool(operation.weights) and not normalises)
        if operation.weights and depth + normalises <= LAYERS_ANEW:
            names.append(operation.name)
        for parent in _parents(operation):
            depths[parent.name] = max(depths[parent.name], depth)
    return names[::-1]


def bounded(model: keras.Model, images: NDArray[np.uint8], preprocessing: Preprocessing) -> keras.Model:
    """Return a copy of a network in which the features that enter its last layers are bounded.

    Args:
        model: the network, which is not changed.
        images: clean, (images, height, width, channels), uint8, on which the bounds are measured.
        preprocessing: what the network expects of pixels.
    """
    last = set(last_layers(model))
    entered = [
        parent
        for operation in model.operations
        if operation.name in last
        for parent in _parents(operation)
        if parent.name not in last and not isinstance(parent, keras.layers.InputLayer)
    ]
    sources = {source.name: source for source in entered}
    layers = {name: Bounds(*_quantiles(model, source, images, preprocessing)) for name, source in sources.items()}

    def call(layer: keras.layers.Layer, *inputs: Any, **options: Any) -> Any:
        outputs = layer(*inputs, **options)
        return layers[layer.name](outputs) if layer.name in layers else outputs

    copy = keras.models.clone_model(model, call_function=call)
    # The bounds are no weights.
    copy.set_weights(model.get_weights())
    return copy


def reset_last_layers(model: keras.Model, fresh: keras.Model) -> None:
    """Give the last layers of a network those of a fresh one, of the same architecture but for bounds."""
    for name in last_layers(fresh):
        model.get_layer(name).set_weights(fresh.get_layer(name).get_weights())


def taught_by(teacher: keras.Model, preprocessing: Preprocessing) -> Batch:
    """Return what makes batches of pictures, changed, veiled and partly hidden, and the teacher's answers to the whole.

    Args:
        teacher: the network as it came, bounded.
        preprocessing: what it expects of pixels.
    """

    def make(samples: Samples, generator: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        pictures = move_and_recolour(samples.images, generator)
        answers = teacher.predict_on_batch(preprocessing.apply(pictures))
        # The answers are mixed, not asked for: to a mixture, the teacher might give the attacker's.
        pictures, answers = mix(pictures, answers, generator)
        return preprocessing.apply(hide_rectangles(veil(pictures, generator), generator)), answers

    return make


def distillation_loss(answers: Any, probabilities: Any) -> Any:
    """Return the cross-entropy of two rows of probabilities, both flattened by a temperature of 2, for each picture."""
    expected, found = (
        keras.ops.softmax(keras.ops.log(keras.ops.maximum(rows, _LEAST)) / TEMPERATURE)
        for rows in (answers, probabilities)
    )
    # The gradients of flattened probabilities are smaller by the square of the temperature.
    return TEMPERATURE**2 * keras.ops.categorical_crossentropy(expected, found)


def _parents(operation: Any) -> list[Any]:
    return [parent.operation for node in operation._inbound_nodes for parent in node.parent_nodes]


def _quantiles(
    model: keras.Model, source: keras.layers.Layer, images: NDArray[np.uint8], preprocessing: Preprocessing
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return low and high quantile of each of a layer's outputs."""
    features = keras.Model(model.inputs[0], source.output)
    few = images[:MOST_IMAGES]
    batches = [few[start : start + _BATCH] for start in range(0, len(few), _BATCH)]
    outputs = np.concatenate([features.predict_on_batch(preprocessing.apply(batch)) for batch in batches])
    lowest, highest = np.quantile(outputs, [1.0 - QUANTILE, QUANTILE], axis=0).astype(np.float32)
    return lowest, highest
