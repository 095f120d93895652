"""The detectors that are compared, each with ten overlays where it blends, on the same images.

A detector gives evidence, of which each score is the more suspicious, the lower it is. Thresholds come from clean
calibration images alone, as `detector.calibration` has them: the largest rejection region that keeps the target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.detection.art_strip import art_entropies
from benchmarks.detection.cases import OVERLAYS, SEED, TARGETS, Material, some
from benchmarks.detection.scale_up import FACTORS, THRESHOLD, consistency, scaled_labels, standardized
from detector.calibration import ALPHAS, SHARES, least_images, quantile_rank
from detector.conformal import Floats, Regions, peel
from detector.scores import Evidence, score_bits
from detector.statistics import Proportion, auroc
from detector.strip import is_trojaned
from exporter.entropies import OnProgress, entropy_matrix, measure_nlls, measure_plain, open_graph

REVISION = 2
"""Of what detectors compute: what was measured of another one is measured again."""
COUNT = OVERLAYS[0]
REPORTS_BITS = 0.5
"""The source report's threshold."""
CALIBRATION, CLEAN = "calibration", "clean"

Scores: TypeAlias = dict[str, Floats]
"""One score an image: of `CALIBRATION`, of `CLEAN`, and of trojaned images by attack."""
Known: TypeAlias = dict[str, Evidence]
"""Likewise, all that a detector knows."""


class Measured:
    """What detectors ask of the images of a case, each thing measured once.

    Args:
        material: the case.
        images: at most so many clean and trojaned ones are judged.
        report: told what is going on.
    """

    def __init__(self, material: Material, images: int, report: OnProgress) -> None:
        self.session = material.sentinel
        self.report = report
        self.split = material.split
        judged = {CLEAN: material.judged_clean, **material.judged_trojaned}
        self.images = {CALIBRATION: material.calibration.images}
        self.images |= {name: some(part, images).images for name, part in judged.items()}
        self.entropies = cache(self._entropies)
        self.plain = cache(self._plain)
        self.labels = cache(self._labels)

    def _entropies(self, alpha: float) -> Scores:
        """Return the entropies of each image under each overlay, (images, overlays), in bits."""
        overlays = self.split.overlays.images[:COUNT]
        description = f"Blending at {alpha:g}"
        return {
            name: entropy_matrix(self.session, images, overlays, alpha, self.report, description)
            for name, images in self.images.items()
        }

    def _plain(self) -> dict[str, tuple[Floats, NDArray[np.int64]]]:
        """Return the entropies of the network's answers to images as they are, in bits, and its labels."""
        return {name: measure_plain(self.session, images, self.report) for name, images in self.images.items()}

    def nlls(self, repaired: Path) -> Scores:
        """Return how little the repaired network, an ONNX file, believes the sentinel's labels, in nats."""
        session = open_graph(repaired)
        return {
            name: measure_nlls(session, images, self.plain()[name][1], self.report)
            for name, images in self.images.items()
        }

    def art(self) -> Scores:
        """Return the entropies of the Adversarial Robustness Toolbox."""

        def predict(images: NDArray[np.float32]) -> NDArray[np.float32]:
            (probabilities,) = self.session.run(None, {"perturbations": images[:, None]})
            rows: NDArray[np.float32] = probabilities[:, 0]
            return rows

        overlays = self.split.overlays.images
        return {
            name: art_entropies(predict, images, overlays, COUNT, SEED, self.report)
            for name, images in self.images.items()
        }

    def confidence(self) -> Scores:
        """Return the entropies of the images as they are, in bits."""
        return {name: entropies for name, (entropies, _) in self.plain().items()}

    def _labels(self) -> dict[str, NDArray[np.int64]]:
        """Return the network's labels for each image as it is, and multiplied."""
        return {name: scaled_labels(self.session, images, self.report) for name, images in self.images.items()}

    def scale_up(self) -> Scores:
        """Return SCALE-UP's consistencies, negated."""
        return {name: -consistency(labels) for name, labels in self.labels().items()}

    def scale_up_standardized(self) -> Scores:
        """Return SCALE-UP's consistencies beside those of the defender's clean images of the class, negated."""
        clean = self.split.repair
        of_clean = consistency(scaled_labels(self.session, clean.images, self.report))
        return {
            name: -standardized(consistency(labels), labels[:, 0], of_clean, clean.labels)
            for name, labels in self.labels().items()
        }


@dataclass(frozen=True)
class Detector:
    """A detector that is compared.

    Attributes:
        passes: forward passes for an input, beside the one of the network that is served anyway.
        look: measures its evidence.
        at: a threshold that it comes with, if it does; scores at or under it are rejected.
        calibrated: whether thresholds are calibrated as well.
    """

    passes: int
    look: Callable[[Measured], Known]
    at: float | None = None
    calibrated: bool = True


def compared(repaired: dict[str, Path | None], classes_known: bool) -> dict[str, Detector]:
    """Return the detectors by name.

    Args:
        repaired: the ONNX file of the network after each repair that is joined with `consensus`; None where the repair
            changed nothing.
        classes_known: whether the defender has clean images of each class.
    """
    found = {
        "strip (report)": Detector(COUNT, _strip(0.5), REPORTS_BITS, calibrated=False),
        "strip 0.5": Detector(COUNT, _strip(0.5)),
        "strip 0.7": Detector(COUNT, _strip(0.7)),
        "consensus": _consensus(None),
    }
    found |= {f"consensus + {repair}": _consensus(file) for repair, file in repaired.items()}
    found["confidence"] = Detector(1, lambda measured: alone(measured.confidence()))
    found["ART's STRIP"] = Detector(COUNT, lambda measured: alone(measured.art()))
    found["SCALE-UP"] = Detector(1 + len(FACTORS), lambda measured: alone(measured.scale_up()), -THRESHOLD)
    if classes_known:
        found["SCALE-UP + clean data"] = Detector(
            1 + len(FACTORS), lambda measured: alone(measured.scale_up_standardized())
        )
    return found


def judge(detector: Detector, measured: Measured) -> dict[str, Any]:
    """Return what a detector makes of a case: for each attack AUROC, and FAR and FRR at each target."""
    return {
        "passes": detector.passes,
        "attacks": judge_evidence(detector.look(measured), detector.at, calibrated=detector.calibrated),
    }


def judge_evidence(known: Known, at: float | None = None, *, calibrated: bool = True) -> dict[str, dict[str, Any]]:
    """Return, for each attack, AUROC, and FAR and FRR at each target; None where calibration images are too few for it.

    Args:
        known: of calibration, clean and trojaned images.
        at: see `Detector`.
        calibrated: see `Detector`.
    """
    scores = {name: evidence.scores() for name, evidence in known.items()}
    count = scores[CALIBRATION].shape[1]
    regions = peel(scores[CALIBRATION], SHARES[len(scores[CALIBRATION])])
    # A p-value cannot tell inputs apart that no calibration image is as suspicious as; a single score can.
    suspicion = {name: -part[0] if len(part) == 1 else -regions.p_value(part) for name, part in scores.items()}
    results: dict[str, dict[str, Any]] = {}
    for attack in (name for name in scores if name not in (CALIBRATION, CLEAN)):
        result: dict[str, Any] = {"auroc": auroc(suspicion[CLEAN], suspicion[attack])}
        if at is not None:
            result["fixed"] = errors_of(*(is_trojaned(scores[name][0], at) for name in (CLEAN, attack)))
        for target in TARGETS if calibrated else ():
            result[f"at_{target:g}"] = None
            if count >= least_images(target, with_nlls=known[CALIBRATION].nlls is not None):
                verdicts = (rejects(regions, target, scores[name]) for name in (CLEAN, attack))
                result[f"at_{target:g}"] = errors_of(*verdicts)
        results[attack] = result
    return results


def rejects(regions: Regions, target: float, scores: Floats) -> NDArray[np.bool_]:
    """Return which images lie in the largest region that a clean input is in no more often than the target has it.

    `detector.calibration.calibrate` takes the same thresholds.

    Args:
        regions: of the calibration images.
        target: the false rejection rate aimed at.
        scores: (scores, images), the lower, the more suspicious.
    """
    rank = quantile_rank(target, len(regions.p_values))
    if rank == 0:
        return np.zeros(scores.shape[1], bool)
    broken = ~np.isfinite(scores)
    return np.asarray((broken | (scores <= regions.thresholds[:, rank - 1, None])).any(axis=0))


def errors_of(clean: NDArray[np.bool_], trojaned: NDArray[np.bool_]) -> dict[str, Any]:
    """Return FAR and FRR, given which clean and which trojaned images are rejected."""
    accepted = Proportion(int(np.count_nonzero(~trojaned)), len(trojaned))
    rejected = Proportion(int(np.count_nonzero(clean)), len(clean))
    return {"far": accepted.to_json(), "frr": rejected.to_json()}


def alone(scores: Scores) -> Known:
    """Return evidence that is one score."""
    return {name: Evidence(part) for name, part in scores.items()}


def _strip(alpha: float) -> Callable[[Measured], Known]:
    def look(measured: Measured) -> Known:
        return alone({name: score_bits(rows, "strip") for name, rows in measured.entropies(alpha).items()})

    return look


def _consensus(repaired: Path | None) -> Detector:
    """Return `consensus` with a repaired network, or where there is none."""

    def look(measured: Measured) -> Known:
        entropies, plain = measured.entropies(ALPHAS["consensus"]), measured.plain()
        nlls = {} if repaired is None else measured.nlls(repaired)
        return {
            name: Evidence(score_bits(rows, "consensus"), plain[name][0], nlls.get(name))
            for name, rows in entropies.items()
        }

    return Detector(COUNT + 1, look)
