"""What the detector `consensus` looks at beside entropies: whether the two networks agree.

A backdoor opens in the sentinel alone where the repair worked: on a trojaned input the sentinel answers the attacker's
class, to which the repaired network gives next to no probability. On clean inputs the two agree. Where the repair
failed they agree on trojaned inputs as well, so this only ever joins the entropy; see `detector.conformal`.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from detector.strip import Array

_LEAST_PROBABILITY = float(np.finfo(np.float32).tiny)


def negative_log_likelihood(repaired: Array, labels: Array, *, xp: ModuleType = np) -> Array:
    """Return `-ln p`, with p the repaired network's probability for the sentinel's label.

    Args:
        repaired: probabilities of the repaired network, (batch, classes), float32.
        labels: what the sentinel sees in the same inputs, without any overlay, (batch,), int32, 0..classes - 1.
        xp: the array namespace of both.

    Returns:
        (batch,), float32, in nats, 0..87.4; not-a-number where the probability is, or is negative.
    """
    chosen = xp.take_along_axis(repaired, xp.asarray(labels, dtype=xp.int64)[:, None], axis=-1)[:, 0]
    usable = xp.where(chosen >= 0, xp.maximum(chosen, xp.full_like(chosen, _LEAST_PROBABILITY)), chosen + xp.nan)
    return -xp.log(usable)


def is_disputed(nll: Array, threshold_nll: float, *, xp: ModuleType = np) -> Array:
    """Return whether `nll >= threshold`; what cannot be compared is disputed.

    Args:
        nll: (batch,), float32, in nats.
        threshold_nll: the detection boundary, in nats.
        xp: the array namespace of `nll`.

    Returns:
        (batch,), bool.
    """
    return ~(xp.isfinite(nll) & (nll < threshold_nll))
