"""What the detectors make of a case with other blends: numbers of overlays, weights, and choices of overlays."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.detection.cases import OVERLAYS, TARGETS, Material, some
from benchmarks.detection.detectors import errors_of, rejects
from detector.calibration import ALPHAS as DEFAULT_ALPHAS
from detector.calibration import least_images, quantile_rank
from detector.conformal import Floats, peel
from detector.scores import DETECTORS, score_bits
from detector.statistics import auroc
from exporter.entropies import OnProgress, entropy_matrix
from exporter.overlays import choose_greedily

ALPHAS = (0.5, 0.7)
"""Weights of the input that STRIP as the report has it is measured with."""
WEIGHTS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Weights of the input that both detectors are measured with."""
SWEPT_TARGETS = TARGETS[1:]
SWEPT_IMAGES = 500
"""Of each kind, at most so many are blended at each of the weights."""
_POOL, _SELECTION = 64, 256
"""From how many overlays ten are chosen, and on how many images."""


Rows: TypeAlias = list[dict[str, Any]]


def strip_sweep(material: Material, images: int, report: OnProgress) -> Rows:
    """Return AUROC, FAR and FRR for each of `ALPHAS`, number of overlays, target and trigger.

    Args:
        material: the case; the defender's own images calibrate.
        images: at most so many clean and trojaned ones are judged.
        report: told what is going on.
    """
    overlays = material.split.overlays.images
    judged = {trigger: some(part, images).images for trigger, part in material.trojaned.items()}
    rows = []
    for alpha in ALPHAS:
        calibration, clean = (
            entropy_matrix(material.sentinel, part.images, overlays, alpha, report)
            for part in (material.split.calibration, some(material.clean, images))
        )
        for trigger, part in judged.items():
            trojaned = entropy_matrix(material.sentinel, part, overlays, alpha, report)
            for count in (count for count in OVERLAYS if count <= len(overlays)):
                means = [score_bits(matrix[:, :count], "strip") for matrix in (calibration, clean, trojaned)]
                row = {"alpha": alpha, "overlays": count, "trigger": trigger, "auroc": auroc(-means[1], -means[2])}
                rows.append(row | {f"at_{target:g}": _errors(means, target) for target in SWEPT_TARGETS})
    return rows


def blend_sweep(material: Material, report: OnProgress) -> Rows:
    """Return FAR, FRR and threshold of both detectors for each of `WEIGHTS`, and for overlays that are chosen greedily.

    The detectors do without a repaired network, and have ten overlays. Greedily, ten of 64 are chosen for each
    detector at its default weight and a target FRR of 1 %, unless all clean images are needed otherwise.

    Args:
        material: the case.
        report: told what is going on.
    """
    count, pool = OVERLAYS[0], material.split.overlays.images[:_POOL]
    clean = (material.calibration, material.judged_clean)
    known = [some(part, SWEPT_IMAGES).images for part in clean]
    trojaned = {trigger: some(part, SWEPT_IMAGES).images for trigger, part in material.judged_trojaned.items()}

    def rows(choice: str, alpha: float, overlays: NDArray[np.uint8], detectors: tuple[str, ...]) -> Rows:
        of_known, of_trojaned = (
            [
                entropy_matrix(material.sentinel, part, overlays, alpha, report, f"Blending at {alpha:g}")
                for part in parts
            ]
            for parts in (known, trojaned.values())
        )
        found = []
        for detector in detectors:
            for trigger, matrix in zip(trojaned, of_trojaned, strict=True):
                scores = [score_bits(part, detector) for part in (*of_known, matrix)]
                row = {"detector": detector, "choice": choice, "alpha": alpha, "trigger": trigger}
                found.append(row | {f"at_{target:g}": _errors(scores, target) for target in SWEPT_TARGETS})
        return found

    found = [row for alpha in WEIGHTS for row in rows("random", alpha, pool[:count], DETECTORS)]
    if material.folder is not None:  # of a network that was trained here, whose defender has images to choose by
        by = some(material.split.calibration, _SELECTION).images
        for detector in DETECTORS:
            alpha = DEFAULT_ALPHAS[detector]
            matrix = entropy_matrix(material.sentinel, by, pool, alpha, report, "Comparing overlays")
            chosen = choose_greedily(matrix, count, SWEPT_TARGETS[0], detector)
            found += rows("greedy", alpha, pool[chosen], (detector,))
    return found


def _errors(scores: list[Floats], target: float) -> dict[str, Any] | None:
    """Return FAR and FRR at a target FRR, and the threshold; None where the calibration images are too few for it.

    Args:
        scores: of calibration, clean and trojaned images, in bits.
        target: the false rejection rate aimed at.
    """
    calibration, clean, trojaned = scores
    if len(calibration) < least_images(target):
        return None
    regions = peel(calibration[None])
    errors = errors_of(*(rejects(regions, target, part[None]) for part in (clean, trojaned)))
    return errors | {"threshold_bits": float(regions.thresholds[0, quantile_rank(target, len(calibration)) - 1])}
