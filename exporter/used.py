"""Which images a version was made of, as digests: so that nothing is watched or measured by what was fitted to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILE = "used.npz"
"""In the folder of a version of `guarded`: for each part of the data, (images, 16) uint8."""

_DIGEST_BYTES = 16


def digests(images: Iterable[NDArray[np.uint8]]) -> list[bytes]:
    """Return a digest of the pixels of each image."""
    return [hashlib.blake2b(image.tobytes(), digest_size=_DIGEST_BYTES).digest() for image in images]


def write_used(folder: Path, parts: Mapping[str, NDArray[np.uint8]]) -> None:
    """Write what a version was made of.

    Args:
        folder: of the version of `guarded`.
        parts: images by what they were used for, (images, height, width, channels), uint8.
    """
    stored = {name: b"".join(digests(images)) for name, images in parts.items()}
    arrays = {name: np.frombuffer(content, np.uint8).reshape(-1, _DIGEST_BYTES) for name, content in stored.items()}
    np.savez(folder / FILE, **arrays)


def uses(repository: Path, manifest: Mapping[str, Any], images: NDArray[np.uint8]) -> list[str | None]:
    """Return what each image was used for by the active version, or by one that it calibrates again; None for nothing.

    Args:
        repository: a model repository.
        manifest: of it.
        images: (images, height, width, channels), uint8.
    """
    known: dict[bytes, str] = {}
    version: str | None = manifest["active"]
    while version is not None:
        file = repository / "guarded" / version / FILE
        if file.exists():
            with np.load(file, allow_pickle=False) as stored:
                for name in stored.files:
                    known |= {row.tobytes(): name for row in stored[name]}
        version = manifest["versions"][version].get("recalibrates")
    return [known.get(digest) for digest in digests(images)]
