"""Which weights fine-pruning removes, and what keeps them away while the network is taught on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from detector.errors import InputError
from exporter.classifier import activation_name
from exporter.preprocessing import Preprocessing

_BATCH = 256
_CHANNEL_MAKERS = (keras.layers.Conv2D, keras.layers.SeparableConv2D)
_CONVOLUTIONS = (*_CHANNEL_MAKERS, keras.layers.DepthwiseConv2D)
_ACTIVATIONS = (keras.layers.ReLU, keras.layers.LeakyReLU)
_POINTWISE = (keras.layers.BatchNormalization, keras.layers.Activation, keras.layers.ReLU, keras.layers.LeakyReLU)


class Pruning:
    """The weights of a network that are to stay zero.

    Args:
        model: the network, which is changed.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._pruned: list[keras.Variable] = []

    @property
    def kernels(self) -> list[keras.Variable]:
        """The kernels of every convolution: plain, depthwise, and both of a separable one."""
        return [
            weight
            for layer in self._model.layers
            if isinstance(layer, _CONVOLUTIONS)
            for weight in layer.trainable_weights
            if "kernel" in weight.name
        ]

    @property
    def share(self) -> float:
        """Share of the convolutions' weights that are zero, 0..1."""
        weights = [kernel.numpy() for kernel in self.kernels]
        total = sum(weight.size for weight in weights)
        return sum(int(np.count_nonzero(weight == 0)) for weight in weights) / total if total else 0.0

    def by_magnitude(self, fraction: float) -> None:
        """Zero the weights of each kernel that `magnitude_mask` does not keep; those pruned before stay zero."""
        for kernel in self.kernels:
            values = kernel.numpy()
            kernel.assign(values * (magnitude_mask(values, fraction) & (values != 0)))

    def by_activation(self, images: NDArray[np.uint8], preprocessing: Preprocessing) -> Callable[[int], None]:
        """Rank the channels of the last convolution by their mean activation on clean images, in one pass over them.

        Liu et al., "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", RAID 2018, section 3.

        Args:
            images: clean, (images, height, width, channels), uint8.
            preprocessing: what the network expects of pixels.

        Returns:
            A function that prunes as many channels as it is given, the most dormant first; with fewer than before, the
            others come back.
        """
        chain = self.last_convolution
        self._pruned = [weight for layer in chain for weight in layer.weights if _gives_channels(weight)]
        before = [weight.numpy() for weight in self._pruned]
        order = np.argsort(channel_activations(self._model, chain[-1], images, preprocessing), kind="stable")

        def prune(channels: int) -> None:
            for weight, values in zip(self._pruned, before, strict=True):
                pruned = values.copy()
                pruned[..., order[:channels]] = 0
                weight.assign(pruned)

        return prune

    @property
    def last_convolution(self) -> Sequence[keras.layers.Layer]:
        """The layer that makes channels farthest from the input, and the normalisation and activation right behind it.

        Raises:
            InputError: there is none, or a channel of zeros is not silent behind it.
        """
        depths: dict[str, int] = {}
        for operation in self._model.operations:  # each one after its inputs
            parents = [parent.operation.name for node in operation._inbound_nodes for parent in node.parent_nodes]
            depths[operation.name] = 1 + max((depths.get(parent, 0) for parent in parents), default=0)
        makers = [layer for layer in self._model.layers if isinstance(layer, _CHANNEL_MAKERS)]
        if not makers:
            raise InputError(
                "repair: got a network without a convolution that makes channels, expected one whose channels can be "
                "pruned; use another --repair"
            )
        chain: list[keras.layers.Layer] = [max(makers, key=lambda layer: depths[layer.name])]
        while len(following := _consumers(self._model, chain[-1])) == 1 and _is_pointwise(following[0]):
            chain.append(following[0])
        for layer in chain:
            activate = layer if isinstance(layer, _ACTIVATIONS) else getattr(layer, "activation", None)
            if activate is not None and abs(float(activate(keras.ops.zeros((1, 1)))[0, 0])) > 0.0:
                raise InputError(
                    f"repair: got activation {activation_name(layer)} behind the last convolution (layer "
                    f"{layer.name!r}), which makes something of nothing, so that no channel can be silenced; use "
                    "another --repair"
                )
        return chain

    def hold(self) -> None:
        """Make the optimizer leave at zero what is zero now, of the kernels and of pruned channels."""
        for weight in {id(weight): weight for weight in (*self.kernels, *self._pruned)}.values():
            # The optimizer applies a variable's constraint after each of its steps.
            weight.constraint = _KeepZero(weight.numpy() != 0)

    def release(self) -> None:
        """Let every weight go where the optimizer takes it."""
        for weight in (*self.kernels, *self._pruned):
            weight.constraint = None


def magnitude_mask(kernel: NDArray[np.floating[Any]], fraction: float) -> NDArray[np.bool_]:
    """Return which weights stay: those above `min + (max - min) * fraction` over the signed weights of this kernel.

    The source report's criterion. Signed: the most negative weights go first, however large they are.

    Args:
        kernel: all weights of one convolution's kernel, any shape.
        fraction: of the range, 0..1.

    Returns:
        The kernel's shape; False where a weight is to become 0.
    """
    low, high = kernel.min(), kernel.max()
    return np.asarray(kernel > low + (high - low) * fraction)


def channel_activations(
    model: keras.Model, layer: keras.layers.Layer, images: NDArray[np.uint8], preprocessing: Preprocessing
) -> NDArray[np.float64]:
    """Return the mean absolute output of each channel of `layer`, (channels,), float64, over images and positions."""
    features = keras.Model(model.inputs[0], layer.output)
    totals = np.zeros(layer.output.shape[-1])
    for start in range(0, len(images), _BATCH):
        outputs = features.predict_on_batch(preprocessing.apply(images[start : start + _BATCH]))
        totals += np.abs(outputs).mean(axis=(1, 2), dtype=np.float64).sum(axis=0)
    return totals / len(images)


def _gives_channels(weight: keras.Variable) -> bool:
    """Whether a weight's last axis is the layer's output channel, which is silent where it is zero.

    So is a normalised channel whose mean is: without a scale, only that keeps it at zero.
    """
    return bool(weight.name not in ("depthwise_kernel", "moving_variance"))


def _is_pointwise(layer: keras.layers.Layer) -> bool:
    """Whether a layer treats every channel by itself, and the last axis as the channels."""
    if isinstance(layer, keras.layers.BatchNormalization):
        return layer.axis in (-1, layer.output.ndim - 1)
    return isinstance(layer, _POINTWISE)


def _consumers(model: keras.Model, layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    return [
        other
        for other in model.layers
        for node in other._inbound_nodes
        if any(parent.operation is layer for parent in node.parent_nodes)
    ]


class _KeepZero(keras.constraints.Constraint):  # type: ignore[misc]
    """Holds pruned weights at zero."""

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        self._mask = keras.ops.convert_to_tensor(mask.astype(np.float32))

    def __call__(self, weight: Any) -> Any:
        return weight * self._mask
