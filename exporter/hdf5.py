"""Read the config and the weights out of a hostile HDF5 file, in a process of its own.

HDF5 is a large C library that was not written for hostile files: a dozen changed bytes make it loop for ever, and no
Python code can interrupt that. So a child process with limits on time, memory and output does the reading; it hands
back plain numbers, and one that hangs or crashes is ended and the file refused. This file imports neither Keras nor
TensorFlow, so that the child starts quickly.

HDF5 can also point elsewhere in many ways (soft and external links, external storage, virtual datasets: CVE-2026-1669)
and declare far more than it holds (CVE-2026-0897). None is followed: only ordinary, uncompressed datasets count.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from numpy.typing import NDArray

from detector.errors import ModelRefusedError
from exporter.keras_config import MAX_CONFIG_BYTES, show

MAX_PARAMETERS = 200_000_000

_MAX_DEPTH = 8
_MAX_MEMBERS = 20_000
_MAX_HEADER_BYTES = 4 * MAX_CONFIG_BYTES
_MEMORY_BYTES = 8 * 2**30
# What h5py raises at damaged input.
_DAMAGE = (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Hdf5Contents:
    """What a Keras model's HDF5 file holds.

    Attributes:
        config: the model config, JSON; None where there is none.
        by_name: whether weights lie under their layers' names (Keras 2, and `.h5` of Keras 3) or under numbered class
            names (`.keras` and `.weights.h5` of Keras 3).
        weights: by path; instead of numbers the reason why they cannot be used.
    """

    config: str | None
    by_name: bool
    weights: Mapping[str, NDArray[np.float32] | str]


def read_hdf5(stream: BinaryIO, *, timeout_seconds: float = 300.0) -> Hdf5Contents:
    """Read an HDF5 file in a child process.

    Args:
        stream: an open file with a file descriptor.
        timeout_seconds: the child is ended after this time.

    Raises:
        ModelRefusedError: the file is damaged, is not a Keras model's, holds more than `MAX_PARAMETERS`, or reading it
            takes too long, takes too much memory or crashes.
    """
    # It finds our code where this process found it, and not in the working directory, which may hold the attacker's.
    start = "import sys; sys.path[:] = sys.argv[1:]; from exporter.hdf5 import main; main()"
    command = [sys.executable, "-I", "-c", start, *(entry or str(Path.cwd()) for entry in sys.path)]
    stream.seek(0)
    with tempfile.TemporaryFile() as output:
        try:
            child = subprocess.run(  # noqa: S603 our own code, and nothing of the file among the arguments
                command,
                stdin=stream,
                stdout=output,
                stderr=subprocess.PIPE,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                timeout=timeout_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ModelRefusedError(
                f"HDF5 did not finish reading it in {timeout_seconds:g} s, as happens with files made to hang it; "
                "expected a file as Keras writes it"
            ) from error
        if child.returncode != 0:
            lines = child.stderr.decode(errors="replace").splitlines() or ["no message"]
            raise ModelRefusedError(
                f"reading it ended the reader (exit status {child.returncode}, {show(lines[-1])}); expected a file as "
                "Keras writes it"
            )
        output.seek(0)
        return _receive(output)


def _receive(output: BinaryIO) -> Hdf5Contents:
    """Take over what the child wrote: a line of JSON, then the numbers."""
    header = json.loads(output.readline(_MAX_HEADER_BYTES))
    if "refused" in header:
        raise ModelRefusedError(header["refused"])
    weights: dict[str, NDArray[np.float32] | str] = {}
    for path, found in header["weights"].items():
        if isinstance(found, str):
            weights[path] = found
        else:
            weights[path] = np.fromfile(output, np.float32, math.prod(found)).reshape(found)
    return Hdf5Contents(header["config"], header["by_name"], weights)


# ── in the child ──────────────────────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    """Read the HDF5 file on standard input and write its contents to standard output."""
    _limit_resources()
    with open(0, "rb") as source, open(1, "wb") as target:
        try:
            with h5py.File(source, "r") as file:
                _send(file, target)
        except ModelRefusedError as error:
            refused = str(error)
        except _DAMAGE as error:
            refused = f"damaged HDF5 ({type(error).__name__}: {error}); expected a whole file: fetch or save it again"
        else:
            return
        target.seek(0)
        target.truncate()
        target.write(json.dumps({"refused": refused}).encode() + b"\n")


def _limit_resources() -> None:
    """Bound what a hostile file can make this process take; where the system cannot, the timeout is left."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        output_bytes = _MAX_HEADER_BYTES + MAX_PARAMETERS * np.dtype(np.float32).itemsize
        resource.setrlimit(resource.RLIMIT_FSIZE, (output_bytes, output_bytes))
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))


def _send(file: h5py.File, target: BinaryIO) -> None:
    """Write a header of JSON, then the numbers of every dataset that can be used."""
    config = _config_text(file.attrs.get_id("model_config")) if "model_config" in file.attrs else None
    by_name = config is not None or "layer_names" in file.attrs
    root = file
    if config is not None or not by_name:
        name = "layers" if config is None else "model_weights"
        if _link_type(file, name) != h5py.h5l.TYPE_HARD:
            raise ModelRefusedError(f"holds no group {name!r}: not a Keras model or weights; expected those")
        root = file[name]
    found: dict[str, object] = {}
    usable = []
    for path, reason, dataset in _walk(root):
        found[path] = reason or dataset.shape
        if not reason:
            usable.append(dataset)
    parameters = sum(dataset.size for dataset in usable)
    if parameters > MAX_PARAMETERS:
        raise ModelRefusedError(f"holds {parameters:,} parameters; expected at most {MAX_PARAMETERS:,}")
    target.write(json.dumps({"config": config, "by_name": by_name, "weights": found}).encode() + b"\n")
    for dataset in usable:
        with np.errstate(over="ignore"):  # what overflows is infinite and refused for that
            dataset[()].astype(np.float32).tofile(target)


def _config_text(attribute: h5py.h5a.AttrID) -> str:
    """Return the model config, one string."""
    kind = attribute.dtype
    if attribute.shape != () or h5py.check_string_dtype(kind) is None or kind.itemsize > MAX_CONFIG_BYTES:
        raise ModelRefusedError(
            f"model_config has shape {attribute.shape} and type {kind}; expected one string of JSON"
        )
    content = np.empty((), kind)
    attribute.read(content)
    text = content.item()
    if not isinstance(text, (str, bytes)) or len(text) > MAX_CONFIG_BYTES:
        raise ModelRefusedError(
            f"model_config is {show(text)}; expected one string of at most {MAX_CONFIG_BYTES:,} bytes"
        )
    return text if isinstance(text, str) else text.decode()


def _walk(root: h5py.Group) -> Iterator[tuple[str, str, Any]]:
    """Yield path, why it cannot be used (empty if it can), and dataset of everything under `root` but groups.

    The groups are walked and attributes such as `weight_names` are not read: many strings that share one place in the
    file unfold to far more than the file's size.
    """
    pending = [("", root, 0)]
    members = 0
    while pending:
        prefix, group, depth = pending.pop()
        members += len(group)
        # A group may hold itself.
        if depth > _MAX_DEPTH or members > _MAX_MEMBERS:
            raise ModelRefusedError(f"its groups nest or branch too far, at {show(prefix)}; expected weights of layers")
        for name in group:
            path = f"{prefix}{name}"
            if _link_type(group, name) != h5py.h5l.TYPE_HARD:
                yield path, "is a link to elsewhere", None
                continue
            member = group[name]
            if isinstance(member, h5py.Group):
                pending.append((f"{path}/", member, depth + 1))
            else:
                yield path, _unusable(member), member


def _link_type(group: h5py.Group, name: str) -> int | None:
    """Return how a member hangs in its group; h5py's own `name in group` would follow an external link to see."""
    links = group.id.links
    return links.get_info(name.encode()).type if links.exists(name.encode()) else None


def _unusable(dataset: h5py.Dataset) -> str:
    """Return why a dataset does not hold, itself and in full, plain floating-point numbers; empty if it does."""
    if not isinstance(dataset, h5py.Dataset):
        return "is not a dataset"
    storage = dataset.id.get_create_plist()
    if dataset.is_virtual or storage.get_external_count():
        return "takes its values from elsewhere (virtual dataset or external storage)"
    if dataset.dtype.kind != "f" or dataset.dtype.itemsize not in (2, 4, 8):
        return f"has type {dataset.dtype}"
    if dataset.shape is None:
        return "is empty"
    if storage.get_nfilters():
        return "is compressed or filtered, which Keras never does"
    if dataset.id.get_storage_size() < math.prod(dataset.shape) * dataset.dtype.itemsize:
        return f"declares shape {dataset.shape} and holds only {dataset.id.get_storage_size():,} bytes"
    return ""
