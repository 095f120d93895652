"""Canaries for a version of a repository: they know what its calibration has promised. Needs no TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samples.canaries import Canaries


def canaries_for(
    version: str, entry: Mapping[str, Any], images: NDArray[np.uint8], trojaned: NDArray[np.bool_]
) -> Canaries:
    """Return canaries with what a version of a repository promises.

    Args:
        version: its number.
        entry: what the manifest says of it. A version that was only calibrated anew has measured no FAR.
        images: (count, height, width, channels), uint8; none that the export has seen.
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
