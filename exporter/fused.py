"""The fused layout: blends, sentinel, entropy and repaired network in one ONNX graph. Needs no TensorFlow.

The verdicts are those of the ensemble, for less work:

*The affine beginning is shared.* Up to its first activation function a network is affine, f(x) = Wx + b, and the
weights of a blend sum to one, so f(alpha x + (1 - alpha) d) = alpha f(x) + (1 - alpha) f(d): padding, preprocessing and
bias come out right, each counted once. f(d) is computed here, and f(x) once for an image. A network that does not begin
with a convolution or a matrix product gets the blends themselves.

*Entropy from logits.* With z less its maximum and S = sum e^z, H = (ln S - (sum z e^z) / S) / ln 2. Both terms are at
least 0, so nothing cancels, and no class costs a logarithm.

*Lossless early exit.* For the detector `strip`: entropies are never negative, so once the sum over some of N overlays
is over N times the threshold, the mean over all of them is over the threshold, whatever is yet to come. For
`consensus`: once more than half of the N entropies are over the threshold, so is their lower median. The blends run in
stages, each on the images that are still undecided.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from detector.calibration import Calibration, Histogram
from detector.conformal import Floats
from detector.errors import ExportError
from detector.scores import lower_middle, score_bits
from exporter.entropies import open_graph

MARGIN_BITS = 1e-4
"""By `strip` an input goes early only where its mean entropy is certain to be so much over the threshold: far more than
two ways of computing it in float32 differ by, so that no rounding turns a verdict. A median is one of the entropies,
and needs none."""

_MOST_STAGES = 4
_STAGE_COSTS = 0.1
"""What a further stage costs, counted in blends: the undecided images are gathered."""
_PLANNING_IMAGES = 1000
_MOST_SHARED_BYTES = 2**28  # what a graph may hold of overlays that went through a convolution
_CHECKED_AT_ONCE = 32
_TOLERANCE_BITS = 1e-4
_ROUNDING = 1e-30  # under which entropies in bits, float32 knows nothing

_AFFINE = ("Identity", "Transpose", "Reshape", "Pad", "Add", "Sub", "Mul", "BatchNormalization", "Conv", "MatMul")
_WORK = ("Conv", "MatMul")
_PIXELS, _ROWS = "stripwire/pixels", "stripwire/rows"  # where the network begins and ends in the sentinel's graph


@dataclass(frozen=True)
class Plan:
    """In which order and in which stages the overlays are blended in.

    Attributes:
        order: which overlay comes when, as indices.
        ends: how many blends have run at the end of each stage, ascending; the last is the number of overlays.
        expected: how many blends run for a calibration image on average.
    """

    order: tuple[int, ...]
    ends: tuple[int, ...]
    expected: float


@dataclass(frozen=True)
class Fused:
    """The fused graph, and what is to be known about it.

    Attributes:
        graph: `image` UINT8 (batch, H, W, C) to `detector.serving.SENTINEL_OUTPUTS`, (batch, 1) each but for the
            entropies, (batch, perturbations) in the order of `plan`, 0 where a blend did not run; and
            `repaired_probabilities` FP32 (batch, classes).
        plan: order and stages of the overlays.
        early_exit: whether an input that is certain to be accepted by its entropy is spared the rest of its blends.
        shared: how many operators of the sentinel run once for an image and not once for a blend; 0 where it does not
            begin so that they could.
        histogram: of the scores of clean images, by the blends that run of each.
    """

    graph: onnx.ModelProto = field(repr=False)
    plan: Plan
    early_exit: bool
    shared: int
    histogram: Histogram = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return what the manifest says of it."""
        return {
            "early_exit": self.early_exit,
            "order": list(self.plan.order),
            "stages": list(self.plan.ends),
            "expected_perturbations": self.plan.expected,
            "shared_operators": self.shared,
        }


def fuse(
    badnet: onnx.ModelProto,
    repaired: onnx.ModelProto,
    overlays: NDArray[np.uint8],
    alpha: float,
    calibration: Calibration,
    entropies_bits: Floats,
    *,
    early_exit: bool = True,
) -> Fused:
    """Build the fused graph from the two graphs of the ensemble.

    Args:
        badnet: the sentinel's graph, see `exporter.convert.sentinel_graph`.
        repaired: the repaired network's graph, see `exporter.convert.repaired_graph`.
        overlays: (perturbations, height, width, channels), uint8.
        alpha: weight of the input in the blend, 0 < alpha < 1.
        calibration: the detector and its threshold.
        entropies_bits: of the calibration images with each overlay, (images, perturbations); the plan is made by them.
        early_exit: let inputs go early whose score is certain to be over the threshold.

    Raises:
        ExportError: a network holds a branch or a loop, or the two expect different pixels.
    """
    exit_rule = ExitRule.of(calibration, len(overlays)) if early_exit else ExitRule(None, math.inf)
    plan = plan_stages(exit_rule.counted(entropies_bits), exit_rule.enough)
    factor, offset = _preprocessing(badnet)
    if not all(np.array_equal(*pair) for pair in zip((factor, offset), _preprocessing(repaired), strict=True)):
        raise ExportError("fused layout: the two networks expect different pixels; export the model again")

    weights, main = _Weights(), _Part("main")
    pixels = main.add("Mul", main.add("Cast", "image", to=TensorProto.FLOAT), weights.add("factor", factor))
    if offset.any():
        pixels = main.add("Add", pixels, weights.add("offset", offset))
    believer = _Network.of(repaired, "repaired_probabilities", weights, "repaired")
    believed = main.copy(believer.nodes, {_PIXELS: pixels}, "repaired")["repaired_probabilities"]
    main.add("Identity", believed, output="repaired_probabilities")

    sentinel = _Network.of(badnet, _ROWS, weights, "sentinel")
    shared, of_overlays = _begin(sentinel, overlays[list(plan.order)].astype(np.float32) * factor + offset)
    cut = shared[-1].output[0] if shared else _PIXELS
    features = main.copy(shared, {_PIXELS: pixels}, "shared")[cut]
    rest = [node for node in sentinel.nodes if node not in shared]
    stages = _Stages(
        sentinel,
        rest,
        cut,
        weights,
        images=main.add("Mul", features, weights.add("alpha", np.float32(alpha))),
        overlays=np.split(of_overlays * np.float32(1.0 - alpha), plan.ends[:-1]),
        exit_rule=exit_rule,
    )
    entropies, counts = stages.first(main)
    main.add("Identity", entropies, output="sentinel_entropies")
    main.add("Unsqueeze", counts, weights.add("axis_1", np.array([1])), output="sentinel_perturbations")
    if calibration.looks_at_plain:
        seen = main.copy(rest, {cut: features}, "plain")[_ROWS]
        main.add("Cast", main.add("ArgMax", seen, axis=-1), to=TensorProto.INT32, output="sentinel_label")
        # From probabilities, as the ensemble does: of a sure answer, nothing of what is left may be rounded away.
        bits = stages.to_bits(main, stages.from_probabilities(main, seen))
        main.add("Unsqueeze", bits, weights.add("axis_1", np.array([1])), output="sentinel_plain_entropy")
    else:
        shape = main.add("Shape", "sentinel_perturbations")
        for name, kind in (("sentinel_label", np.int32), ("sentinel_plain_entropy", np.float32)):
            nothing = numpy_helper.from_array(np.array([-1], kind))
            main.add("ConstantOfShape", shape, value=nothing, output=name)

    def column(name: str, kind: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, ["batch", 1])

    graph = helper.make_graph(
        main.nodes,
        "fused",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", *overlays.shape[1:]])],
        [
            helper.make_tensor_value_info("sentinel_entropies", TensorProto.FLOAT, ["batch", len(overlays)]),
            column("sentinel_plain_entropy", TensorProto.FLOAT),
            column("sentinel_label", TensorProto.INT32),
            column("sentinel_perturbations", TensorProto.INT32),
            repaired.graph.output[0],
        ],
        initializer=weights.tensors,
    )
    model = _model(graph, badnet)
    onnx.checker.check_model(model, full_check=True)
    ordered = entropies_bits[:, list(plan.order)]
    scores = score_bits(ordered, calibration.detector, exit_rule.ran(ordered, plan))
    histogram = Histogram.of(scores, calibration.threshold_bits)
    return Fused(model, plan, early_exit, len(shared), histogram)


def check_fused(
    fused: Fused, images: NDArray[np.uint8], entropies_bits: Floats, plain_bits: Floats | None = None
) -> None:
    """Check on real images that the fused graph finds what the sentinel's graph found.

    Args:
        fused: what `fuse` made.
        images: (images, height, width, channels), uint8.
        entropies_bits: of these images with each overlay, (images, perturbations), see `exporter.entropies`.
        plain_bits: of these images as they are, (images,), where the graph says that.

    Raises:
        ExportError: an entropy differs by more than 1e-4 bits, or that of an image as it is by more than a tenth.
    """
    session = open_graph(fused.graph.SerializeToString())
    outputs = ["sentinel_entropies", "sentinel_perturbations", "sentinel_plain_entropy"]
    for start in range(0, len(images), _CHECKED_AT_ONCE):
        rows = slice(start, start + _CHECKED_AT_ONCE)
        found, counts, found_plain = session.run(outputs, {"image": images[rows]})
        ran = np.arange(found.shape[1]) < counts
        difference = float(np.max(np.abs(found - entropies_bits[rows][:, list(fused.plan.order)])[ran]))
        if not difference <= _TOLERANCE_BITS:
            raise ExportError(
                f"fused layout: its entropies differ from the sentinel's by {difference:.2g} bits, expected at most "
                f"{_TOLERANCE_BITS:g}; nothing was exported. Use --layout ensemble"
            )
        if plain_bits is not None and not np.allclose(found_plain[:, 0], plain_bits[rows], rtol=0.1, atol=_ROUNDING):
            raise ExportError(
                "fused layout: its entropies of images as they are differ from the sentinel's by more than a tenth; "
                "nothing was exported. Use --layout ensemble"
            )


@dataclass(frozen=True)
class ExitRule:
    """When an image needs no further blend: once its entropies, or as many of them as are over a bar, sum to enough.

    Attributes:
        bar_bits: entropies over it count 1, others 0; without one, each counts its bits.
        enough: no further blend is needed once the sum is over this; infinite where all are needed always.
    """

    bar_bits: float | None
    enough: float

    @classmethod
    def of(cls, calibration: Calibration, count: int) -> ExitRule:
        """Return the rule under which an image's score is certain to be over the threshold of a calibration.

        Args:
            calibration: the detector and its threshold.
            count: how many blends there are.
        """
        if calibration.detector == "strip":
            return cls(None, count * (calibration.threshold_bits + MARGIN_BITS))
        return cls(calibration.threshold_bits, count - lower_middle(count) - 0.5)

    def counted(self, entropies_bits: Floats) -> Floats:
        """Return what each entropy counts, (images, perturbations)."""
        return entropies_bits if self.bar_bits is None else (entropies_bits > self.bar_bits).astype(np.float64)

    def ran(self, ordered_bits: Floats, plan: Plan) -> NDArray[np.int64]:
        """Return how many blends run of each image, (images,), given its entropies in the plan's order."""
        sums = np.cumsum(self.counted(ordered_bits), axis=1)
        ran = np.full(len(sums), plan.ends[-1], np.int64)
        for end in plan.ends[-2::-1]:
            ran[sums[:, end - 1] > self.enough] = end
        return ran


def plan_stages(counted: Floats, enough: float) -> Plan:
    """Choose order and stages so that clean images are through with as few blends as can be.

    Overlays are chosen one by one, each time the one that brings the images nearest to `enough`; of all stages up to
    four, those that cost these images least.

    Args:
        counted: what the entropies of clean images with each overlay count, (images, perturbations); see `ExitRule`.
        enough: likewise.
    """
    count = counted.shape[1]
    if not math.isfinite(enough):
        return Plan(tuple(range(count)), (count,), float(count))
    entropies = counted[:_PLANNING_IMAGES].astype(np.float64)
    total = np.zeros((len(entropies), 1))
    order: list[int] = []
    left = list(range(count))
    undecided = np.ones(count + 1)  # share of the images that are, after so many blends
    for done in range(1, count + 1):
        nearness = np.minimum(total + entropies[:, left], enough).sum(axis=0)
        order.append(left.pop(int(np.argmax(nearness))))
        total += entropies[:, order[-1:]]
        undecided[done] = np.mean(total <= enough)
    ends, expected = _cheapest_stages(undecided)
    return Plan(tuple(order), ends, expected)


def _cheapest_stages(undecided: NDArray[np.float64]) -> tuple[tuple[int, ...], float]:
    """Return where stages end best, and how many blends run then on average.

    Args:
        undecided: share of the images that are undecided after 0, 1, ... N blends, (N + 1,).
    """
    blends = np.arange(len(undecided))
    # [s][k]: the least cost of k blends in s + 1 stages, and where the stage before the last one ends.
    costs, before = [blends.astype(np.float64)], [np.zeros_like(blends)]
    for _ in range(1, _MOST_STAGES):
        further = costs[-1][:, None] + (blends[None] - blends[:, None]) * undecided[:, None] + _STAGE_COSTS
        further[np.tril_indices(len(blends))] = np.inf
        further[0] = np.inf
        before.append(further.argmin(axis=0))
        costs.append(further.min(axis=0))
    stages = int(np.argmin([cost[-1] for cost in costs]))
    ends = [len(blends) - 1]
    for previous in before[stages:0:-1]:
        ends.append(int(previous[ends[-1]]))
    ends.reverse()
    return tuple(ends), float(costs[stages][-1] - stages * _STAGE_COSTS)


@dataclass(frozen=True)
class _Network:
    """A network cut out of a served graph.

    Attributes:
        nodes: from scaled pixels to probabilities, in topological order; weights have their names in the fused graph.
        logits: what goes into the softmax that it ends in; None where it ends otherwise.
        weights: the names of all weights.
        source: the served graph.
    """

    nodes: Sequence[onnx.NodeProto]
    logits: str | None
    weights: Mapping[str, onnx.TensorProto]
    source: onnx.ModelProto

    @classmethod
    def of(cls, source: onnx.ModelProto, end: str, weights: _Weights, name: str) -> _Network:
        """Cut a network out, its tensor `end` being the last, and put its weights to the others."""
        stored = {tensor.name: tensor for tensor in source.graph.initializer}
        nodes: list[onnx.NodeProto] = []
        wanted, renamed = {end}, {}
        for node in reversed(source.graph.node):
            if not wanted.intersection(node.output):
                continue
            if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
                raise ExportError(
                    f"fused layout: the network holds the operator {node.op_type}, expected no branch and no loop; "
                    "export it with --layout ensemble"
                )
            wanted.update(tensor for tensor in node.input if tensor != _PIXELS)
            nodes.append(node)
        for tensor in sorted(wanted & stored.keys()):
            renamed[tensor] = weights.put(f"{name}/{tensor}", stored[tensor])
        nodes = [_renamed(node, renamed) for node in reversed(nodes)]
        used = {renamed[tensor]: stored[tensor] for tensor in renamed}
        return cls(nodes, _logits(nodes, end), used, source)


def _logits(nodes: Iterable[onnx.NodeProto], end: str) -> str | None:
    makers = {tensor: node for node in nodes for tensor in node.output}
    last = makers[end]
    while last.op_type == "Identity" and last.input[0] in makers:
        last = makers[last.input[0]]
    axis = next((attribute.i for attribute in last.attribute if attribute.name == "axis"), -1)
    return last.input[0] if last.op_type == "Softmax" and axis in (-1, 1) else None


def _preprocessing(served: onnx.ModelProto) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return what pixels are multiplied with, and what is added then."""
    stored = {tensor.name: tensor for tensor in served.graph.initializer}
    factor, offset = stored["stripwire/factor"], stored.get("stripwire/offset")
    return numpy_helper.to_array(factor), np.zeros(1, np.float32) if offset is None else numpy_helper.to_array(offset)


def _begin(network: _Network, pixels: NDArray[np.float32]) -> tuple[list[onnx.NodeProto], NDArray[np.float32]]:
    """Return the affine operators that a network begins with, and what they make of scaled pixels.

    There are none, and the pixels stay as they are, where the network begins otherwise, or where what they make would
    be too much to store.
    """
    chain: list[onnx.NodeProto] = []
    tensor = _PIXELS
    while tensor not in (_ROWS, network.logits):
        readers = [node for node in network.nodes if tensor in node.input]
        if len(readers) != 1 or not _is_affine(readers[0], tensor, network.weights):
            break
        chain.append(readers[0])
        tensor = readers[0].output[0]
    if not any(node.op_type in _WORK for node in chain):
        return [], pixels
    graph = helper.make_graph(
        chain,
        "beginning",
        [helper.make_tensor_value_info(_PIXELS, TensorProto.FLOAT, [None, *pixels.shape[1:]])],
        [helper.make_empty_tensor_value_info(tensor)],
    )
    for name in {name for node in chain for name in node.input} & network.weights.keys():
        graph.initializer.add().CopyFrom(network.weights[name])
        graph.initializer[-1].name = name
    session = open_graph(_model(graph, network.source).SerializeToString())
    made = np.concatenate([session.run(None, {_PIXELS: image[None]})[0] for image in pixels])
    if len(made) != len(pixels) or made.nbytes > max(_MOST_SHARED_BYTES, pixels.nbytes):
        return [], pixels
    return chain, made


def _is_affine(node: onnx.NodeProto, tensor: str, weights: Mapping[str, onnx.TensorProto]) -> bool:
    """Return whether a node does something affine to a tensor, and with constants alone."""
    others = [name for name in node.input if name != tensor]
    in_place = node.input[0] == tensor or node.op_type in ("Add", "Sub", "Mul")
    return (
        node.op_type in _AFFINE
        and in_place
        and len(others) == len(node.input) - 1
        and all(not name or name in weights for name in others)
    )


def _model(graph: onnx.GraphProto, like: onnx.ModelProto) -> onnx.ModelProto:
    opsets = list(like.opset_import)
    return helper.make_model(graph, producer_name="stripwire", opset_imports=opsets, ir_version=like.ir_version)


def _renamed(node: onnx.NodeProto, names: Mapping[str, str], prefix: str = "") -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = prefix + node.name
    copy.input[:] = [names.get(tensor, tensor) for tensor in node.input]
    copy.output[:] = [names.get(tensor, tensor) for tensor in node.output]
    return copy


class _Weights:
    """The constants of the fused graph; what both networks have in common is there once."""

    def __init__(self) -> None:
        self.tensors: list[onnx.TensorProto] = []
        self._names: dict[bytes, str] = {}

    def add(self, name: str, value: NDArray[Any] | np.float32) -> str:
        """Add a constant of ours and return its name."""
        return self.put(f"stripwire/{name}", numpy_helper.from_array(np.asarray(value)))

    def put(self, name: str, tensor: onnx.TensorProto) -> str:
        """Add a constant and return the name under which it is there."""
        named = onnx.TensorProto()
        named.CopyFrom(tensor)
        named.ClearField("name")
        content = hashlib.sha256(named.SerializeToString(deterministic=True)).digest()
        if content not in self._names:
            named.name = self._names[content] = name
            self.tensors.append(named)
        return self._names[content]


class _Part:
    """The nodes of the graph, or of a branch of it; what it makes has a name that no other part gives."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[onnx.NodeProto] = []

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node and return its output."""
        made = output or f"stripwire/{self.name}/{len(self.nodes)}_{operator}"
        self.nodes.append(helper.make_node(operator, list(inputs), [made], name=made, **attributes))
        return made

    def copy(self, nodes: Iterable[onnx.NodeProto], given: Mapping[str, str], prefix: str) -> dict[str, str]:
        """Add copies of nodes, and return what their tensors are called here, those that were given among them."""
        names = dict(given)
        for node in nodes:
            names.update({tensor: f"{prefix}/{tensor}" for tensor in node.output if tensor})
            self.nodes.append(_renamed(node, names, f"{prefix}/"))
        return names


class _Stages:
    """Builds the stages: the first in the graph itself, every further one in a branch of the one before.

    Args:
        network: the sentinel.
        rest: its nodes after the affine beginning.
        cut: the tensor in between.
        weights: takes what is constant.
        images: the images' share of a blend after that beginning, (batch, ...).
        overlays: the overlays' share of it in each stage, (blends, ...).
        exit_rule: when an image is through.
    """

    def __init__(
        self,
        network: _Network,
        rest: Sequence[onnx.NodeProto],
        cut: str,
        weights: _Weights,
        *,
        images: str,
        overlays: Sequence[NDArray[np.float32]],
        exit_rule: ExitRule,
    ) -> None:
        self._network = network
        self._rest = rest
        self._cut = cut
        self._weights = weights
        self._images = images
        self._overlays = overlays
        self._rule = exit_rule
        needed = {network.logits or _ROWS}
        kept = []
        for node in reversed(rest):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        self._to_logits = kept[::-1]

    def first(self, part: _Part) -> tuple[str, str]:
        """Add all stages to the graph.

        Returns:
            The entropies, (batch, blends), 0 where one did not run, and how many blends ran, (batch,).
        """
        entropies = self._measure(part, self._images, 0)
        rows = part.add("Gather", part.add("Shape", entropies), self._numbers("rows_of_shape", 0))
        ran = numpy_helper.from_array(np.array([len(self._overlays[0])], np.int32))
        return self._further(part, entropies, part.add("ConstantOfShape", rows, value=ran), 1)

    def from_probabilities(self, part: _Part, probabilities: str) -> str:
        """Return the entropies of rows of probabilities, (rows,), in nats; see `perturbation_entropies_bits`."""
        one = self._weights.add("one", np.float32(1.0))
        zero = part.add("Equal", probabilities, self._weights.add("nothing", np.float32(0.0)))
        logs = part.add("Log", part.add("Where", zero, one, probabilities))
        terms = part.add("Mul", probabilities, logs)
        return part.add("Neg", part.add("ReduceSum", terms, self._numbers("last_axis", -1), keepdims=0))

    def to_bits(self, part: _Part, nats: str) -> str:
        """Return entropies in bits."""
        return part.add("Mul", nats, self._weights.add("bits_per_nat", np.float32(1.0 / math.log(2.0))))

    def _further(self, part: _Part, entropies: str, counts: str, stage: int) -> tuple[str, str]:
        """Add the stages from `stage` on, given the entropies of those before."""
        if stage == len(self._overlays):
            return entropies, counts
        # What is not a number is not enough either: it goes through every stage, to be rejected.
        total = part.add("ReduceSum", self._counted(part, entropies), self._numbers("last_axis", -1), keepdims=0)
        enough = self._weights.add("enough", np.float32(self._rule.enough))
        undecided = part.add("Not", part.add("Greater", total, enough))
        rows = part.add("Transpose", part.add("NonZero", undecided), perm=[1, 0])  # (images, 1)
        there_are = part.add("Greater", part.add("Size", rows), self._weights.add("zero", np.array(0, np.int64)))

        then, blends = _Part(f"stage_{stage + 1}"), len(self._overlays[stage])
        found = self._measure(then, then.add("GatherND", self._images, rows), stage)
        images = then.add("Shape", undecided)
        shape = then.add("Concat", images, self._numbers(f"blends_{stage + 1}", blends), axis=0)
        nothing = then.add("ConstantOfShape", shape, value=numpy_helper.from_array(np.zeros(1, np.float32)))
        joined = then.add("Concat", entropies, then.add("ScatterND", nothing, rows, found), axis=1)
        many = self._weights.add(f"blends_{stage + 1}_int32", np.array(blends, np.int32))
        ran = then.add("Mul", then.add("Cast", undecided, to=TensorProto.INT32), many)
        further = _branch(then, *self._further(then, joined, then.add("Add", counts, ran), stage + 1))
        after = _Part(f"after_{stage}")
        missing = sum(map(len, self._overlays[stage:]))
        padded = after.add("Pad", entropies, self._numbers(f"pads_{missing}", 0, 0, 0, missing))
        done = _branch(after, padded, counts)

        outputs = [f"stripwire/{part.name}/{name}" for name in ("entropies", "counts")]
        choice = helper.make_node("If", [there_are], outputs, f"stripwire/{part.name}/If")
        choice.attribute.append(helper.make_attribute("then_branch", further))
        choice.attribute.append(helper.make_attribute("else_branch", done))
        part.nodes.append(choice)
        return outputs[0], outputs[1]

    def _counted(self, part: _Part, entropies: str) -> str:
        """Return what `ExitRule.counted` does."""
        if self._rule.bar_bits is None:
            return entropies
        bar = self._weights.add("bar_bits", np.float32(self._rule.bar_bits))
        return part.add("Cast", part.add("Greater", entropies, bar), to=TensorProto.FLOAT)

    def _measure(self, part: _Part, images: str, stage: int) -> str:
        """Blend images with the overlays of a stage and return the entropies, (images, overlays), in bits."""
        shares = self._overlays[stage]
        overlays = self._weights.add(f"overlays_{stage + 1}", shares)
        blends = part.add("Add", part.add("Unsqueeze", images, self._numbers("axis_1", 1)), overlays)
        blends = part.add("Reshape", blends, self._numbers("blend_shape", -1, *shares.shape[1:]))
        names = part.copy(self._to_logits, {self._cut: blends}, f"stage_{stage + 1}")
        if self._network.logits is None:
            nats = self.from_probabilities(part, names[_ROWS])
        else:
            nats = self._from_logits(part, names[self._network.logits])
        return part.add(
            "Reshape", self.to_bits(part, nats), self._numbers(f"blends_{stage + 1}_a_row", -1, len(shares))
        )

    def _from_logits(self, part: _Part, logits: str) -> str:
        """Return the entropies of rows of logits, (rows,), in nats."""
        last = self._numbers("last_axis", -1)
        below = part.add("Sub", logits, part.add("ReduceMax", logits, axes=[-1]))
        odds = part.add("Exp", below)
        total = part.add("ReduceSum", odds, last, keepdims=0)
        weighted = part.add("ReduceSum", part.add("Mul", odds, below), last, keepdims=0)
        return part.add("Sub", part.add("Log", total), part.add("Div", weighted, total))

    def _numbers(self, name: str, *values: int) -> str:
        return self._weights.add(name, np.array(values, np.int64))


def _branch(part: _Part, entropies: str, counts: str) -> onnx.GraphProto:
    """Return a part as a branch of `If` that yields these tensors, made in it or before."""
    outputs = [part.add("Identity", entropies), part.add("Identity", counts)]
    return helper.make_graph(
        part.nodes,
        part.name,
        [],
        [
            helper.make_tensor_value_info(outputs[0], TensorProto.FLOAT, ["batch", "blends"]),
            helper.make_tensor_value_info(outputs[1], TensorProto.INT32, ["batch"]),
        ],
    )
