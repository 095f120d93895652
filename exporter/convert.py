"""From Keras to the two ONNX graphs that are served."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from detector.errors import ExportError, ModelRefusedError
from exporter.entropies import open_graph
from exporter.preprocessing import Preprocessing

# Read by the onnxruntime of Triton images of the last years.
OPSET = 15
IR_VERSION = 8

PARITY_TOLERANCE = 1e-4
_BATCH = 32
"""Images asked about at once: what passes through a network of large images is large."""


def to_onnx(model: keras.Model) -> onnx.ModelProto:
    """Convert a network as it is.

    Returns:
        A graph from scaled pixels (batch, height, width, channels) to probabilities (batch, classes), both float32.

    Raises:
        ModelRefusedError: it holds something that has no ONNX form of operator set 15.
    """
    # Slow to import, and only an export needs them.
    import tensorflow as tf
    import tf2onnx

    height, width, channels = model.input_shape[1:]
    signature = [tf.TensorSpec((None, height, width, channels), tf.float32, name="pixels")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tf2onnx and what it calls warn about themselves
        # `from_keras` looks outputs up by names that a Sequential of Keras 3 does not have.
        call = tf.function(lambda pixels: model(pixels, training=False), input_signature=signature)
        try:
            proto, _ = tf2onnx.convert.from_function(call, input_signature=signature, opset=OPSET)
        except Exception as error:  # tf2onnx raises whatever its rewriting trips over
            raise ModelRefusedError(
                f"the network cannot be converted to ONNX ({error}); nothing was exported"
            ) from error
    assert isinstance(proto, onnx.ModelProto)  # noqa: S101  tf2onnx is untyped
    foreign = sorted({node.op_type for node in proto.graph.node if not onnx.defs.has(node.op_type, node.domain)})
    if foreign:
        raise ModelRefusedError(
            f"the network cannot be converted to ONNX: there is no operator for {', '.join(foreign)}, "
            f"{_suspects(model)}; nothing was exported"
        )
    return proto


def _suspects(model: keras.Model) -> str:
    """Say which layers have no ONNX form, as far as that is known."""
    found = []
    for layer in model.layers:
        if getattr(layer, "groups", 1) > 1:
            found.append(f"layer {layer.name!r} with groups {layer.groups}")
        if getattr(getattr(layer, "activation", None), "__name__", "") == "gelu":
            found.append(f"layer {layer.name!r} with the activation gelu")
    return f"expected a network without {', '.join(found)}" if found else "and which layer needs it is not known"


def repaired_graph(network: onnx.ModelProto, preprocessing: Preprocessing) -> onnx.ModelProto:
    """Return the graph of `repaired`, with the preprocessing inside.

    `image` UINT8 (batch, H, W, C) to `repaired_probabilities` FP32 (batch, classes).
    """
    height, width, channels, classes = _dimensions(network)
    before, constants = _preprocess("stripwire/float", preprocessing)
    return _wrap(
        network,
        name="repaired",
        graph_input=helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", height, width, channels]),
        before=[helper.make_node("Cast", ["image"], ["stripwire/float"], to=TensorProto.FLOAT), *before],
        network_output="repaired_probabilities",
        after=[],
        graph_output=helper.make_tensor_value_info("repaired_probabilities", TensorProto.FLOAT, ["batch", classes]),
        constants=constants,
    )


def sentinel_graph(network: onnx.ModelProto, preprocessing: Preprocessing) -> onnx.ModelProto:
    """Return the graph of `badnet`, with the preprocessing inside and the perturbations folded into the batch.

    `perturbations` FP32 (batch, N, H, W, C), 0..255, to `sentinel_probabilities` FP32 (batch, N, classes). The ensemble
    never sees its batch grow, so dynamic batching works at every step.
    """
    height, width, channels, classes = _dimensions(network)
    fold = helper.make_node("Reshape", ["perturbations", "stripwire/image_shape"], ["stripwire/folded"])
    before, constants = _preprocess("stripwire/folded", preprocessing)
    after = [
        helper.make_node("Shape", ["perturbations"], ["stripwire/batch_and_n"], start=0, end=2),
        helper.make_node("Concat", ["stripwire/batch_and_n", "stripwire/classes"], ["stripwire/shape"], axis=0),
        helper.make_node("Reshape", ["stripwire/rows", "stripwire/shape"], ["sentinel_probabilities"]),
    ]
    return _wrap(
        network,
        name="badnet",
        graph_input=helper.make_tensor_value_info(
            "perturbations", TensorProto.FLOAT, ["batch", "perturbation", height, width, channels]
        ),
        before=[fold, *before],
        network_output="stripwire/rows",
        after=after,
        graph_output=helper.make_tensor_value_info(
            "sentinel_probabilities", TensorProto.FLOAT, ["batch", "perturbation", classes]
        ),
        constants={
            **constants,
            "stripwire/image_shape": np.array([-1, height, width, channels], dtype=np.int64),
            "stripwire/classes": np.array([classes], dtype=np.int64),
        },
    )


def check_parity(
    model: keras.Model, graph: onnx.ModelProto, images: NDArray[np.uint8], preprocessing: Preprocessing, name: str
) -> float:
    """Compare a served graph with its Keras network on real images.

    Args:
        model: the Keras network.
        graph: what `repaired_graph` or `sentinel_graph` made of it.
        images: (batch, height, width, channels), uint8.
        preprocessing: what the network expects of pixels.
        name: what the network is called in a message.

    Returns:
        The largest absolute difference between two probabilities.

    Raises:
        ExportError: they differ by more than 1e-4, disagree on a label, or do not return probabilities.
    """
    expected = model.predict(preprocessing.apply(images), batch_size=_BATCH, verbose=0)
    check_probabilities(expected, name)
    session = open_graph(graph.SerializeToString())

    def ask(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        if session.get_inputs()[0].name == "image":
            (rows,) = session.run(None, {"image": batch})
            return np.asarray(rows)
        (rows,) = session.run(None, {"perturbations": batch[:, None].astype(np.float32)})
        return np.asarray(rows[:, 0])

    got = np.concatenate([ask(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH)])
    difference = float(np.max(np.abs(expected - got)))
    labels = expected.argmax(axis=-1), got.argmax(axis=-1)
    # Two classes that are as likely may change places: what counts is how much less likely the other label is.
    margins = expected[np.arange(len(images)), labels[0]] - expected[np.arange(len(images)), labels[1]]
    disagreements = int(np.count_nonzero(margins > PARITY_TOLERANCE))
    if not difference <= PARITY_TOLERANCE or disagreements:
        raise ExportError(
            f"{name}: the ONNX graph does not do what the Keras network does: probabilities differ by up to "
            f"{difference:.2g} (expected at most {PARITY_TOLERANCE:g}) and {disagreements} of {len(images)} labels "
            "differ; nothing was exported"
        )
    return difference


def check_probabilities(rows: NDArray[np.floating[Any]], name: str) -> None:
    """Raise ExportError unless every row of `rows`, (batch, classes), is a probability distribution."""
    sums = rows.sum(axis=-1)
    if not (np.isfinite(rows).all() and (rows >= 0).all() and np.allclose(sums, 1.0, atol=1e-3)):
        raise ExportError(
            f"{name}: its outputs are no probabilities (rows sum to {sums.min():.4g}..{sums.max():.4g}, smallest value "
            f"{rows.min():.4g}), expected a network that ends in softmax; add a softmax to it"
        )


def _preprocess(source: str, preprocessing: Preprocessing) -> tuple[list[onnx.NodeProto], dict[str, Any]]:
    """Return the nodes from tensor `source`, pixels of 0..255, to `stripwire/pixels`, and their constants."""
    constants: dict[str, Any] = {"stripwire/factor": preprocessing.factor}
    if preprocessing.offset is None:
        return [helper.make_node("Mul", [source, "stripwire/factor"], ["stripwire/pixels"])], constants
    nodes = [
        helper.make_node("Mul", [source, "stripwire/factor"], ["stripwire/scaled"]),
        helper.make_node("Add", ["stripwire/scaled", "stripwire/offset"], ["stripwire/pixels"]),
    ]
    return nodes, {**constants, "stripwire/offset": preprocessing.offset}


def _dimensions(network: onnx.ModelProto) -> tuple[int, int, int, int]:
    pixels = [dimension.dim_value for dimension in network.graph.input[0].type.tensor_type.shape.dim]
    rows = [dimension.dim_value for dimension in network.graph.output[0].type.tensor_type.shape.dim]
    return pixels[1], pixels[2], pixels[3], rows[1]


def _wrap(
    network: onnx.ModelProto,
    *,
    name: str,
    graph_input: onnx.ValueInfoProto,
    before: list[onnx.NodeProto],
    network_output: str,
    after: list[onnx.NodeProto],
    graph_output: onnx.ValueInfoProto,
    constants: dict[str, Any],
) -> onnx.ModelProto:
    """Put `before` and `after` around the network, which reads `stripwire/pixels` and writes `network_output`."""
    renamed = {network.graph.input[0].name: "stripwire/pixels", network.graph.output[0].name: network_output}
    inner = []
    for node in network.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [renamed.get(tensor, tensor) for tensor in copy.input]
        copy.output[:] = [renamed.get(tensor, tensor) for tensor in copy.output]
        inner.append(copy)
    initializers = [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()]
    graph = helper.make_graph(
        [*before, *inner, *after],
        name,
        [graph_input],
        [graph_output],
        initializer=[*network.graph.initializer, *initializers],
    )
    opsets = list(network.opset_import)
    model = helper.make_model(graph, producer_name="stripwire", opset_imports=opsets, ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model
