"""What the detector `consensus` looks at: whether the perturbations agree, and whether the two networks do.

*The perturbations.* Some overlays hide the trigger, and a few high entropies lift the mean of all above the threshold.
A geometric mean asks whether most of them are low: the trigger need not win every time.

*The networks.* A backdoor opens in the sentinel alone where the repair worked: on a trojaned input the sentinel answers
the attacker's class, to which the repaired network gives next to no probability. On clean inputs the two agree. Where
the repair failed they agree on trojaned inputs as well, so this only ever joins the entropy; see `detector.conformal`.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from detector.strip import Array

LEAST_BITS = float(np.finfo(np.float32).tiny)
"""Lower entropies count as this, 2^-126: a mean that is not 0, and no lower end at which confident networks' clean
inputs meet, because a threshold among equals cannot be drawn."""

_LEAST_PROBABILITY = float(np.finfo(np.float32).tiny)


def geometric_mean_bits(entropies: Array, *, xp: ModuleType = np) -> Array:
    """Return the geometric mean over an input's perturbations of their entropies.

    Args:
        entropies: see `detector.strip.perturbation_entropies_bits`, (batch, perturbations), in bits.
        xp: the array namespace of `entropies`.

    Returns:
        (batch,), of the same dtype, in bits, 2^-126..log2(classes); not-a-number where an entropy is.
    """
    logs = xp.log(xp.maximum(entropies, xp.full_like(entropies, LEAST_BITS)))
    return xp.exp(xp.mean(logs, axis=-1))


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
