"""Read a Keras classifier from a file that may be hostile.

Whoever planted a backdoor in a network may have put a trap into its file too, so nothing of the file ever reaches
`keras.models.load_model`: the config goes through the allow-list of `exporter.keras_config`, the weights come as plain
numbers from the child process of `exporter.hdf5`, and the network is built here.
"""

from __future__ import annotations

import io
import math
import re
import shutil
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from detector.errors import ModelRefusedError
from exporter.architectures import deepid
from exporter.hdf5 import Hdf5Contents, read_hdf5
from exporter.keras_config import (
    MAX_CHANNELS,
    MAX_CONFIG_BYTES,
    LayerConfig,
    NetworkConfig,
    parameter_count,
    read_json,
    read_network,
    show,
)

ARCHITECTURES: Mapping[str, Callable[[int], keras.Model]] = {"deepid": deepid}
"""Builders of the networks whose weights may come without a config; each takes the number of classes."""

MAX_FILE_BYTES = 4 * 2**30
MAX_ACTIVATIONS = 2**26
"""Most numbers in one layer's output for one image."""
MAX_TERMS = 1_000
"""Most terms of a sum, those of the sums that it adds counted one by one."""

_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"
_EXPANSION = 100
_SMALL = 1_000_000
_MAY_HAND_SUMS_ON = ("Activation", "Dropout", "Flatten", "Reshape", "SpatialDropout2D")
_MEMBERS = {
    "config.json": MAX_CONFIG_BYTES,
    "metadata.json": 2**16,
    "model.weights.h5": MAX_FILE_BYTES,
}
# What zipfile, zlib, Keras and TensorFlow raise at damaged input.
_DAMAGE = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, NotImplementedError, OSError),
    *(RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, tf.errors.OpError),
)

_Weight: TypeAlias = "NDArray[np.float32] | str"
"""A weight's numbers, or why they cannot be used."""
_Finder: TypeAlias = Callable[[keras.Layer], Mapping[str, _Weight]]
"""Finds a layer's weights in a file, by the names of the layer's variables."""


def load_model(path: Path, *, architecture: str | None = None) -> keras.Model:
    """Read an image classifier, whatever else its file may try.

    Read are full `.h5` files of Keras 2 and 3, `.keras` files of Keras 3, and weights-only `.h5` files of a network
    that Stripwire knows by name. Compilation and optimizer state are ignored, and so is all that steers training.

    Args:
        path: the file. Told apart by content, not by its name.
        architecture: the network that a weights-only file belongs to; a key of `ARCHITECTURES`. A file that says itself
            what network it holds does not need it, and it is not used then.

    Returns:
        The network, not compiled: one float32 input (batch, height, width, channels), one output (batch, classes).

    Raises:
        ModelRefusedError: the file is unsafe, damaged, too large, of another kind, or not of a supported network.
    """
    if architecture is not None and architecture not in ARCHITECTURES:
        raise ModelRefusedError(f"architecture is {architecture!r}; expected one of {', '.join(ARCHITECTURES)}")
    try:
        return _load(path, architecture)
    except ModelRefusedError as error:
        raise ModelRefusedError(f"{path}: {error}") from error
    except _DAMAGE as error:
        raise ModelRefusedError(
            f"{path}: unreadable or damaged ({type(error).__name__}: {error}); expected a whole .h5 or .keras file: "
            "fetch or save it again"
        ) from error


def _load(path: Path, architecture: str | None) -> keras.Model:
    """Tell the kind of file by its first bytes and load it."""
    if path.is_dir():
        kind = "a SavedModel" if (path / "saved_model.pb").exists() else "a folder"
        raise ModelRefusedError(f"{kind}; expected one file: load it where you trust it and save it as .h5")
    if not path.is_file():
        raise ModelRefusedError("no such file; expected a Keras model, .h5 or .keras")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ModelRefusedError(f"{path.stat().st_size:,} bytes; expected at most {MAX_FILE_BYTES:,}")
    # One open file from here on, by descriptor: it cannot be exchanged between two looks at it.
    with path.open("rb") as stream:
        magic = stream.read(len(_HDF5_MAGIC))
        stream.seek(0)
        if magic == _HDF5_MAGIC:
            return _load_hdf5(stream, architecture)
        if magic.startswith(_ZIP_MAGIC):
            return _load_archive(stream)
    if magic.startswith(_PICKLE_MAGIC):
        raise ModelRefusedError("a pickle, which runs code when it is opened; expected a Keras model, .h5 or .keras")
    raise ModelRefusedError(f"starts with {magic!r}: not a Keras model; expected an .h5 or .keras file")


def _load_hdf5(stream: BinaryIO, architecture: str | None) -> keras.Model:
    """Load an `.h5` file, with or without a config."""
    contents = read_hdf5(stream)
    if contents.config is not None:
        return _restore(read_network(contents.config), contents)
    if architecture is None:
        raise ModelRefusedError(
            "has weights only and does not say of which network; expected --architecture, one of "
            f"{', '.join(ARCHITECTURES)}, or a file of the full model"
        )
    build = ARCHITECTURES[architecture]
    # Its layers' names and places do not depend on the number of classes, which the output's bias tells.
    template = build(2)
    bias = _finder(contents, template.layers)(template.layers[-1]).get("bias")
    classes = bias.size if isinstance(bias, np.ndarray) and bias.ndim == 1 else 0
    if not 2 <= classes <= MAX_CHANNELS:
        got = bias.shape if isinstance(bias, np.ndarray) else bias
        raise ModelRefusedError(f"the output's bias is {got}; expected 2 to {MAX_CHANNELS} classes of {architecture}")
    model = build(classes)
    _fill(model.layers, contents)
    return model


def _load_archive(stream: BinaryIO) -> keras.Model:
    """Load a `.keras` file; its names never become paths, and its weights go through a nameless temporary file."""
    # zipfile reads the whole table of contents first: let it be one that three files need.
    stream.seek(-min(stream.seek(0, io.SEEK_END), 42), io.SEEK_END)
    tail = stream.read()
    if tail[-22:-18] != b"PK\x05\x06" or tail[:4] == b"PK\x06\x07" or int.from_bytes(tail[-10:-6], "little") > 2**12:
        raise ModelRefusedError(
            "its table of contents is missing, or too long for the three members of a .keras file; is it complete?"
        )
    with zipfile.ZipFile(stream) as archive, tempfile.TemporaryFile() as weights:
        members = {info.filename: info for info in archive.infolist()}
        if sorted(members) != sorted(_MEMBERS) or len(archive.infolist()) != len(members):
            found = show(sorted(info.filename for info in archive.infolist()))
            raise ModelRefusedError(f"holds {found}; expected exactly {', '.join(_MEMBERS)} of a .keras file")
        for info in members.values():
            _check_size(info)
        metadata = read_json(archive.read("metadata.json"))
        version = metadata.get("keras_version") if isinstance(metadata, dict) else None
        if not isinstance(version, str) or not version.startswith("3."):
            raise ModelRefusedError(
                f"a .keras file of Keras {show(version)}, expected 3: load it with the Keras 2 or tf_keras that wrote "
                "it, where you trust it, and save it as .h5"
            )
        network = read_network(archive.read("config.json"))
        with archive.open("model.weights.h5") as member:
            shutil.copyfileobj(member, weights)
        return _restore(network, read_hdf5(weights))


def _check_size(info: zipfile.ZipInfo) -> None:
    """Check what a member says it unpacks to, more than which zipfile does not read."""
    limit = min(_MEMBERS[info.filename], max(2**20, _EXPANSION * info.compress_size))
    if info.file_size > limit:
        raise ModelRefusedError(
            f"{info.filename} unpacks {info.compress_size:,} bytes to {info.file_size:,}; expected at most {limit:,}"
        )


def _restore(network: NetworkConfig, contents: Hdf5Contents) -> keras.Model:
    """Build the network of a full model file and give it its weights."""
    held = sum(value.size for value in contents.weights.values() if isinstance(value, np.ndarray))
    # What a small network lacks is better told by the name of its layer, later.
    model, layers = _build(network, max(held, _SMALL))
    _fill(layers, contents)
    return model


def _build(network: NetworkConfig, most: int) -> tuple[keras.Model, list[keras.Layer]]:
    """Build the network with fresh weights; return it, and its layers in the file's order.

    Args:
        network: its checked config.
        most: how many weights it may have; one that wants more is refused before it takes memory.
    """
    tensors = {network.input_name: keras.Input(network.input_shape, name=network.input_name, dtype="float32")}
    configs = {layer.name: layer for layer in network.layers}
    layers = {}
    parameters = 0
    terms: Counter[str] = Counter()
    for name in network.build_order:
        config = configs[name]
        inputs = [tensors[source] for source in config.inputs]
        try:
            parameters += parameter_count(config, inputs[0].shape[1:])
            if parameters > most:
                raise ModelRefusedError(
                    f"it takes the network to {parameters:,} parameters; expected at most {most:,}, going by the "
                    "weights in this file"
                )
            terms[name] = _terms(config, terms)
            layers[name] = getattr(keras.layers, config.class_name)(name=name, dtype="float32", **config.settings)
            tensors[name] = layers[name](inputs if len(inputs) > 1 else inputs[0])
        except _DAMAGE as error:
            raise ModelRefusedError(
                f"layer {show(name)} ({config.class_name}) does not fit its place in the network: {error}"
            ) from error
        shape = tensors[name].shape[1:]
        if not shape or None in shape or not 0 < math.prod(shape) <= MAX_ACTIVATIONS:
            raise ModelRefusedError(
                f"layer {show(name)} ({config.class_name}) puts out {shape} per image; expected known sizes and at "
                f"most {MAX_ACTIVATIONS:,} numbers"
            )
    output = tensors[network.output_name]
    if len(output.shape) != len(("batch", "classes")) or output.shape[1] < 2:
        raise ModelRefusedError(f"the output is {output.shape}; expected (batch, classes) with 2 classes or more")
    model = keras.Model(tensors[network.input_name], output)
    return model, [layers[layer.name] for layer in network.layers]


def _terms(config: LayerConfig, terms: Mapping[str, int]) -> int:
    """Return how many terms a layer's output has where sums of sums are written out.

    TensorFlow writes them out before it runs them: 60 layers that each add the one before to itself take for ever.
    """
    if config.class_name != "Add":
        return terms[config.inputs[0]] if config.class_name in _MAY_HAND_SUMS_ON else 1
    count = sum(max(1, terms[source]) for source in config.inputs)
    if count > MAX_TERMS:
        raise ModelRefusedError(
            f"layer {show(config.name)} sums up {count:,} terms, those of the sums that it adds counted one by one; "
            f"expected at most {MAX_TERMS:,}"
        )
    return count


# ── weights ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _fill(layers: Sequence[keras.Layer], contents: Hdf5Contents) -> None:
    """Give the layers their weights; all are checked before the first one is set."""
    find = _finder(contents, layers)
    plan = []
    for layer in layers:
        variables = {variable.name: variable for variable in layer.weights}
        found = find(layer) if variables else {}
        if found.keys() != variables.keys():
            raise ModelRefusedError(
                f"the weights of layer {show(layer.name)} are {show(sorted(found))}; expected {sorted(variables)}"
            )
        for name, variable in variables.items():
            value, who = found[name], f"the weight {name} of layer {show(layer.name)}"
            if isinstance(value, str):
                raise ModelRefusedError(f"{who} {value}; expected floats, in this file, in full and uncompressed")
            if value.shape != tuple(variable.shape):
                raise ModelRefusedError(f"{who} has shape {value.shape}; expected {tuple(variable.shape)}")
            if not np.isfinite(value).all():
                raise ModelRefusedError(f"{who} holds NaN or infinity; expected finite float32 numbers")
            plan.append((variable, value))
    for variable, value in plan:
        variable.assign(value)


def _finder(contents: Hdf5Contents, layers: Sequence[keras.Layer]) -> _Finder:
    """Return what finds a layer's weights in the file, whichever of the two layouts it has."""
    if contents.by_name:
        return lambda layer: _named_weights(contents, layer)
    # Keras 3 names groups by class, counted in the model's order: conv2d, conv2d_1, dense, ...
    seen: Counter[str] = Counter()
    groups = {}
    for layer in layers:
        base = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(layer).__name__).lower()
        groups[layer.name] = f"{base}_{seen[base]}" if seen[base] else base
        seen[base] += 1

    def find(layer: keras.Layer) -> Mapping[str, _Weight]:
        found = _under(contents, f"{groups[layer.name]}/vars/")
        names = {str(index): variable.name for index, variable in enumerate(layer.weights)}
        return {names.get(path, path): value for path, value in found}

    return find


def _named_weights(contents: Hdf5Contents, layer: keras.Layer) -> Mapping[str, _Weight]:
    """Return a layer's weights by their own names.

    They lie under the layer's name as `<scopes>/kernel:0` (Keras 2) or `<scopes>/kernel` (Keras 3).
    """
    renamed = {"depthwise_kernel": "kernel"} if type(layer) is keras.layers.DepthwiseConv2D else {}
    found: dict[str, _Weight] = {}
    for path, value in _under(contents, f"{layer.name}/"):
        leaf = path.rpartition("/")[2].removesuffix(":0")
        leaf = renamed.get(leaf, leaf)
        if leaf in found:
            raise ModelRefusedError(f"layer {show(layer.name)} has two weights {show(leaf)}; expected one")
        found[leaf] = value
    return found


def _under(contents: Hdf5Contents, prefix: str) -> list[tuple[str, _Weight]]:
    """Return what lies under a path, by the rest of the path."""
    return [(path[len(prefix) :], value) for path, value in contents.weights.items() if path.startswith(prefix)]
