"""What detectors look at, and when it makes them reject an input.

`strip` takes the mean of an input's entropies under its perturbations. Some overlays hide the trigger, though, and a
few high entropies lift the mean of all over any threshold. `consensus` takes their lower median, which asks whether
half of them are low: the trigger need not win every time. It also looks at how sure the sentinel is of the input as it
came, and at how little the repaired network believes the sentinel's label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.conformal import Floats
from detector.consensus import is_disputed
from detector.errors import InputError
from detector.strip import is_trojaned

DETECTORS = ("strip", "consensus")
"""What is looked at: the mean entropy alone (STRIP), or all that this module knows."""

SCORES = ("entropy", "plain_entropy", "nll", "not_finite")
"""What may reject an input: the entropy of its blends, that of the input as it came, how little the repaired network
believes, or a network's answer that is not a number; see `Thresholds.rejecting`."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of inputs; None is what a detector does not look at.

    Attributes:
        bits: score of the entropies, see `score_bits`, (inputs,), in bits: the lower, the more suspicious.
        plain_bits: entropy of the sentinel's answer to the input as it came, likewise.
        nlls: minus the logarithm of the repaired network's probability for the sentinel's label, (inputs,), in nats:
            the higher, the more suspicious.
    """

    bits: Floats
    plain_bits: Floats | None = None
    nlls: Floats | None = None

    def __post_init__(self) -> None:
        """Raise InputError for a combination that no detector has."""
        if self.nlls is not None and self.plain_bits is None:
            raise InputError("evidence: got nlls without entropies of the inputs as they came, expected both")

    def scores(self) -> NDArray[np.float64]:
        """Return all that is known, (scores, inputs), the lower, the more suspicious."""
        nlls = None if self.nlls is None else -self.nlls
        return np.array([row for row in (self.bits, self.plain_bits, nlls) if row is not None], np.float64)


@dataclass(frozen=True)
class Thresholds:
    """At or beyond which an input is rejected; None is what plays no part.

    Attributes:
        bits: of the entropies' score.
        plain_bits: of the entropy of the sentinel's answer to the input as it came.
        nll: in nats.
    """

    bits: float
    plain_bits: float | None = None
    nll: float | None = None

    @property
    def scores(self) -> tuple[str, ...]:
        """Which of `SCORES` may reject an input."""
        unused = {"plain_entropy": self.plain_bits, "nll": self.nll}
        return tuple(score for score in SCORES if unused.get(score, 0.0) is not None)

    def reject(self, evidence: Evidence) -> NDArray[np.bool_]:
        """Return the verdicts, (inputs,): True where a score is at or beyond its threshold, or any is not finite."""
        return np.asarray(np.any([*self.rejecting(evidence).values()], axis=0))

    def rejecting(self, evidence: Evidence) -> dict[str, NDArray[np.bool_]]:
        """Return where each score rejects, (inputs,), by its name in `SCORES`; an input may be rejected by several."""
        found = {"entropy": is_trojaned(evidence.bits, self.bits)}
        if self.plain_bits is not None:
            found["plain_entropy"] = is_trojaned(evidence.plain_bits, self.plain_bits)
        if self.nll is not None:
            found["nll"] = is_disputed(evidence.nlls, self.nll)
        found["not_finite"] = ~np.isfinite(evidence.scores()).all(axis=0)
        return found


def score_bits(entropies_bits: Floats, detector: str, ran: NDArray[np.integer[Any]] | None = None) -> Floats:
    """Return the score of each input's entropies.

    Args:
        entropies_bits: (inputs, perturbations), in bits.
        detector: one of `DETECTORS`.
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
