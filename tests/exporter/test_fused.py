"""The fused graph gives the verdicts of the ensemble, whatever the network, and does less for them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import keras
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from detector.calibration import Calibration, fixed_threshold
from detector.consensus import negative_log_likelihood
from detector.errors import ExportError
from detector.scores import DETECTORS, Evidence, score_bits
from detector.serving import SENTINEL_OUTPUTS
from detector.strip import perturb, perturbation_entropies_bits, weighted_overlays
from exporter.architectures import deepid, resnet
from exporter.convert import IR_VERSION, OPSET, repaired_graph, sentinel_graph, to_onnx
from exporter.entropies import entropy_matrix, open_graph
from exporter.fused import ExitRule, Fused, Plan, check_fused, fuse, plan_stages
from exporter.preprocessing import Preprocessing
from tests.detector import reference
from tests.networks import classifier, images_of, shaken

CLASSES = 5
PREPROCESSING = Preprocessing("unit", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def skipping(seed: int) -> keras.Model:
    """Return a network that reads its pixels twice."""
    keras.utils.set_random_seed(seed)
    pixels = keras.Input((8, 7, 3))
    features = layers.Add()([layers.Conv2D(3, 3, padding="same", activation="relu")(pixels), pixels])
    answer = layers.Dense(CLASSES, activation="softmax")(layers.Flatten()(features))
    return shaken(keras.Model(pixels, answer), seed)


def reshaped(seed: int) -> keras.Model:
    """Return a network whose last operator is no softmax."""
    model = classifier(layers.Conv2D(4, 3, activation="relu"), seed=seed)
    return keras.Model(model.inputs[0], layers.Reshape((CLASSES,))(layers.Activation("linear")(model.outputs[0] * 1.0)))


NETWORKS: dict[str, Callable[[int], keras.Model]] = {
    "convolution": lambda seed: classifier(layers.Conv2D(4, 3, activation="relu"), layers.MaxPooling2D(2), seed=seed),
    "padded, with strides and normalised": lambda seed: classifier(
        layers.Conv2D(4, 3, strides=2, padding="same"), layers.BatchNormalization(), layers.ReLU(), seed=seed
    ),
    "rescaled first": lambda seed: classifier(
        layers.Rescaling(2.0, -1.0), layers.ZeroPadding2D(1), layers.Conv2D(4, 3, activation="relu"), seed=seed
    ),
    "separable": lambda seed: classifier(layers.SeparableConv2D(4, 3, activation="relu"), seed=seed),
    "dense": lambda seed: classifier(layers.Flatten(), layers.Dense(6, activation="relu"), seed=seed),
    "grey": lambda seed: classifier(layers.Conv2D(4, 3, activation="relu"), shape=(9, 8, 1), seed=seed),
    "deepid": lambda seed: shaken(deepid(CLASSES, (40, 36, 3)), seed),
    "resnet": lambda seed: shaken(resnet(CLASSES, (12, 12, 3)), seed),
    "pooled first": lambda seed: classifier(layers.MaxPooling2D(2), layers.Conv2D(4, 2, activation="relu"), seed=seed),
    "pixels read twice": skipping,
    "no softmax at the end": reshaped,
}
SHARES = {name: name not in ("pooled first", "pixels read twice") for name in NETWORKS}


@dataclass(frozen=True)
class Pair:
    """A sentinel and a repaired network, in float64 and as they are served."""

    shape: tuple[int, int, int]
    preprocessing: Preprocessing
    models: tuple[Callable[[NDArray[Any]], NDArray[np.float64]], Callable[[NDArray[Any]], NDArray[np.float64]]]
    graphs: tuple[onnx.ModelProto, onnx.ModelProto]
    sessions: tuple[Any, Any]


@cache
def pair(name: str) -> Pair:
    """Return two networks of the same kind and with other weights."""
    models = [NETWORKS[name](seed) for seed in (1, 2)]
    shape = models[0].input_shape[1:]
    preprocessing = PREPROCESSING if shape[2] == 3 else Preprocessing("raw", (100.0,), (60.0,))
    graphs = sentinel_graph(to_onnx(models[0]), preprocessing), repaired_graph(to_onnx(models[1]), preprocessing)
    exact = [in_float64(model, preprocessing) for model in models]
    sessions = [open_graph(graph.SerializeToString()) for graph in graphs]
    return Pair(shape, preprocessing, (exact[0], exact[1]), graphs, (sessions[0], sessions[1]))


def in_float64(model: keras.Model, preprocessing: Preprocessing) -> Callable[[NDArray[Any]], NDArray[np.float64]]:
    """Return what a network does to pixels of 0..255, computed in float64 by Keras."""
    config = json.loads(json.dumps(model.get_config()).replace("float32", "float64"))
    exact = type(model).from_config(config)
    exact.set_weights(model.get_weights())
    scale = {"unit": 255.0, "raw": 1.0}[preprocessing.scale]

    def answer(pixels: NDArray[Any]) -> NDArray[np.float64]:
        scaled = (pixels.astype(np.float64) / scale - np.array(preprocessing.mean)) / np.array(preprocessing.std)
        return np.asarray(exact(scaled, training=False), np.float64)

    return answer


def calibration_of(
    threshold_bits: float, detector: str = "strip", plain_bits: float = 0.1, nll: float = 2.0
) -> Calibration:
    strip = fixed_threshold(np.array([1.0, 2.0]), threshold_bits)
    if detector == "strip":
        return strip
    return replace(strip, detector="consensus", threshold_plain_bits=plain_bits, threshold_nll=nll)


def run(fused: Fused, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Return what the graph answers, columns as (batch,), and by detector the scores of its entropies."""
    outputs = [*SENTINEL_OUTPUTS, "repaired_probabilities"]
    answers = dict(
        zip(outputs, open_graph(fused.graph.SerializeToString()).run(outputs, {"image": images}), strict=True)
    )
    for name in SENTINEL_OUTPUTS[1:]:
        assert answers[name].shape == (len(images), 1)
        answers[name] = answers[name][:, 0]
    assert answers["sentinel_entropies"].shape == (len(images), fused.plan.ends[-1])
    ran = answers["sentinel_perturbations"]
    scores = {name: score_bits(answers["sentinel_entropies"], name, ran) for name in DETECTORS}
    return answers | scores


def sure(probabilities: NDArray[Any]) -> NDArray[np.bool_]:
    """Return for which rows the likeliest class is so by more than rounding."""
    ordered = np.sort(probabilities, axis=-1)
    return np.asarray(ordered[:, -1] - ordered[:, -2] > 1e-5)


@pytest.mark.parametrize("name", NETWORKS)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 33),
    count=st.integers(1, 9),
    alpha=st.floats(0.1, 0.9),
    rank=st.floats(0.0, 1.0),
)
@settings(max_examples=6, deadline=None)
def test_every_way_of_computing_it_gives_the_same_verdicts(
    name: str, seed: int, batch: int, count: int, alpha: float, rank: float
) -> None:
    networks = pair(name)
    badnet, repaired = networks.sessions
    images, overlays = images_of(networks.shape, batch, seed), images_of(networks.shape, count, seed + 1)

    (rows,) = badnet.run(None, {"perturbations": perturb(images, weighted_overlays(overlays, alpha), alpha)})
    entropies = perturbation_entropies_bits(rows)
    (plain,) = badnet.run(None, {"perturbations": images[:, None].astype(np.float32)})
    (believed,) = repaired.run(None, {"image": images})
    nlls = negative_log_likelihood(believed, plain[:, 0].argmax(axis=-1))
    plain_bits = perturbation_entropies_bits(plain)[:, 0]

    blends = np.array([[reference.blend(image, overlay, alpha) for overlay in overlays] for image in images])
    exact_rows = networks.models[0](blends.reshape(-1, *networks.shape)).reshape(batch, count, -1)
    exact_bits = np.array([reference.entropy_bits(row) for row in exact_rows])
    exact_blends = np.array([[reference.entropy_bits(row[None]) for row in rows] for rows in exact_rows])
    exact_medians = np.array([reference.lower_median(row) for row in exact_blends])
    exact_plain, exact_believed = (network(images) for network in networks.models)
    exact_nlls = np.array(
        [-math.log(row[label]) for row, label in zip(exact_believed, exact_plain.argmax(1), strict=True)]
    )

    exact_plain_bits = np.array([reference.entropy_bits(row[None]) for row in exact_plain])

    strip = calibration_of(float(np.quantile(exact_bits, rank)))
    consensus = calibration_of(
        float(np.quantile(exact_medians, rank)),
        "consensus",
        float(np.quantile(exact_plain_bits, rank)),
        float(np.quantile(exact_nlls, 1.0 - rank)),
    )
    for calibration in (strip, consensus):
        detector, by_strip = calibration.detector, calibration.detector == "strip"
        scores, exact = score_bits(entropies, detector), exact_bits if by_strip else exact_medians
        certain = np.abs(exact - calibration.threshold_bits) >= 1e-4
        if calibration.threshold_nll is not None:
            certain &= (np.abs(exact_nlls - calibration.threshold_nll) >= 1e-4) & sure(exact_plain)
            certain &= np.abs(exact_plain_bits - consensus.thresholds.plain_bits) >= 1e-4
        reject = calibration.thresholds.reject
        expected = reject(Evidence(exact, exact_plain_bits, exact_nlls))
        np.testing.assert_array_equal(reject(Evidence(scores, plain_bits, nlls))[certain], expected[certain])
        for early_exit in (True, False):
            fused = fuse(*networks.graphs, overlays, alpha, calibration, entropies, early_exit=early_exit)
            answers = run(fused, images)
            found = answers[detector]
            seen, labels = answers["sentinel_label"], answers["repaired_probabilities"].argmax(axis=1)
            found_nlls = None if by_strip else negative_log_likelihood(answers["repaired_probabilities"], seen)
            found_plain = answers["sentinel_plain_entropy"]
            np.testing.assert_array_equal(reject(Evidence(found, found_plain, found_nlls))[certain], expected[certain])
            np.testing.assert_array_equal(labels, believed.argmax(axis=1))
            np.testing.assert_array_equal(labels[sure(exact_believed)], exact_believed.argmax(1)[sure(exact_believed)])
            if by_strip:
                assert set(seen) == set(found_plain) == {-1}
            else:
                np.testing.assert_allclose(found_plain, plain_bits, rtol=1e-3, atol=1e-6)
                np.testing.assert_array_equal(seen[sure(exact_plain)], exact_plain.argmax(1)[sure(exact_plain)])
            counts = answers["sentinel_perturbations"]
            assert set(counts) <= set(fused.plan.ends)
            whole = counts == count
            assert whole.all() or early_exit
            ran = np.arange(count) < counts[:, None]
            in_order = answers["sentinel_entropies"]
            np.testing.assert_allclose(in_order[ran], entropies[:, fused.plan.order][ran], atol=1e-5)
            np.testing.assert_allclose(in_order[ran], exact_blends[:, fused.plan.order][ran], atol=1e-5)
            assert (in_order[~ran] == 0).all()
            assert (found[~whole] > calibration.threshold_bits).all()
            assert (exact[~whole] > calibration.threshold_bits - 1e-4).all()


def fused_of(name: str, threshold_bits: float = 0.0, **options: Any) -> tuple[Fused, NDArray[np.uint8], NDArray[Any]]:
    """Return a fused graph over eight overlays, forty images and the entropies of these."""
    networks = pair(name)
    overlays, images = images_of(networks.shape, 8, 1), images_of(networks.shape, 40, 2)
    entropies = entropy_matrix(networks.sessions[0], images, overlays, 0.5)
    threshold = threshold_bits or float(np.quantile(entropies.mean(axis=1), 0.05))
    return fuse(*networks.graphs, overlays, 0.5, calibration_of(threshold), entropies, **options), images, entropies


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield all nodes, those of branches as well."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_affine_at_the_beginning_runs_once_for_an_image_and_else_once_for_a_blend(name: str) -> None:
    networks = pair(name)
    fused, _, _ = fused_of(name)
    assert len(fused.plan.ends) > 1
    assert (fused.shared > 0) == SHARES[name]
    assert fused.to_json()["shared_operators"] == fused.shared
    first = next(node for node in networks.graphs[0].graph.node if node.op_type in ("Conv", "MatMul"))
    kernel = next(tensor for tensor in networks.graphs[0].graph.initializer if tensor.name == first.input[1])
    readers = [node for node in nodes_of(fused.graph.graph) if f"sentinel/{kernel.name}" in node.input]
    assert len(readers) == (1 if SHARES[name] else len(fused.plan.ends))
    (stored,) = (tensor for tensor in fused.graph.graph.initializer if tensor.name == "stripwire/overlays_1")
    assert stored.dims[0] == fused.plan.ends[0]
    assert (tuple(stored.dims[1:]) == networks.shape) == (not SHARES[name])


def test_networks_that_are_the_same_are_stored_once() -> None:
    network = to_onnx(NETWORKS["deepid"](1))
    graphs = sentinel_graph(network, PREPROCESSING), repaired_graph(network, PREPROCESSING)
    overlays = images_of((40, 36, 3), 2, 0)
    fused = fuse(*graphs, overlays, 0.5, calibration_of(1.0), np.ones((3, 2)))
    stored = sum(len(tensor.raw_data) for tensor in fused.graph.graph.initializer)
    weights = sum(len(tensor.raw_data) for tensor in network.graph.initializer)
    of_overlays = sum(len(t.raw_data) for t in fused.graph.graph.initializer if "overlays" in t.name)
    assert stored - of_overlays < 1.05 * weights


@pytest.mark.parametrize("early_exit", [True, False])
def test_the_graph_is_readable_by_the_servers_of_the_last_years(early_exit: bool) -> None:
    fused, _, _ = fused_of("deepid", early_exit=early_exit)
    graph = fused.graph
    onnx.checker.check_model(graph, full_check=True)
    assert graph.ir_version == IR_VERSION
    assert {entry.domain: entry.version for entry in graph.opset_import}[""] == OPSET
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True, data_prop=True)
    shapes = {
        output.name: [dimension.dim_param or dimension.dim_value for dimension in output.type.tensor_type.shape.dim]
        for output in inferred.graph.output
    }
    columns = {key: ["batch", 1] for key in SENTINEL_OUTPUTS}
    wide = {"sentinel_entropies": ["batch", 8], "repaired_probabilities": ["batch", CLASSES]}
    assert shapes == columns | wide
    names = [tensor for node in nodes_of(graph.graph) for tensor in node.output]
    assert len(names) == len(set(names))  # no branch hides what another part made


# fmt: off
ON_GPU = {
    "Add", "ArgMax", "AveragePool", "BatchNormalization", "Cast", "Concat", "ConstantOfShape", "Conv", "Div",
    "Equal", "Exp", "Gather", "GatherND", "Gemm", "GlobalAveragePool", "Greater", "Identity", "If", "Log",
    "MatMul", "MaxPool", "Mul", "Neg", "NonZero", "Not", "Pad", "ReduceMax", "ReduceSum", "Relu", "Reshape",
    "ScatterND", "Shape", "Size", "Slice", "Softmax", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
}
# fmt: on
"""Operators that CUDAExecutionProvider has at operator set 15 for the types in use: onnxruntime, OperatorKernels.md."""


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_gpu_has_a_kernel_for_every_operator(name: str, detector: str) -> None:
    networks = pair(name)
    overlays = images_of(networks.shape, 4, 1)
    plannable = np.linspace(0.5, 1.5, 40).reshape(10, 4)
    fused = fuse(*networks.graphs, overlays, 0.5, calibration_of(0.7, detector), plannable)
    assert {node.op_type for node in nodes_of(fused.graph.graph)} <= ON_GPU


def test_most_clean_images_are_spared_blends_and_the_plan_knows_how_many() -> None:
    fused, images, entropies = fused_of("convolution")
    answers = run(fused, images)
    counts = answers["sentinel_perturbations"]
    assert counts.mean() == pytest.approx(fused.plan.expected)
    at_or_under = [np.count_nonzero(answers["strip"] <= bound + 1e-5) for bound in fused.histogram.bounds_bits]
    assert at_or_under == list(fused.histogram.counts)  # what is expected of clean traffic is what is served
    assert fused.plan.expected < 8
    assert len(set(counts)) > 1
    so_far = np.cumsum(entropies[:, fused.plan.order], axis=1)
    means = so_far[np.arange(40), counts - 1] / counts
    np.testing.assert_allclose(answers["strip"], means, atol=1e-5)
    full, _, _ = fused_of("convolution", early_exit=False)
    assert set(run(full, images)["sentinel_perturbations"]) == {8}
    assert full.plan == Plan(tuple(range(8)), (8,), 8.0)


def test_images_do_not_disturb_each_other() -> None:
    fused, images, _ = fused_of("resnet")
    together = run(fused, images)
    for row in range(0, 40, 7):
        for name, answer in run(fused, images[row : row + 1]).items():
            np.testing.assert_allclose(answer[0], together[name][row], atol=1e-5, err_msg=name)


def with_last_bias(graph: onnx.ModelProto, change: Callable[[NDArray[Any]], NDArray[Any]]) -> onnx.ModelProto:
    """Return a graph whose last weights are others."""
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    last = [node for node in changed.graph.node if node.op_type in ("MatMul", "Add")][-1].input[1]
    tensor = next(tensor for tensor in changed.graph.initializer if tensor.name == last)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), last))
    return changed


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("name", ["convolution", "no softmax at the end"])
def test_what_is_not_a_number_goes_through_every_stage_and_stays_what_it_is(name: str, detector: str) -> None:
    networks = pair(name)
    broken = with_last_bias(networks.graphs[0], lambda weights: weights + np.float32(np.nan))
    overlays = images_of(networks.shape, 4, 1)
    plannable = np.linspace(0.5, 1.5, 40).reshape(10, 4)
    fused = fuse(broken, networks.graphs[1], overlays, 0.5, calibration_of(0.3, detector), plannable)
    assert len(fused.plan.ends) > 1
    answers = run(fused, images_of(networks.shape, 3, 2))
    assert np.isnan(answers["sentinel_entropies"]).all()
    assert answers["sentinel_perturbations"].tolist() == [4, 4, 4]
    if detector == "consensus":
        assert np.isnan(answers["sentinel_plain_entropy"]).all()


def test_a_network_that_is_very_sure_has_an_entropy_of_exactly_none() -> None:
    networks = pair("convolution")
    bias = 1e5 * np.eye(CLASSES, dtype=np.float32)[0]
    sure_of_it = with_last_bias(networks.graphs[0], lambda weights: bias if weights.ndim == 1 else weights)
    fused = fuse(
        sure_of_it, networks.graphs[1], images_of(networks.shape, 4, 1), 0.5, calibration_of(0.3), np.ones((3, 4))
    )
    answers = run(fused, images_of(networks.shape, 3, 2))
    assert answers["sentinel_entropies"].tolist() == [[0.0] * 4] * 3


def test_overlays_come_in_the_order_that_lets_most_images_go_and_stages_end_where_they_do() -> None:
    # By the last overlay most of the images are through, by the first two the others.
    entropies = np.array([[1.0, 1.0, 0.0, 5.0]] * 8 + [[1.8, 1.8, 0.0, 0.0]] * 2)
    plan = plan_stages(entropies, 3.5)
    assert plan.order[0] == 3
    assert set(plan.order[:3]) == {0, 1, 3}
    assert plan.ends == (1, 3, 4)
    assert plan.expected == pytest.approx(0.8 * 1 + 0.2 * 3)
    assert plan_stages(entropies, 100.0).ends == (4,)
    assert plan_stages(entropies, 100.0).expected == 4.0
    assert plan_stages(np.ones((3, 1)), 0.5) == Plan((0,), (1,), 1.0)


@pytest.mark.parametrize("count", [1, 2, 3, 9, 10])
def test_by_consensus_an_image_is_through_once_more_than_half_of_its_blends_are_over_the_threshold(count: int) -> None:
    rule = ExitRule.of(calibration_of(0.3, "consensus"), count)
    for over in range(count + 1):
        entropies = np.array([[0.4] * over + [0.3] * (count - over)], np.float32)
        (score,) = score_bits(entropies, "consensus")
        assert (rule.counted(entropies).sum() > rule.enough) == (score > np.float32(0.3)) == (over > count / 2)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.floats(0.0, 1.0))
@settings(max_examples=50, deadline=None)
def test_no_other_stages_cost_less(seed: int, count: int, rank: float) -> None:
    entropies = np.random.default_rng(seed).gamma(2.0, 0.5, (30, count))
    enough = float(np.quantile(entropies.sum(axis=1), rank))
    plan = plan_stages(entropies, enough)
    assert sorted(plan.order) == list(range(count))
    undecided = [1.0, *(np.cumsum(entropies[:, plan.order], axis=1) <= enough).mean(axis=0)]

    def expected(ends: tuple[int, ...]) -> float:
        return sum((end - start) * float(undecided[start]) for start, end in zip((0, *ends), ends, strict=False))

    assert plan.expected == pytest.approx(expected(plan.ends))
    cost = plan.expected + 0.1 * (len(plan.ends) - 1)
    for first in range(1, count):
        assert cost <= expected((first, count)) + 0.1 + 1e-9
        for second in range(first + 1, count):
            assert cost <= expected((first, second, count)) + 0.2 + 1e-9
    assert cost <= count + 1e-9


def test_a_graph_that_finds_something_else_is_refused() -> None:
    fused, images, entropies = fused_of("convolution")
    check_fused(fused, images, entropies)
    with pytest.raises(ExportError, match=r"its entropies differ from the sentinel's by .*nothing was exported"):
        check_fused(fused, images[::-1], entropies)
    with pytest.raises(ExportError, match="by nan bits"):
        check_fused(fused, images, entropies * np.nan)


def test_networks_that_expect_different_pixels_are_refused() -> None:
    networks = pair("convolution")
    other = repaired_graph(to_onnx(NETWORKS["convolution"](2)), Preprocessing())
    with pytest.raises(ExportError, match="the two networks expect different pixels"):
        fuse(networks.graphs[0], other, images_of(networks.shape, 2, 0), 0.5, calibration_of(1.0), np.ones((3, 2)))


def test_a_network_with_branches_is_refused() -> None:
    networks = pair("convolution")
    branching = onnx.ModelProto()
    branching.CopyFrom(networks.graphs[0])
    node = next(node for node in branching.graph.node if node.op_type == "Relu")
    node.op_type = "If"
    node.attribute.append(helper.make_attribute("then_branch", helper.make_graph([], "empty", [], [])))
    overlays = images_of(networks.shape, 2, 0)
    with pytest.raises(ExportError, match="holds the operator If, expected no branch and no loop"):
        fuse(branching, networks.graphs[1], overlays, 0.5, calibration_of(1.0), np.ones((3, 2)))


def test_overlays_that_would_take_too_much_room_behind_a_convolution_are_stored_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("exporter.fused._MOST_SHARED_BYTES", 1)
    networks = pair("deepid")
    overlays = images_of(networks.shape, 2, 0)
    assert fuse(*networks.graphs, overlays, 0.5, calibration_of(1.0), np.ones((3, 2))).shared == 0
