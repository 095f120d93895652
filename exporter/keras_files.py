"""Read a Keras classifier from a file that may be hostile.

Whoever planted a backdoor in a network may have put a trap into its file too, so nothing of the file ever reaches
`keras.models.load_model`: the config goes through the allow-list of `exporter.keras_config`, the network is built here,
and weights are read as plain numbers from datasets that the file itself holds. HDF5 can point elsewhere in many ways
(external links, external storage, virtual datasets: CVE-2026-1669) and declare far more than it holds
(CVE-2026-0897): only ordinary, uncompressed datasets of exactly the expected shape are read.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

import h5py
import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from detector.errors import ModelRefusedError
from exporter.architectures import deepid
from exporter.keras_config import (
    MAX_CHANNELS,
    MAX_CONFIG_BYTES,
    NetworkConfig,
    parameter_count,
    read_json,
    read_network,
    show,
)

ARCHITECTURES: Mapping[str, Callable[[int], keras.Model]] = {"deepid": deepid}
"""Builders of the networks whose weights may come without a config; each takes the number of classes."""

MAX_FILE_BYTES = 4 * 2**30
MAX_ARCHIVED_WEIGHTS_BYTES = 2 * 2**30
MAX_PARAMETERS = 200_000_000
MAX_ACTIVATIONS = 2**26
"""Most numbers in one layer's output for one image."""

_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"
_EXPANSION = 100
_MEMBERS = {
    "config.json": MAX_CONFIG_BYTES,
    "metadata.json": 2**16,
    "model.weights.h5": MAX_ARCHIVED_WEIGHTS_BYTES,
}
_MAX_GROUP = 64
# What h5py, zipfile, zlib, Keras and TensorFlow raise at damaged input.
_DAMAGE = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, NotImplementedError, OSError),
    *(RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, tf.errors.OpError),
)

_Datasets: TypeAlias = Callable[[keras.Layer], Mapping[str, h5py.Dataset]]
"""Finds the weights of a layer in a file, by the names of the layer's variables."""


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
    # One open file from here on: HDF5 gets a stream and no path, so that there is no second file to turn to.
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
    with h5py.File(stream, "r") as file:
        if "model_config" in file.attrs:
            network = read_network(_config_text(file.attrs.get_id("model_config")))
            model, layers = _build(network, stream.seek(0, io.SEEK_END))
            weights = _child(file, "model_weights")
            _fill(layers, lambda layer: _named_datasets(weights, layer))
            return model
        if architecture is None:
            raise ModelRefusedError(
                "has weights only and does not say of which network; expected architecture to be one of "
                f"{', '.join(ARCHITECTURES)}, or a file of the full model"
            )
        build = ARCHITECTURES[architecture]
        # Its layers' names and places do not depend on the number of classes, which the output's bias tells.
        template = build(2)
        bias = _finder(file, template.layers)(template.layers[-1])["bias"]
        classes = bias.shape[0] if len(bias.shape) == 1 else 0
        if not 2 <= classes <= MAX_CHANNELS:
            raise ModelRefusedError(f"the output's bias has shape {bias.shape}; expected 2 to {MAX_CHANNELS} classes")
        model = build(classes)
        _fill(model.layers, _finder(file, model.layers))
        return model


def _load_archive(stream: BinaryIO) -> keras.Model:
    """Load a `.keras` file, reading its members into memory: nothing is unpacked to disk."""
    # zipfile reads the whole table of contents first: let it be one that three files need.
    stream.seek(-min(stream.seek(0, io.SEEK_END), 42), io.SEEK_END)
    tail = stream.read()
    if tail[-22:-18] != b"PK\x05\x06" or tail[:4] == b"PK\x06\x07" or int.from_bytes(tail[-10:-6], "little") > 2**12:
        raise ModelRefusedError("its table of contents is missing, or too long for the three members of a .keras file")
    with zipfile.ZipFile(stream) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if sorted(members) != sorted(_MEMBERS) or len(archive.infolist()) != len(members):
            found = show(sorted(info.filename for info in archive.infolist()))
            raise ModelRefusedError(f"holds {found}; expected exactly {', '.join(_MEMBERS)} of a .keras file")
        contents = {name: _member(archive, info) for name, info in members.items()}
    metadata = read_json(contents["metadata.json"])
    version = metadata.get("keras_version") if isinstance(metadata, dict) else None
    if not isinstance(version, str) or not version.startswith("3."):
        raise ModelRefusedError(
            f"a .keras file of Keras {show(version)}, expected 3: load it with the Keras 2 or tf_keras that wrote it, "
            "where you trust it, and save it as .h5"
        )
    model, layers = _build(read_network(contents["config.json"]), len(contents["model.weights.h5"]))
    with h5py.File(io.BytesIO(contents["model.weights.h5"]), "r") as file:
        _fill(layers, _finder(file, layers))
    return model


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Return a member's bytes, checked against its limit and for being a decompression bomb."""
    limit = min(_MEMBERS[info.filename], max(2**20, _EXPANSION * info.compress_size))
    with archive.open(info) as member:
        content = member.read(limit + 1) if info.file_size <= limit else None
    if content is None or len(content) > limit:
        raise ModelRefusedError(
            f"{info.filename} unpacks {info.compress_size:,} bytes to {info.file_size:,}; expected at most {limit:,}"
        )
    return content


def _config_text(attribute: h5py.h5a.AttrID) -> str | bytes:
    """Return the model config of an `.h5` file, one string."""
    kind = attribute.dtype
    if attribute.shape != () or h5py.check_string_dtype(kind) is None or kind.itemsize > MAX_CONFIG_BYTES:
        raise ModelRefusedError(
            f"model_config has shape {attribute.shape} and type {kind}; expected one string of JSON"
        )
    content = np.empty((), kind)
    attribute.read(content)
    text = content.item()
    if not isinstance(text, (str, bytes)):
        raise ModelRefusedError(f"model_config is {show(text)}; expected one string of JSON")
    return text


def _build(network: NetworkConfig, weights_bytes: int) -> tuple[keras.Model, list[keras.Layer]]:
    """Build the network with fresh weights; return it, and its layers in the file's order.

    Args:
        network: its checked config.
        weights_bytes: size of the file of weights, which bounds how many it can hold.
    """
    most = min(MAX_PARAMETERS, weights_bytes // np.dtype(np.float16).itemsize)
    tensors = {network.input_name: keras.Input(network.input_shape, name=network.input_name, dtype="float32")}
    configs = {layer.name: layer for layer in network.layers}
    layers = {}
    parameters = 0
    for name in network.build_order:
        config = configs[name]
        inputs = [tensors[source] for source in config.inputs]
        try:
            parameters += parameter_count(config, inputs[0].shape[1:])
            if parameters > most:
                raise ModelRefusedError(
                    f"it takes the network to {parameters:,} parameters; expected at most {most:,}, as this file holds"
                )
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


# ── weights ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _fill(layers: Sequence[keras.Layer], datasets_of: _Datasets) -> None:
    """Give the layers their weights; every dataset is checked before the first one is read."""
    plan = []
    for layer in layers:
        variables = {variable.name: variable for variable in layer.weights}
        datasets = datasets_of(layer) if variables else {}
        if datasets.keys() != variables.keys():
            raise ModelRefusedError(
                f"the weights of layer {show(layer.name)} are {show(sorted(datasets))}; expected {sorted(variables)}"
            )
        for name, variable in variables.items():
            _check_dataset(datasets[name], tuple(variable.shape))
            plan.append((variable, datasets[name]))
    for variable, dataset in plan:
        variable.assign(_numbers(dataset))


def _check_dataset(dataset: h5py.Dataset, shape: tuple[int, ...]) -> None:
    """Check that a dataset holds, itself and in full, plain floating-point numbers of this shape."""
    storage = dataset.id.get_create_plist()
    reason = ""
    if dataset.is_virtual or dataset.external or storage.get_external_count():
        reason = "takes its values from elsewhere (virtual dataset or external storage)"
    elif dataset.dtype.kind != "f" or dataset.dtype.itemsize not in (2, 4, 8):
        reason = f"has type {dataset.dtype}"
    elif dataset.shape != shape:
        reason = f"has shape {dataset.shape}"
    elif storage.get_nfilters():
        reason = "is compressed or filtered, which Keras never does"
    elif dataset.id.get_storage_size() < math.prod(shape) * dataset.dtype.itemsize:
        reason = f"holds only {dataset.id.get_storage_size():,} bytes"
    if reason:
        raise ModelRefusedError(
            f"dataset {show(dataset.name)} {reason}; expected {shape} stored in full as float16, float32 or float64"
        )


def _numbers(dataset: h5py.Dataset) -> NDArray[np.float32]:
    """Read a checked dataset; its numbers are finite, as float32 too."""
    with np.errstate(over="ignore"):
        values: NDArray[np.float32] = dataset[()].astype(np.float32)
    if not np.isfinite(values).all():
        raise ModelRefusedError(f"dataset {show(dataset.name)} holds NaN or infinity; expected finite float32 numbers")
    return values


def _finder(file: h5py.File, layers: Sequence[keras.Layer]) -> _Datasets:
    """Return what finds weights in a file of weights, of Keras 2's or Keras 3's layout."""
    if "layer_names" in file.attrs:
        return lambda layer: _named_datasets(file, layer)
    # Keras 3 names groups by class, counted in the model's order: conv2d, conv2d_1, dense, ...
    seen: Counter[str] = Counter()
    group_names = {}
    for layer in layers:
        base = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(layer).__name__).lower()
        group_names[layer.name] = f"{base}_{seen[base]}" if seen[base] else base
        seen[base] += 1
    groups = _child(file, "layers")

    def find(layer: keras.Layer) -> Mapping[str, h5py.Dataset]:
        group = _child(_child(groups, group_names[layer.name]), "vars")
        if len(group) != len(layer.weights):
            raise ModelRefusedError(
                f"the weights of layer {show(layer.name)} are {len(group)}; expected {len(layer.weights)}"
            )
        return {variable.name: _dataset(group, str(index)) for index, variable in enumerate(layer.weights)}

    return find


def _named_datasets(weights: h5py.Group, layer: keras.Layer) -> Mapping[str, h5py.Dataset]:
    """Return a layer's weights from the layout of Keras 2 and of Keras 3's `.h5`, by their own names.

    They lie under the layer's group as `<scopes>/kernel:0` (Keras 2) or `<scopes>/kernel` (Keras 3). The group is
    walked and `weight_names` is not read: an attribute of many strings can unfold to far more than the file's size.
    """
    renamed = {"depthwise_kernel": "kernel"} if type(layer) is keras.layers.DepthwiseConv2D else {}
    found: dict[str, h5py.Dataset] = {}
    groups = [_child(weights, layer.name)]
    # The list grows while it is walked. A group may hold itself, so it must not grow for ever.
    for group in groups:
        if not isinstance(group, h5py.Group) or len(group) > _MAX_GROUP or len(groups) > _MAX_GROUP:
            raise ModelRefusedError(f"the weights of layer {show(layer.name)} nest or branch too far; expected few")
        for name in group:
            child = _child(group, name)
            if isinstance(child, h5py.Group):
                groups.append(child)
                continue
            leaf = name.removesuffix(":0")
            leaf = renamed.get(leaf, leaf)
            if leaf in found:
                raise ModelRefusedError(f"layer {show(layer.name)} has two weights {show(leaf)}; expected one")
            found[leaf] = _dataset(group, name)
    return found


def _child(group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
    """Return a member of a group that really lies there: no soft or external link is followed."""
    where = show(f"{group.name}/{name}")
    # h5py's own `name in group` would follow an external link to see whether it leads anywhere.
    links = group.id.links
    if not links.exists(name.encode()):
        raise ModelRefusedError(f"{where} is missing; expected the weights of the whole network")
    if links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise ModelRefusedError(f"{where} is a link to elsewhere; expected the weights themselves, in this file")
    return group[name]


def _dataset(group: h5py.Group, name: str) -> h5py.Dataset:
    """Return a member of a group that is a dataset."""
    child = _child(group, name)
    if not isinstance(child, h5py.Dataset):
        raise ModelRefusedError(f"{show(f'{group.name}/{name}')} is a {type(child).__name__}; expected a dataset")
    return child
