"""Makes whatever classifier came into one that returns probabilities."""

from __future__ import annotations

import keras
import numpy as np

from detector.errors import ModelRefusedError
from exporter.preprocessing import Preprocessing

# Element by element and monotonic or not: their rows are no logits of a softmax, whatever they sum to.
_SQUASHING = ("sigmoid", "hard_sigmoid", "tanh", "softsign", "softmax")
_NO_LOGITS = (*_SQUASHING, "relu", "relu6", "elu", "selu", "gelu", "silu", "swish", "softplus", "leakyrelu")
_POOLING = (
    keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalMaxPooling2D,
    keras.layers.AveragePooling2D,
    keras.layers.MaxPooling2D,
)
_HANDING_ON = (
    *_POOLING,
    keras.layers.Add,
    keras.layers.BatchNormalization,
    keras.layers.Concatenate,
    keras.layers.Dropout,
    keras.layers.Flatten,
    keras.layers.Rescaling,
    keras.layers.Reshape,
    keras.layers.SpatialDropout2D,
    keras.layers.ZeroPadding2D,
)
_PROBES = 16


def with_probabilities(model: keras.Model, preprocessing: Preprocessing) -> tuple[keras.Model, str]:
    """Return the network with a softmax behind it where it lacks one, and what it returned before.

    What it returns is found by trying it on noise: rows that are probability distributions are `probabilities`;
    anything else that no activation squashed is taken for `logits`.

    Args:
        model: any classifier, (batch, height, width, channels) to (batch, classes).
        preprocessing: what the network expects of pixels.

    Returns:
        A network that shares its layers with `model`, and `probabilities` or `logits`.

    Raises:
        ModelRefusedError: its outputs are neither, such as sigmoids, which score each class by itself.
    """
    noise = np.random.default_rng(0).integers(0, 256, (_PROBES, *model.input_shape[1:]), dtype=np.uint8)
    rows = model.predict_on_batch(preprocessing.apply(noise))
    if not np.isfinite(rows).all():
        raise ModelRefusedError("the network's outputs on noise are not finite, expected probabilities or logits")
    if (rows >= 0).all() and np.allclose(rows.sum(axis=-1), 1.0, atol=1e-3):
        return model, "probabilities"
    makers, between = ending(model)
    # What is pooled after a ReLU may be logits.
    refused = _SQUASHING if any(isinstance(layer, _POOLING) for layer in between) else _NO_LOGITS
    for layer in makers:
        if activation_name(layer) in refused:
            raise ModelRefusedError(
                f"the network ends in {activation_name(layer)} (layer {layer.name!r}), and its rows are no probability "
                "distributions; expected a softmax over the classes, or logits for one: STRIP's entropy is that of one "
                "class among many"
            )
    softmax = keras.layers.Softmax(name=unused_name(model, "stripwire_softmax"))
    return keras.Model(model.inputs, softmax(model.outputs[0])), "logits"


def ending(model: keras.Model) -> tuple[list[keras.layers.Layer], list[keras.layers.Layer]]:
    """Return the layers that make a network's output, and those behind them that only hand it on.

    Handing on is to rearrange, pool, scale or join what other layers made; there may be several of those.
    """
    makers: dict[keras.layers.Layer, None] = {}
    between: dict[keras.layers.Layer, None] = {}
    tensors = [model.outputs[0]]
    while tensors:
        layer, node, _ = tensors.pop()._keras_history
        if layer in between:
            continue
        if isinstance(layer, _HANDING_ON) or _is_linear(layer):
            between[layer] = None
            tensors.extend(layer._inbound_nodes[node].input_tensors)
        else:
            makers[layer] = None
    return list(makers), list(between)


def _is_linear(layer: keras.layers.Layer) -> bool:
    return isinstance(layer, keras.layers.Activation) and activation_name(layer) == "linear"


def activation_name(layer: keras.layers.Layer) -> str:
    """Return the name of a layer's activation function, `linear` where it has none."""
    if isinstance(layer, keras.layers.ReLU | keras.layers.LeakyReLU | keras.layers.Softmax):
        return type(layer).__name__.lower()
    return str(getattr(getattr(layer, "activation", None), "__name__", "linear"))


def unused_name(model: keras.Model, wanted: str) -> str:
    """Return a name for a further layer: the one wanted, with a number behind it if a layer has it."""
    names = {layer.name for layer in model.layers}
    candidates = [wanted, *(f"{wanted}_{number}" for number in range(1, len(names) + 1))]
    return next(name for name in candidates if name not in names)
