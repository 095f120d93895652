"""STRIP: a prediction that stays the same whatever is blended in is suspicious.

Gao et al., "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks", ACSAC 2019. Arrays in, arrays out, on any
array namespace `xp` that follows the array API (NumPy, CuPy). Nothing here knows the size of an image or the number of
classes.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from detector.errors import InputError

Array: TypeAlias = Any
"""An array of the namespace `xp` in use."""


def weighted_overlays(overlays: Array, alpha: float, *, xp: ModuleType = np) -> Array:
    """Return the overlays' share of every perturbation, `(1 - alpha) * overlay`.

    Computed once for a set of overlays, used by `perturb` for every batch.

    Args:
        overlays: clean held-out images, (perturbations, height, width, channels), uint8, 0..255.
        alpha: weight of the input image, 0 < alpha < 1.
        xp: the array namespace of `overlays`.

    Returns:
        (perturbations, height, width, channels), float32.

    Raises:
        InputError: `alpha` is outside (0, 1), or `overlays` is not a non-empty set of images.
    """
    check_alpha(alpha)
    if overlays.ndim != 4 or overlays.shape[0] < 1 or overlays.dtype != xp.uint8:
        raise InputError(
            f"overlays: got {overlays.dtype} of shape {tuple(overlays.shape)}, expected uint8 of shape "
            "(perturbations, height, width, channels) with at least one overlay"
        )
    return xp.asarray(overlays, dtype=xp.float32) * (1.0 - alpha)


def check_alpha(alpha: float) -> None:
    """Raise InputError unless 0 < `alpha` < 1."""
    if not 0.0 < alpha < 1.0:
        raise InputError(
            f"alpha: got {alpha}, expected the input's weight in the blend, between 0 and 1 (0.5 is usual)"
        )


def plain_first(weighted: Array, alpha: float, *, xp: ModuleType = np) -> tuple[Array, Array]:
    """Put before the perturbations one that is the input as it came: its overlay weighs nothing.

    Args:
        weighted: what `weighted_overlays` returned for `alpha`, (perturbations, height, width, channels).
        alpha: weight of the input image in the others.
        xp: the array namespace of `weighted`.

    Returns:
        Overlays and weights of the input for `perturb`: (1 + perturbations, height, width, channels) and
        (1 + perturbations,), both float32.
    """
    weights = xp.full((1 + weighted.shape[0],), alpha, dtype=xp.float32)
    weights[0] = 1.0
    return xp.concatenate([xp.zeros_like(weighted[:1]), weighted], axis=0), weights


def perturb(images: Array, weighted: Array, alpha: float | Array, *, xp: ModuleType = np) -> Array:
    """Blend every image with every overlay: `alpha * image + (1 - alpha) * overlay`.

    Neither rounded nor clipped: both weights are positive and sum to one, so the blend stays within 0..255, and it
    stays linear in the image. STRIP paper, section 4.2; the source report uses alpha = 0.5.

    Args:
        images: (batch, height, width, channels), uint8, 0..255.
        weighted: what `weighted_overlays` returned for the same `alpha`, (perturbations, height, width, channels).
        alpha: weight of the image, or of the image in each perturbation, (perturbations,), float32.
        xp: the array namespace of all.

    Returns:
        (batch, perturbations, height, width, channels), float32, 0..255.
    """
    pixels = xp.asarray(images, dtype=xp.float32)
    if isinstance(alpha, float):
        return (pixels * alpha)[:, None, ...] + weighted[None, ...]
    perturbations = pixels[:, None, ...] * alpha[None, :, None, None, None]
    perturbations += weighted[None, ...]
    return perturbations


def perturbation_entropies_bits(probabilities: Array, *, xp: ModuleType = np) -> Array:
    """Return the Shannon entropy of the prediction for each perturbation by itself, `- sum_i y_i log2 y_i`.

    0 log 0 is 0. A probability that is not a number, or negative, makes the entropy not-a-number.

    Args:
        probabilities: (batch, perturbations, classes), float32; each row over the classes sums to one.
        xp: the array namespace of `probabilities`.

    Returns:
        (batch, perturbations), float32, in bits, 0..log2(classes).
    """
    zero = probabilities == 0
    with np.errstate(invalid="ignore"):  # a negative probability must become NaN, quietly
        logs = xp.log2(xp.where(zero, xp.ones_like(probabilities), probabilities))
    return -xp.sum(probabilities * logs, axis=-1)


def entropy_bits(probabilities: Array, *, xp: ModuleType = np) -> Array:
    """Return the mean Shannon entropy of the predictions for each input's perturbations.

    `H = (1/N) * sum_n ( - sum_i y_i log2 y_i )`, STRIP paper, equations 3 and 4: summed over the classes (the last
    axis), averaged over the perturbations (the axis before it). What is not-a-number, see
    `perturbation_entropies_bits`, `is_trojaned` rejects.

    Args:
        probabilities: (batch, perturbations, classes), float32; each row over the classes sums to one.
        xp: the array namespace of `probabilities`.

    Returns:
        (batch,), float32, in bits, 0..log2(classes).
    """
    return xp.mean(perturbation_entropies_bits(probabilities, xp=xp), axis=-1)


def is_trojaned(entropy: Array, threshold_bits: float, *, xp: ModuleType = np) -> Array:
    """Return STRIP's verdict, `H <= threshold`; what cannot be compared is rejected.

    Args:
        entropy: (batch,), float32, in bits.
        threshold_bits: the detection boundary, in bits.
        xp: the array namespace of `entropy`.

    Returns:
        (batch,), bool: True where the input is taken to carry a trigger, or where its entropy is not finite.
    """
    return ~(xp.isfinite(entropy) & (entropy > threshold_bits))


def guarded_labels(probabilities: Array, trojaned: Array, *, block: bool, xp: ModuleType = np) -> Array:
    """Return the label that the caller sees.

    Args:
        probabilities: of the repaired network, (batch, classes), float32.
        trojaned: the verdicts, (batch,), bool.
        block: answer `classes`, one past the last class, where `trojaned`; otherwise only report the verdict (shadow).
        xp: the array namespace of both.

    Returns:
        (batch,), int32.
    """
    labels = xp.asarray(xp.argmax(probabilities, axis=-1), dtype=xp.int32)
    if not block:
        return labels
    return xp.where(trojaned, xp.full_like(labels, probabilities.shape[-1]), labels)
