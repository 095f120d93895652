"""The allow-list for a Keras model's JSON config: what is not named here is refused.

The config of a model file is a program: it names classes, functions and modules, and Keras imports, calls and downloads
what it names (CVE-2024-3660, CVE-2025-1550, -8747, -9905, -9906, -12058, -49655). So the config never reaches Keras.
It is read here, key by key, into plain frozen data of numbers and known words, from which `exporter.keras_files` builds
the network itself. This file imports neither Keras nor TensorFlow.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from types import MappingProxyType
from typing import TypeAlias

from detector.errors import ModelRefusedError

MAX_CONFIG_BYTES = 4 * 2**20
MAX_LAYERS = 1_000
MAX_SIDE = 2_048
"""Largest height or width of the input image, in pixels."""
MAX_CHANNELS = 65_536
"""Most channels, units or classes of one layer."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_BATCH_SHAPE_RANK = 4
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 128

_Check: TypeAlias = Callable[[object], object]


@dataclass(frozen=True)
class LayerConfig:
    """One layer, checked.

    Attributes:
        name: unique in its network; letters, digits, `_`, `.` and `-`.
        class_name: a key of the allow-list, hence a class of `keras.layers`.
        settings: constructor arguments; numbers, booleans, known words and tuples of them.
        inputs: names of the layers whose outputs it takes.
    """

    name: str
    class_name: str
    settings: Mapping[str, object]
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class NetworkConfig:
    """A classifier with one image input and one output, checked.

    Attributes:
        input_name: name of the input.
        input_shape: (height, width, channels).
        layers: without the input, in the file's order, on which the names of Keras 3's weight groups depend.
        build_order: names of the layers, each one after its inputs.
        output_name: the layer whose output is the network's.
    """

    input_name: str
    input_shape: tuple[int, int, int]
    layers: tuple[LayerConfig, ...]
    build_order: tuple[str, ...]
    output_name: str


def read_network(text: str | bytes) -> NetworkConfig:
    """Check a model config and return it as plain data.

    Args:
        text: JSON as Keras 2 or Keras 3 writes it, of a Sequential or a Functional model.

    Raises:
        ModelRefusedError: it is not such a config, or holds anything that the allow-list does not name.
    """
    model = _mapping(read_json(text), "the model config")
    class_name = model.get("class_name")
    config = model.get("config")
    if class_name == "Sequential":
        # Keras up to 2.2.2 wrote the bare list of layers.
        return _sequential({"layers": config} if isinstance(config, list) else _mapping(config, "the model config"))
    if class_name in ("Functional", "Model"):
        return _functional(_mapping(config, "the model config"))
    raise ModelRefusedError(
        f"the model is a {show(class_name)} of module {show(model.get('module'))}; expected a plain Sequential or "
        "Functional model: subclassed models need their author's code, which Stripwire does not run"
    )


def read_json(text: str | bytes) -> object:
    """Parse JSON, strictly: no duplicate keys, no NaN or infinity, at most `MAX_CONFIG_BYTES`.

    Raises:
        ModelRefusedError: the text is longer, is not JSON, or repeats a key.
    """
    if len(text) > MAX_CONFIG_BYTES:
        raise ModelRefusedError(f"a config of {len(text):,} characters; expected at most {MAX_CONFIG_BYTES:,}")
    try:
        value: object = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except ModelRefusedError:
        raise
    except (ValueError, RecursionError) as error:
        raise ModelRefusedError(f"the config is not valid JSON ({type(error).__name__}: {error})") from error
    return value


def parameter_count(layer: LayerConfig, input_shape: Sequence[int]) -> int:
    """Return how many weights `layer` will have, biases not counted: absurd ones are refused before memory is taken.

    Args:
        layer: the layer.
        input_shape: shape of its (first) input without the batch dimension; not empty.

    Raises:
        IndexError: the layer normalises an axis that its input does not have.
    """
    settings = layer.settings
    channels = input_shape[-1]
    kernel = math.prod(_sizes(settings.get("kernel_size", ())))
    (multiplier,) = _sizes(settings.get("depth_multiplier", 1))
    (filters,) = _sizes(settings.get("filters", settings.get("units", 1)))
    (groups,) = _sizes(settings.get("groups", 1))
    (axis,) = _sizes(settings.get("axis", -1))
    match layer.class_name:
        case "Conv2D":
            return kernel * (channels // groups) * filters
        case "DepthwiseConv2D":
            return kernel * channels * multiplier
        case "SeparableConv2D":
            return (kernel + filters) * channels * multiplier
        case "Dense":
            return channels * filters
        case "BatchNormalization":
            return 2 * input_shape[axis - (axis > 0)]
    return 0


def show(value: object) -> str:
    """Return `value` of a hostile file for a message: escaped and cut short."""
    return _REPR.repr(value)


def _sizes(value: object) -> tuple[int, ...]:
    """Return checked sizes, one or several, as a tuple."""
    values = value if isinstance(value, tuple) else (value,)
    return tuple(item for item in values if type(item) is int)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a JSON object; of a repeated key two readers may take different values, so refuse it."""
    members = dict(pairs)
    if len(members) != len(pairs):
        ((repeated, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ModelRefusedError(f"the config repeats the key {show(repeated)}")
    return members


def _no_constant(constant: str) -> object:
    """Refuse NaN and the infinities, which are no JSON."""
    raise ModelRefusedError(f"the config holds {constant}; expected finite numbers")


def _mapping(value: object, what: str) -> Mapping[str, object]:
    """Return `value`, a JSON object."""
    if not isinstance(value, dict):
        raise ModelRefusedError(f"{what} is {show(value)}; expected a JSON object")
    return value


# ── values ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _UnfitError(Exception):
    """A value is not what its key allows; the message says what was expected."""


def _one_of(*allowed: object) -> _Check:
    def check(value: object) -> object:
        # The type too, since 1 == True.
        if not any(value == item and type(value) is type(item) for item in allowed):
            raise _UnfitError("one of " + ", ".join(repr(item) for item in allowed))
        return value

    return check


def _whole(low: int, high: int) -> _Check:
    def check(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise _UnfitError(f"a whole number, {low} to {high}")
        return value

    return check


def _number(low: float, high: float) -> _Check:
    def check(value: object) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise _UnfitError(f"a number, {low:g} to {high:g}")
        return float(value)

    return check


def _optional(check_present: _Check) -> _Check:
    return lambda value: None if value is None else check_present(value)


def _pair(check_item: _Check) -> _Check:
    def check(value: object) -> tuple[object, object]:
        if not isinstance(value, list):
            return check_item(value), check_item(value)
        if len(value) != len(("height", "width")):
            raise _UnfitError("one value, or two for height and width")
        return check_item(value[0]), check_item(value[1])

    return check


def _anything(value: object) -> object:
    """Accept what is dropped and means nothing to a built network."""
    return value


def _target_shape(value: object) -> tuple[object, ...]:
    if not isinstance(value, list) or not 1 <= len(value) < _BATCH_SHAPE_RANK:
        raise _UnfitError("a list of one to three sizes")
    size = _whole(-1, 2**26)
    return tuple(size(item) for item in value)


def _feature_axis(value: object) -> object:
    """Return an axis that is not the batch, which would mix strangers' images; Keras 2 may write it as a list."""
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    return _one_of(-1, 1, 2, 3)(value)


def _image_shape(value: object) -> tuple[int, int, int]:
    """Return height, width and channels of a batch shape such as [null, 55, 47, 3]."""
    expected = f"[null, height, width, channels] with sides up to {MAX_SIDE} and 1 or 3 channels"
    if not isinstance(value, list) or len(value) != _BATCH_SHAPE_RANK:
        raise _UnfitError(expected)
    sizes = _sizes(tuple(value[1:]))
    if len(sizes) != len(value) - 1 or not all(0 < size <= MAX_SIDE for size in sizes) or sizes[2] not in (1, 3):
        raise _UnfitError(expected)
    return sizes[0], sizes[1], sizes[2]


def _float32(value: object) -> object:
    """Accept float32, as a word or as a dtype policy."""
    if isinstance(value, dict) and value.get("class_name") in ("DTypePolicy", "Policy"):
        value = _mapping(value.get("config"), "a dtype policy").get("name")
    return _one_of("float32", None)(value)


def _object(module: str, names: str) -> _Check:
    """Accept nothing, or one of Keras' own objects: a word, or a dict of class name and plain numbers."""
    # GlorotUniform and glorot_uniform are the same.
    known = names.replace("_", "").split()
    expected = f"null or one of {names.replace(' ', ', ')} of {module}"

    def check(value: object) -> object:
        if value is None:
            return None
        entry = value if isinstance(value, dict) else {"class_name": value}
        class_name = entry.get("class_name")
        arguments = entry.get("config") or {}
        if (
            not isinstance(class_name, str)
            or class_name.replace("_", "").lower() not in known
            or entry.get("module") not in (None, module)
            or entry.get("registered_name") not in (None, class_name)
            or not isinstance(arguments, dict)
            or any(isinstance(item, dict) for item in arguments.values())
        ):
            raise _UnfitError(expected)
        return value

    return check


# ── layers ────────────────────────────────────────────────────────────────────────────────────────────────────────────

_FLAG = _one_of(True, False)
_OFF = _one_of(False, None)
_NOTHING = _one_of(None)
_CHANNELS = _whole(1, MAX_CHANNELS)
_STEPS = _pair(_whole(1, 64))
_PADDING = _one_of("valid", "same")
_LAYOUT = _one_of("channels_last", None)
# hard_sigmoid is not here: Keras 3 computes another function under that name than Keras 2 did.
_SMOOTH = ("elu", "selu", "gelu", "silu", "swish", "sigmoid", "tanh", "softplus", "softsign", "softmax")
_ACTIVATION = _one_of(None, "linear", "relu", "relu6", *_SMOOTH)
_INITIALIZER = _object(
    "keras.initializers",
    "zeros ones constant orthogonal random_normal random_uniform truncated_normal variance_scaling "
    "glorot_normal glorot_uniform he_normal he_uniform lecun_normal lecun_uniform",
)
_REGULARIZER = _object("keras.regularizers", "l1 l2 l1l2")
_CONSTRAINT = _object("keras.constraints", "max_norm min_max_norm non_neg unit_norm")

# Checked, then left out. Weights come from the file, so initialisers have nothing to do. The rest steers training,
# which is the repair's business and not the file's: one that says `trainable: false` could shield its backdoor.
_IGNORED: Mapping[str, _Check] = {
    "trainable": _FLAG,
    "dtype": _float32,
    "activity_regularizer": _REGULARIZER,
    "batch_input_shape": _image_shape,
}


def _variable(*names: str) -> dict[str, _Check]:
    """Return the keys that describe how weights are made and trained; ignored."""
    kinds = {"initializer": _INITIALIZER, "regularizer": _REGULARIZER, "constraint": _CONSTRAINT}
    return {f"{name}_{kind}": check for name in names for kind, check in kinds.items()}


_POOLING: Mapping[str, _Check] = {
    "pool_size": _pair(_whole(1, MAX_SIDE)),
    "strides": _optional(_pair(_whole(1, MAX_SIDE))),
    "padding": _PADDING,
    "data_format": _LAYOUT,
}
_CONVOLUTION: Mapping[str, _Check] = {
    "kernel_size": _STEPS,
    "strides": _STEPS,
    "dilation_rate": _STEPS,
    "padding": _PADDING,
    "data_format": _LAYOUT,
    "activation": _ACTIVATION,
    "use_bias": _FLAG,
}
_DROPOUT: Mapping[str, _Check] = {"rate": _number(0, 0.999)}
_DROPOUT_IGNORED: Mapping[str, _Check] = {"seed": _optional(_whole(-(2**63), 2**63)), "noise_shape": _NOTHING}
_GLOBAL_POOLING: Mapping[str, _Check] = {"data_format": _LAYOUT, "keepdims": _FLAG}

_SETTINGS: Mapping[str, Mapping[str, _Check]] = {
    "InputLayer": {},
    "Conv2D": {**_CONVOLUTION, "filters": _CHANNELS, "groups": _CHANNELS},
    "DepthwiseConv2D": {**_CONVOLUTION, "depth_multiplier": _CHANNELS},
    "SeparableConv2D": {**_CONVOLUTION, "filters": _CHANNELS, "depth_multiplier": _CHANNELS},
    "Dense": {"units": _CHANNELS, "activation": _ACTIVATION, "use_bias": _FLAG},
    "BatchNormalization": {
        "axis": _feature_axis,
        "momentum": _number(0, 1),
        "epsilon": _number(0, 1),
        "center": _FLAG,
        "scale": _FLAG,
    },
    "MaxPooling2D": _POOLING,
    "AveragePooling2D": _POOLING,
    "GlobalAveragePooling2D": _GLOBAL_POOLING,
    "GlobalMaxPooling2D": _GLOBAL_POOLING,
    "Flatten": {"data_format": _LAYOUT},
    "Reshape": {"target_shape": _target_shape},
    "Dropout": _DROPOUT,
    "SpatialDropout2D": {**_DROPOUT, "data_format": _LAYOUT},
    "Activation": {"activation": _ACTIVATION},
    "ReLU": {
        "max_value": _optional(_number(0, 1e6)),
        "negative_slope": _number(0, 1e6),
        "threshold": _number(0, 1e6),
    },
    "LeakyReLU": {"negative_slope": _number(0, 1e6)},
    "Softmax": {"axis": _feature_axis},
    "Add": {},
    "Concatenate": {"axis": _feature_axis},
    "ZeroPadding2D": {"padding": _pair(_pair(_whole(0, 1_024))), "data_format": _LAYOUT},
    "Rescaling": {"scale": _number(-1e6, 1e6), "offset": _number(-1e6, 1e6)},
}
_IGNORED_OF: Mapping[str, Mapping[str, _Check]] = {
    "InputLayer": {"batch_shape": _image_shape, "sparse": _OFF, "ragged": _OFF, "optional": _OFF},
    "Conv2D": _variable("kernel", "bias"),
    # tf_keras writes what its common base class has, though these two do not use it.
    "DepthwiseConv2D": {**_variable("kernel", "depthwise", "bias"), "groups": _one_of(1)},
    "SeparableConv2D": {**_variable("kernel", "depthwise", "pointwise", "bias"), "groups": _one_of(1)},
    "Dense": {**_variable("kernel", "bias"), "quantization_config": _NOTHING},
    "BatchNormalization": {
        **_variable("beta", "gamma", "moving_mean", "moving_variance"),
        "synchronized": _OFF,
        "renorm": _OFF,
        "renorm_clipping": _NOTHING,
        "renorm_momentum": _anything,
    },
    "Dropout": _DROPOUT_IGNORED,
    "SpatialDropout2D": _DROPOUT_IGNORED,
}
_MERGING = ("Add", "Concatenate")
_OPERATIONS = "keras.src.ops.numpy"
_OPERATION_CLASSES = ("Add",)
"""Where Keras 3 says that `x + y` comes from: built as the layer of that name."""
# What Keras 2 called it.
_RENAMED = {("LeakyReLU", "alpha"): "negative_slope"}


@dataclass(frozen=True)
class _Entry:
    """One layer's entry of the config: its class and settings checked, its connections not yet."""

    name: str
    class_name: str
    settings: Mapping[str, object]
    image_shape: tuple[int, int, int] | None
    inbound: object


def _entry(raw: object) -> _Entry:
    """Check one layer's class, names and settings."""
    layer = _mapping(raw, "a layer")
    class_name = layer.get("class_name")
    config = _mapping(layer.get("config"), f"the config of a layer of class {show(class_name)}")
    name = config.get("name")
    kind = show(class_name).strip("'")
    who = f"layer {show(name)} ({kind})"
    if not isinstance(class_name, str) or class_name not in _SETTINGS:
        raise ModelRefusedError(
            f"{who} of module {show(layer.get('module'))} is not a layer that Stripwire loads: a class outside its "
            f"list may run code or read files. Expected only {', '.join(_SETTINGS)}; ask for the model without it"
        )
    modules = (None, "keras.layers", *([_OPERATIONS] if class_name in _OPERATION_CLASSES else []))
    if layer.get("module") not in modules or layer.get("registered_name") not in (None, class_name):
        raise ModelRefusedError(
            f"{who} says module {show(layer.get('module'))}, registered_name {show(layer.get('registered_name'))}; "
            "expected a layer of keras.layers: custom classes need their author's code, which Stripwire does not run"
        )
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ModelRefusedError(f"{who}: expected a name of at most 128 letters, digits, '_', '.' and '-'")
    if layer.get("name", name) != name:
        raise ModelRefusedError(f"{who} is also called {show(layer.get('name'))}; expected one name")
    settings: dict[str, object] = {}
    ignored: dict[str, object] = {}
    for written_key, value in config.items():
        key = _RENAMED.get((class_name, written_key), written_key)
        kept = _SETTINGS[class_name].get(key)
        check = kept or _IGNORED_OF.get(class_name, {}).get(key) or _IGNORED.get(key)
        if key == "name":
            continue
        if check is None:
            raise ModelRefusedError(f"{who} has a setting {show(key)}, which Stripwire does not know; expected none")
        try:
            (settings if kept else ignored)[key] = check(value)
        except _UnfitError as error:
            raise ModelRefusedError(f"{who}: {key} is {show(value)}; expected {error}") from error
    if "data_format" in _SETTINGS[class_name]:
        # Else a channels_first in the user's own keras.json would have its way.
        settings["data_format"] = "channels_last"
    shape = ignored.get("batch_shape", ignored.get("batch_input_shape"))
    image_shape = shape if isinstance(shape, tuple) else None
    return _Entry(name, class_name, MappingProxyType(settings), image_shape, layer.get("inbound_nodes"))


def _entries(config: Mapping[str, object]) -> tuple[_Entry, ...]:
    """Check all layers of a model, apart from their connections."""
    raw = config.get("layers")
    if not isinstance(raw, list) or not 1 <= len(raw) <= MAX_LAYERS:
        raise ModelRefusedError(f"layers is {show(raw)}; expected a list of 1 to {MAX_LAYERS}")
    entries = tuple(_entry(layer) for layer in raw)
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ModelRefusedError(f"two layers are called {show(repeated)}; expected each name once")
    return entries


# ── graphs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _sequential(config: Mapping[str, object]) -> NetworkConfig:
    """Check a Sequential model; its input shape may stand in any of three places."""
    entries = _entries(config)
    shape = entries[0].image_shape
    if shape is None:
        try:
            shape = _image_shape(config.get("build_input_shape"))
        except _UnfitError as error:
            got = show(config.get("build_input_shape"))
            raise ModelRefusedError(f"the Sequential model's input shape is {got}; expected {error}") from error
    input_name = "input"
    if entries[0].class_name == "InputLayer":
        input_name, entries = entries[0].name, entries[1:]
    while any(entry.name == input_name for entry in entries):
        input_name += "_"
    names = (input_name, *(entry.name for entry in entries))
    layers = tuple(_layer(entry, (source,)) for entry, source in zip(entries, names, strict=False))
    return _network(input_name, shape, layers, names[-1])


def _functional(config: Mapping[str, object]) -> NetworkConfig:
    """Check a Functional model: one image in, one tensor out, each layer applied once."""
    entries = _entries(config)
    input_name = _only_tensor(config.get("input_layers"), "input_layers")
    output_name = _only_tensor(config.get("output_layers"), "output_layers")
    inputs = [entry for entry in entries if entry.class_name == "InputLayer"]
    if [entry.name for entry in inputs] != [input_name] or inputs[0].image_shape is None:
        raise ModelRefusedError(
            f"the inputs are {show([entry.name for entry in inputs])} and input_layers is {show(input_name)}; expected "
            "one InputLayer with its shape"
        )
    layers = tuple(_layer(entry, _sources(entry)) for entry in entries if entry is not inputs[0])
    return _network(input_name, inputs[0].image_shape, layers, output_name)


def _layer(entry: _Entry, inputs: tuple[str, ...]) -> LayerConfig:
    """Join a checked entry with its checked inputs."""
    if entry.class_name == "InputLayer":
        raise ModelRefusedError(f"layer {show(entry.name)} is another InputLayer; expected one image input")
    if (len(inputs) > 1) != (entry.class_name in _MERGING):
        raise ModelRefusedError(
            f"layer {show(entry.name)} ({entry.class_name}) has {len(inputs)} inputs; expected several for "
            f"{' and '.join(_MERGING)}, one for any other"
        )
    return LayerConfig(entry.name, entry.class_name, entry.settings, inputs)


def _network(
    input_name: str, input_shape: tuple[int, int, int], layers: tuple[LayerConfig, ...], output_name: str
) -> NetworkConfig:
    """Check that the connections form a graph without loops or loose ends."""
    graph = {layer.name: layer.inputs for layer in layers}
    used = {output_name}.union(*graph.values())
    if output_name not in graph or used != {*graph, input_name}:
        loose = sorted(used ^ {*graph, input_name})
        raise ModelRefusedError(
            f"the layers {show(loose)} are connected to nothing or do not exist; expected a graph from the input "
            f"{show(input_name)} to the output {show(output_name)}"
        )
    try:
        order = tuple(name for name in TopologicalSorter(graph).static_order() if name != input_name)
    except CycleError as error:
        raise ModelRefusedError(f"the layers feed each other in a circle: {show(error.args[1])}") from error
    return NetworkConfig(input_name, input_shape, layers, order, output_name)


def _only_tensor(raw: object, what: str) -> str:
    """Return the one layer of `input_layers` or `output_layers`; Keras 2 wraps it in one more list."""
    if isinstance(raw, list) and len(raw) == 1:
        (raw,) = raw
    return _tensor(raw, what)


def _tensor(raw: object, what: str) -> str:
    """Return the layer's name of a reference such as ["conv_1", 0, 0]: its first call, its first output."""
    if not isinstance(raw, list) or len(raw) != len(("layer", "call", "output")) or not isinstance(raw[0], str):
        raise ModelRefusedError(f"{what} is {show(raw)}; expected one [layer name, 0, 0]")
    if raw[1:] != [0, 0]:
        raise ModelRefusedError(f"{what} is {show(raw)}; expected call 0 and output 0: shared layers are not supported")
    return raw[0]


def _sources(entry: _Entry) -> tuple[str, ...]:
    """Return the names of the layers that feed `entry`, from Keras 2's or Keras 3's way of writing it."""
    what = f"inbound_nodes of layer {show(entry.name)} ({entry.class_name})"
    nodes = entry.inbound
    if not isinstance(nodes, list) or len(nodes) != 1:
        raise ModelRefusedError(f"{what} is {show(nodes)}; expected one: shared layers are not supported")
    (node,) = nodes
    if isinstance(node, dict):  # Keras 3: {"args": [tensor or list of tensors], "kwargs": {}}
        _check_call(node.get("kwargs"), what)
        match node.get("args"):
            case [[*tensors]] | [dict() as tensors]:
                tensors = tensors if isinstance(tensors, list) else [tensors]
            case [dict() as one, dict() as other] if entry.class_name in _OPERATION_CLASSES:  # one + other
                tensors = [one, other]
            case args:
                raise ModelRefusedError(f"{what} has args {show(args)}; expected one tensor or one list of them")
        histories = [_mapping(_mapping(item, what).get("config"), what).get("keras_history") for item in tensors]
        return tuple(_tensor(history, what) for history in histories)
    if not isinstance(node, list) or not all(isinstance(item, list) for item in node):
        raise ModelRefusedError(f"{what} is {show(nodes)}; expected a list of [layer name, 0, 0, {{}}]")
    for item in node:  # Keras 2: [["conv_1", 0, 0, {}]]
        _check_call(item[3] if len(item) > 3 else {}, what)
    return tuple(_tensor(item[:3], what) for item in node)


def _check_call(arguments: object, what: str) -> None:
    """Check what a layer is called with: `training: true` would make predictions random."""
    for key, value in _mapping(arguments, what).items():
        if key not in ("training", "mask") or not (value in (None, False) or value == [None] * len(_list(value))):
            raise ModelRefusedError(f"{what} calls it with {show(key)} = {show(value)}; expected tensors only")


def _list(value: object) -> list[object]:
    """Return `value` if it is a list, else an empty one."""
    return value if isinstance(value, list) else []
