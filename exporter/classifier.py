"""Makes whatever classifier came into one that returns probabilities."""

from __future__ import annotations

import keras
import numpy as np

from detector.errors import ModelRefusedError
from exporter.preprocessing import Preprocessing

# Element by element and monotonic or not: their rows are no logits of a softmax, whatever they sum to.
_NO_LOGITS = ("sigmoid", "tanh", "relu", "relu6", "elu", "selu", "gelu", "silu", "swish", "softplus", "softsign")
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
    last = model.outputs[0]._keras_history.operation
    activation = type(last).__name__.lower() if isinstance(last, keras.layers.ReLU | keras.layers.LeakyReLU) else ""
    activation = activation or getattr(getattr(last, "activation", None), "__name__", "linear")
    if activation in (*_NO_LOGITS, "leakyrelu", "softmax"):
        raise ModelRefusedError(
            f"the network ends in {activation} (layer {last.name!r}), and its rows are no probability distributions; "
            "expected a softmax over the classes, or logits for one: STRIP's entropy is that of one class among many"
        )
    return keras.Model(model.inputs, keras.layers.Softmax(name="stripwire_softmax")(model.outputs[0])), "logits"
