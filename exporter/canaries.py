"""Canaries for a version of a repository: they know what its calibration has promised. Needs no TensorFlow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.errors import DataError, InputError
from exporter.used import digests, uses
from model_repository.manifest import read_manifest
from samples.canaries import Canaries, choose_canaries, read_canaries, write_canaries

FILE = "canaries.npz"
"""In the folder of a version of `guarded`."""

_MOST = 100
_MOST_BYTES = 16 << 20  # of each kind: they lie in every version


def canaries_for(
    version: str, entry: Mapping[str, Any], images: NDArray[np.uint8], trojaned: NDArray[np.bool_]
) -> Canaries:
    """Return canaries with what a version of a repository promises.

    Args:
        version: its number.
        entry: what the manifest says of it. A version that was only calibrated anew has measured no FAR.
        images: (count, height, width, channels), uint8, on which neither the repair nor the threshold was fitted.
        trojaned: (count,), bool: which of them carry the trigger.

    Raises:
        DataError: these cannot be canaries.
    """
    acceptance = entry.get("scores", {}).get("guard", {}).get("false_acceptance") or {}
    created, calibration = entry.get("created"), entry.get("calibration", {})
    return Canaries(
        images,
        trojaned,
        entry["contract"]["classes"],
        version,
        None if created is None else datetime.fromisoformat(created).timestamp(),
        calibration.get("frr_high"),
        acceptance.get("high"),
    )


def unused(
    images: NDArray[np.uint8], repository: Path, manifest: Mapping[str, Any]
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Return the images that the active version was not made of, and what there is to say of the others.

    Args:
        images: (images, height, width, channels), uint8.
        repository: a model repository.
        manifest: of it.

    Raises:
        DataError: it was made of all of them.
    """
    found = uses(repository, manifest, images)
    counts = Counter(use for use in found if use is not None)
    if not counts:
        return images, ()
    told = ", ".join(f"{count} for {use}" for use, count in counts.items())
    if counts.total() == len(images):
        raise DataError(
            f"clean data: the export has used all {len(images)} images ({told}), expected images that it has not seen; "
            f"the canaries that it left are those of {repository}: stripwire monitor --canaries {repository}"
        )
    note = f"{counts.total()} of {len(images)} clean images were left out, which the export has used: {told}."
    return images[[use is None for use in found]], (note,)


def write_exported(
    folder: Path,
    version: str,
    entry: Mapping[str, Any],
    clean: NDArray[np.uint8],
    trojaned: NDArray[np.uint8] | None,
    seed: int,
) -> None:
    """Write canaries for a version that is being exported: up to 100 of each kind, fewer of large images.

    Args:
        folder: of the version of `guarded`.
        version: its number.
        entry: what the manifest is to say of it.
        clean: (images, height, width, channels), uint8, on which neither the repair nor the threshold was fitted.
        trojaned: likewise, that no repair has seen; None where there are none.
        seed: of the choice.
    """
    count = max(1, min(_MOST, _MOST_BYTES // clean[0].nbytes))
    write_canaries(folder / FILE, canaries_for(version, entry, *choose_canaries(clean, trojaned, count, seed)))


def write_recalibrated(
    folder: Path, version: str, entry: Mapping[str, Any], base: Path, used: NDArray[np.uint8]
) -> tuple[str, ...]:
    """Write the canaries of the version before for one that was calibrated anew; return what there is to say of it.

    Args:
        folder: of the version of `guarded`.
        version: its number.
        entry: what the manifest is to say of it.
        base: folder of the version before.
        used: images that the new calibration has seen, (images, height, width, channels), uint8; no canary is of them.
    """
    if not (base / FILE).exists():
        return ()
    known = read_canaries(base / FILE)
    seen = {*digests(used)}
    kept = np.array([digest not in seen for digest in digests(known.images)])
    if kept.any():
        write_canaries(folder / FILE, canaries_for(version, entry, known.images[kept], known.trojaned[kept]))
    if kept.all():
        return ()
    left = f"{kept.sum()} are left" if kept.any() else "none is left"
    return (
        f"{np.count_nonzero(~kept)} of the {len(kept)} canaries of version {base.name} calibrate now, so {left}. The "
        "monitor wants images that no calibration has seen: `stripwire canaries` takes them.",
    )


def find_canaries(path: Path) -> Path:
    """Return the canary file that a path means: itself, or that of the active version of a model repository.

    Raises:
        InputError: the active version has none.
        RepositoryError: it is a folder, but no model repository.
    """
    if not path.is_dir():
        return path
    active: str = read_manifest(path)["active"]
    file = path / "guarded" / active / FILE
    if not file.exists():
        raise InputError(
            f"canaries: version {active} of {path} has none (it is older, or its calibration has used them up), "
            "expected a canary file: `stripwire canaries` writes one"
        )
    return file
