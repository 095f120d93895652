"""Canary files: labelled images, held back, that a monitor sends to a server to see whether it still decides rightly.

A canary file is an `.npz` archive of exactly three arrays: `images`, (count, height, width, channels) uint8;
`trojaned`, (count,) bool; and `metadata`, (bytes,) uint8: JSON in UTF-8 with the fields of `FIELDS`. An export may
write it and a monitor reads it, so it belongs to neither.
"""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.errors import DataError, InputError
from samples.npz import DAMAGE, stored_array, write_arrays
from samples.writing import whole_file

FORMAT = 1
FIELDS = ("format", "image_shape", "classes", "version", "calibrated_at", "frr_upper", "far_upper")

_MEMBERS = ("images.npy", "metadata.npy", "trojaned.npy")
_MOST_BYTES = 256 << 20  # unpacked: a monitor keeps them all in memory
_MOST_METADATA_BYTES = 64 << 10


@dataclass(frozen=True, eq=False)
class Canaries:
    """Labelled images, and what the calibration of the version that they are for has promised.

    Attributes:
        images: (count, height, width, channels), uint8, 0..255; none that repair or calibration has seen.
        trojaned: (count,), bool: which of them carry the trigger.
        classes: M, the number of classes of the network that they are for.
        version: of the repository whose promises these are; None where none is known.
        calibrated_at: when that version was calibrated, in seconds since 1970 (UTC); None where unknown.
        frr_upper: upper end of the calibrated FRR's 95 % interval, 0..1; None where unknown.
        far_upper: upper end of the measured FAR's 95 % interval, 0..1; None where it was not measured.

    Raises:
        DataError: these cannot be canaries; the message says which part, what came, and what was expected.
    """

    images: NDArray[np.uint8]
    trojaned: NDArray[np.bool_]
    classes: int
    version: str | None = None
    calibrated_at: float | None = None
    frr_upper: float | None = None
    far_upper: float | None = None

    def __post_init__(self) -> None:
        images, trojaned = self.images, self.trojaned
        if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
            raise DataError(
                f"images: got {images.dtype} of shape {images.shape}, expected uint8 of shape (count, height, width, "
                "channels), at least one"
            )
        if trojaned.dtype != np.bool_ or trojaned.shape != (len(images),):
            raise DataError(
                f"trojaned: got {trojaned.dtype} of shape {trojaned.shape}, expected bool of shape ({len(images)},): "
                "one for each image"
            )
        if type(self.classes) is not int or self.classes < 1:
            raise DataError(f"classes: got {self.classes!r}, expected a whole number of at least 1")
        if not (self.version is None or isinstance(self.version, str)):
            raise DataError(f"version: got {self.version!r}, expected text or nothing")
        for name, value, most in (
            ("calibrated_at", self.calibrated_at, math.inf),
            ("frr_upper", self.frr_upper, 1.0),
            ("far_upper", self.far_upper, 1.0),
        ):
            if value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and 0.0 <= value <= most):
                expected = "0 or more" if math.isinf(most) else f"0 to {most:g}"
                raise DataError(f"{name}: got {value!r}, expected a number from {expected}, or nothing")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def different(self, *, trojaned: bool) -> int:
        """Return how many different images there are, trojaned or clean: one that is there twice is one sample."""
        return len({image.tobytes() for image in self.images[self.trojaned == trojaned]})


def choose_canaries(
    clean: NDArray[np.uint8], trojaned: NDArray[np.uint8] | None, count: int, seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return up to `count` clean and up to `count` trojaned images, chosen by chance, and which are trojaned.

    Args:
        clean: (any, height, width, channels), uint8.
        trojaned: (any, height, width, channels), uint8, of the same size; None for none.
        count: the most of each.
        seed: of the choice.

    Raises:
        InputError: `count` is not positive.
        DataError: the two have different sizes.
    """
    if count < 1:
        raise InputError(f"count: got {count}, expected at least 1 canary")
    if trojaned is not None and trojaned.shape[1:] != clean.shape[1:]:
        raise DataError(f"trojaned images: got shape {trojaned.shape[1:]}, expected {clean.shape[1:]} like clean ones")
    generator = np.random.default_rng(seed)
    parts = [part for part in (clean, trojaned) if part is not None]
    chosen = [part[generator.permutation(len(part))[:count]] for part in parts]
    truth = [np.full(len(part), index == 1) for index, part in enumerate(chosen)]
    return np.concatenate(chosen), np.concatenate(truth)


def write_canaries(path: Path, canaries: Canaries) -> None:
    """Write a canary file, replacing one that is there; it appears whole or not at all.

    Raises:
        InputError: it cannot be written there.
        DataError: the images are more than a monitor reads.
    """
    if canaries.images.nbytes > _MOST_BYTES:
        raise DataError(
            f"images: got {canaries.images.nbytes} bytes, expected at most {_MOST_BYTES}; take fewer canaries"
        )
    fields = {name: getattr(canaries, name) for name in FIELDS if name != "format"}
    metadata = json.dumps({"format": FORMAT, **fields}).encode()
    with whole_file(path) as file:
        metadata_bytes = np.frombuffer(metadata, np.uint8)
        write_arrays(file, {"images": canaries.images, "trojaned": canaries.trojaned, "metadata": metadata_bytes})


def read_canaries(path: Path) -> Canaries:
    """Read a canary file. It is taken to be hostile: nothing in it runs, and it unpacks to no more than it may.

    Raises:
        DataError: there is none, or it is not exactly what `write_canaries` writes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive)
            images, trojaned, metadata = (_read(path, archive, name) for name in ("images", "trojaned", "metadata"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file, expected one that `stripwire canaries` wrote") from None
    except DataError:
        raise
    except DAMAGE as error:
        raise DataError(f"{path}: cannot be read as a canary file ({error}); is it complete?") from error
    fields = _fields(path, metadata)
    try:
        canaries = Canaries(
            images,
            trojaned,
            fields["classes"],
            fields["version"],
            fields["calibrated_at"],
            fields["frr_upper"],
            fields["far_upper"],
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if fields["image_shape"] != list(canaries.image_shape):
        raise DataError(
            f"{path}: image_shape: got {fields['image_shape']!r}, expected {list(canaries.image_shape)}, which its "
            "images have"
        )
    return canaries


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse by what the archive declares, before any of it is unpacked."""
    members = archive.infolist()
    names = sorted(member.filename for member in members)
    if names != list(_MEMBERS):
        raise DataError(f"{path}: holds {names}, expected {list(_MEMBERS)}; write it by `stripwire canaries`")
    for member in members:
        most = _MOST_METADATA_BYTES if member.filename == "metadata.npy" else _MOST_BYTES + 4096
        if member.file_size > most:
            raise DataError(f"{path}: {member.filename} unpacks to {member.file_size} bytes, expected at most {most}")


def _read(path: Path, archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    stored = stored_array(path, archive, name)
    if not stored.shape or 0 in stored.shape:
        raise DataError(f"{path}: `{name}` has shape {stored.shape}, expected at least one entry")
    (array,) = stored.pieces(stored.shape[0])
    return array


def _fields(path: Path, metadata: NDArray[Any]) -> dict[str, Any]:
    if metadata.dtype != np.uint8 or metadata.ndim != 1:
        raise DataError(f"{path}: `metadata` is {metadata.dtype} of shape {metadata.shape}, expected uint8 of (bytes,)")
    try:
        fields = json.loads(metadata.tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: `metadata` is no JSON ({error}); write the file anew") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        got = fields.get("format") if isinstance(fields, dict) else type(fields).__name__
        raise DataError(f"{path}: got canary format {got!r}, expected {FORMAT}; write the file anew")
    if fields.keys() != set(FIELDS):
        raise DataError(f"{path}: `metadata` has {sorted(fields)}, expected {sorted(FIELDS)}; write the file anew")
    return fields
