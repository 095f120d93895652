"""The detectors that are compared, each with ten overlays where it blends, on the same images.

A detector gives scores, the lower the more suspicious, and perhaps nlls as well. Thresholds come from clean calibration
images alone, as `detector.calibration` has them: the largest rejection region that keeps the target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks.detection.art_strip import art_entropies
from benchmarks.detection.cases import OVERLAYS, SEED, TARGETS, Material, some
from benchmarks.detection.scale_up import FACTORS, THRESHOLD, consistency, scaled_labels, standardized
from detector.calibration import ALPHAS, STRIP_SHARE, least_images
from detector.conformal import Floats, Regions, peel
from detector.consensus import is_disputed
from detector.scores import score_bits
from detector.statistics import Proportion, auroc
from detector.strip import is_trojaned, perturbation_entropies_bits
from exporter.entropies import OnProgress, entropy_matrix, measure_nlls, open_graph

COUNT = OVERLAYS[0]
REPORTS_BITS = 0.5
"""The source report's threshold."""
CALIBRATION, CLEAN = "calibration", "clean"

Scores: TypeAlias = dict[str, Floats]
"""One score an image: of `CALIBRATION`, of `CLEAN`, and of trojaned images by attack."""


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
        self.labels = cache(self._labels)

    def _entropies(self, alpha: float) -> Scores:
        """Return the entropies of each image under each overlay, (images, overlays), in bits."""
        overlays = self.split.overlays.images[:COUNT]
        description = f"Blending at {alpha:g}"
        return {
            name: entropy_matrix(self.session, images, overlays, alpha, self.report, description)
            for name, images in self.images.items()
        }

    def nlls(self, repaired: Path) -> Scores:
        """Return how little the repaired network, an ONNX file, believes the sentinel's labels, in nats."""
        session = open_graph(repaired)
        return {name: measure_nlls(self.session, session, images, self.report) for name, images in self.images.items()}

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
        return {name: plain_entropies(self.session, images) for name, images in self.images.items()}

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
        scores: measures its scores, and its nlls where it has some.
        at: a threshold that it comes with, if it does; scores at or under it are rejected.
        calibrated: whether thresholds are calibrated as well.
    """

    passes: int
    scores: Callable[[Measured], tuple[Scores, Scores | None]]
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
    found["confidence"] = Detector(1, lambda measured: (measured.confidence(), None))
    found["ART's STRIP"] = Detector(COUNT, lambda measured: (measured.art(), None))
    found["SCALE-UP"] = Detector(1 + len(FACTORS), lambda measured: (measured.scale_up(), None), -THRESHOLD)
    if classes_known:
        found["SCALE-UP + clean data"] = Detector(
            1 + len(FACTORS), lambda measured: (measured.scale_up_standardized(), None)
        )
    return found


def judge(detector: Detector, measured: Measured) -> dict[str, Any]:
    """Return what a detector makes of a case: for each attack AUROC, and FAR and FRR at each target."""
    scores, nlls = detector.scores(measured)
    return {
        "passes": detector.passes,
        "attacks": judge_scores(scores, nlls, detector.at, calibrated=detector.calibrated),
    }


def judge_scores(
    scores: Scores, nlls: Scores | None = None, at: float | None = None, *, calibrated: bool = True
) -> dict[str, dict[str, Any]]:
    """Return, for each attack, AUROC, and FAR and FRR at each target; None where calibration images are too few for it.

    Args:
        scores: the lower, the more suspicious.
        nlls: the higher, the more suspicious, where they have a say.
        at: see `Detector`.
        calibrated: see `Detector`.
    """
    regions = peel(scores[CALIBRATION], *((None, 1.0) if nlls is None else (nlls[CALIBRATION], STRIP_SHARE)))
    if nlls is None:
        suspicion = {name: -part for name, part in scores.items()}
    else:
        suspicion = {name: -regions.p_value(part, nlls[name]) for name, part in scores.items()}
    results: dict[str, dict[str, Any]] = {}
    for attack in (name for name in scores if name not in (CALIBRATION, CLEAN)):
        result: dict[str, Any] = {"auroc": auroc(suspicion[CLEAN], suspicion[attack])}
        if at is not None:
            result["fixed"] = errors_of(*(is_trojaned(scores[name], at) for name in (CLEAN, attack)))
        for target in TARGETS if calibrated else ():
            result[f"at_{target:g}"] = None
            if len(scores[CALIBRATION]) >= least_images(target, "strip" if nlls is None else "consensus"):
                verdicts = (
                    rejects(regions, target, scores[name], None if nlls is None else nlls[name])
                    for name in (CLEAN, attack)
                )
                result[f"at_{target:g}"] = errors_of(*verdicts)
        results[attack] = result
    return results


def rejects(regions: Regions, target: float, scores: Floats, nlls: Floats | None) -> NDArray[np.bool_]:
    """Return which images lie in the largest region that a clean input is in no more often than the target has it.

    `detector.calibration.calibrate` takes the same thresholds, and refuses where ties leave no region of the size asked
    for; here a smaller one is taken then, or none, which rejects nothing.
    """
    within = int(np.searchsorted(regions.p_values, target + 1e-9, side="right"))
    if within == 0:
        return np.zeros(len(scores), bool)
    rejected = is_trojaned(scores, float(regions.entropies_bits[within - 1]))
    if nlls is not None:
        rejected = rejected | is_disputed(nlls, float(regions.nlls[within - 1]))
    return np.asarray(rejected)


def errors_of(clean: NDArray[np.bool_], trojaned: NDArray[np.bool_]) -> dict[str, Any]:
    """Return FAR and FRR, given which clean and which trojaned images are rejected."""
    accepted = Proportion(int(np.count_nonzero(~trojaned)), len(trojaned))
    rejected = Proportion(int(np.count_nonzero(clean)), len(clean))
    return {"far": accepted.to_json(), "frr": rejected.to_json()}


def _strip(alpha: float) -> Callable[[Measured], tuple[Scores, None]]:
    def measure(measured: Measured) -> tuple[Scores, None]:
        return {name: score_bits(rows, "strip") for name, rows in measured.entropies(alpha).items()}, None

    return measure


def _consensus(repaired: Path | None) -> Detector:
    """Return `consensus` with a repaired network, or where there is none."""

    def measure(measured: Measured) -> tuple[Scores, Scores | None]:
        entropies = measured.entropies(ALPHAS["consensus"])
        bits = {name: score_bits(rows, "consensus") for name, rows in entropies.items()}
        return bits, None if repaired is None else measured.nlls(repaired)

    return Detector(COUNT if repaired is None else COUNT + 1, measure)


def plain_entropies(session: onnxruntime.InferenceSession, images: NDArray[np.uint8]) -> Floats:
    """Return the entropies of the network's answers to images as they are, (images,), in bits.

    Args:
        session: on the sentinel's graph.
        images: (images, height, width, channels), uint8.
    """
    parts = np.array_split(images, max(1, len(images) // 32))
    answers = [session.run(None, {"perturbations": part[:, None].astype(np.float32)})[0] for part in parts]
    return np.concatenate([perturbation_entropies_bits(answer)[:, 0] for answer in answers])
