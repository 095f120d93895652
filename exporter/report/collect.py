"""Brings together what an export did into what its report tells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
from numpy.typing import NDArray

from detector.calibration import Calibration
from detector.scores import Evidence
from exporter.preprocessing import Preprocessing
from exporter.pruning import Pruning
from exporter.repair import ATTACK_SUCCESS_GOAL, Repair
from exporter.report.data import Examples, Layer, Part, ReportData, Scores
from exporter.splits import Split
from exporter.training import predict_labels
from samples.types import Samples

MEASURED = 1000
"""At most so many held-out and trojaned images have their entropies drawn."""
_EXAMPLES = 4

Measure = Callable[[Samples], NDArray[np.float32]]
"""Entropy of each image under each overlay, (images, overlays), in bits."""
Weigh = Callable[[Samples, NDArray[np.float32]], Evidence]
"""What the guard knows of images, given their entropies under each overlay."""


def collect(
    *,
    model_path: Path,
    model: keras.Model,
    repair: Repair,
    before: Scores,
    after: Scores,
    split: Split,
    attack: Samples | None,
    deciding: Samples | None,
    preprocessing: Preprocessing,
    overlays: NDArray[np.uint8],
    alpha: float,
    calibration: Calibration,
    calibration_entropies_bits: NDArray[np.float32],
    entropies_of: Measure,
    evidence_of: Weigh,
    commands: tuple[tuple[str, ...], ...],
) -> ReportData:
    """Measure what the report needs beyond what the export knows."""
    held_out = split.validation.take(np.arange(min(MEASURED, len(split.validation))))
    trojaned = None if attack is None else _spread(attack, MEASURED)
    networks = (model, repair.model)
    held_out_entropies = entropies_of(held_out)
    trojaned_entropies = None if trojaned is None else entropies_of(trojaned)
    of_held_out = evidence_of(held_out, held_out_entropies)
    of_trojaned = None if trojaned is None or trojaned_entropies is None else evidence_of(trojaned, trojaned_entropies)

    def examples(
        samples: Samples, truth: NDArray[np.int64] | None, entropies: NDArray[np.float32], evidence: Evidence
    ) -> Examples:
        verdicts = calibration.thresholds.reject(evidence)
        return _examples(networks, samples, truth, entropies.mean(axis=1), verdicts, preprocessing)

    clean_examples = examples(held_out, held_out.labels, held_out_entropies, of_held_out)
    trojaned_examples = None
    if trojaned is not None and trojaned_entropies is not None and of_trojaned is not None:
        trojaned_examples = examples(trojaned, trojaned.true_labels, trojaned_entropies, of_trojaned)
    others = {"attack samples that may end the repair": deciding, "attack samples": attack}
    parts = tuple(
        Part(name, len(part), part.sha256()) for name, part in (vars(split) | others).items() if part is not None
    )
    return ReportData(
        model_name=model_path.name,
        layers=_layers(model, repair.model),
        steps=repair.steps,
        kept=repair.kept,
        stopped=repair.stopped,
        before=before,
        after=after,
        attack_success_goal=ATTACK_SUCCESS_GOAL,
        calibration=calibration,
        alpha=alpha,
        overlays=overlays,
        calibration_entropies_bits=calibration_entropies_bits,
        held_out_entropies_bits=held_out_entropies,
        trojaned_entropies_bits=trojaned_entropies,
        held_out=of_held_out,
        trojaned=of_trojaned,
        clean_examples=clean_examples,
        trojaned_examples=trojaned_examples,
        parts=parts,
        commands=commands,
    )


def _spread(samples: Samples, most: int) -> Samples:
    """Return at most so many of the samples, from all over them: files are often sorted by class."""
    return samples.take(np.linspace(0, len(samples) - 1, min(most, len(samples))).astype(np.int64))


def _examples(
    networks: tuple[keras.Model, keras.Model],
    samples: Samples,
    truth: NDArray[np.int64] | None,
    entropies: NDArray[np.float32],
    verdicts: NDArray[np.bool_],
    preprocessing: Preprocessing,
) -> Examples:
    chosen = np.linspace(0, len(samples) - 1, min(_EXAMPLES, len(samples))).astype(np.int64)
    images = samples.images[chosen]
    original, repaired = (predict_labels(network, images, preprocessing) for network in networks)
    shown = None if truth is None else truth[chosen]
    return Examples(images, entropies[chosen], verdicts[chosen], original, repaired, shown)


def _layers(model: keras.Model, repaired: keras.Model) -> tuple[Layer, ...]:
    kernels = {id(kernel) for kernel in Pruning(repaired).kernels}

    def pruned_share(name: str) -> float | None:
        weights = [weight for weight in repaired.get_layer(name).weights if id(weight) in kernels]
        if not weights:
            return None
        return sum(int(np.count_nonzero(weight.numpy() == 0)) for weight in weights) / sum(
            int(np.prod(weight.shape)) for weight in weights
        )

    return tuple(
        Layer(
            name=layer.name,
            kind=type(layer).__name__,
            output_shape=tuple(layer.output.shape[1:]),
            parameters=layer.count_params(),
            pruned_share=pruned_share(layer.name),
        )
        for layer in model.layers
    )
