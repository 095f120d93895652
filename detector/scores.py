"""The number that a detector compares with its threshold, of an input's entropies under its perturbations.

`strip` takes their mean. Some overlays hide the trigger, though, and a few high entropies lift the mean of all over any
threshold. `consensus` takes their lower median, which asks whether half of them are low: the trigger need not win every
time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.conformal import Floats


def score_bits(entropies_bits: Floats, detector: str, ran: NDArray[np.integer[Any]] | None = None) -> Floats:
    """Return the score of each input.

    Args:
        entropies_bits: (inputs, perturbations), in bits.
        detector: one of `detector.conformal.DETECTORS`.
        ran: how many perturbations count of each input, the first ones, (inputs,), 1..perturbations; None where all do.

    Returns:
        (inputs,), of the same dtype, in bits, 0..log2(classes); not-a-number where any of an input's entropies is.
    """
    if ran is not None:
        found = np.empty(len(entropies_bits), entropies_bits.dtype)
        for count in np.unique(ran):
            found[ran == count] = score_bits(entropies_bits[ran == count, :count], detector)
        return found
    if detector == "strip":
        return np.asarray(entropies_bits.mean(axis=1))
    middle = np.sort(entropies_bits, axis=1)[:, lower_middle(entropies_bits.shape[1])]
    return np.where(np.isnan(entropies_bits).any(axis=1), entropies_bits.dtype.type(np.nan), middle)


def lower_middle(count: int) -> int:
    """Return the place of the lower median among `count` in ascending order, counted from 0.

    It is at or under a threshold exactly where at least half of them are.
    """
    return (count - 1) // 2
