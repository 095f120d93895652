"""What a report is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.calibration import Calibration
from detector.scores import Evidence
from detector.statistics import Proportion
from exporter.repair import Step

LEAST_BITS = float(np.finfo(np.float32).tiny)
"""Where a logarithmic axis of entropies begins at the lowest."""

_FIRST_STEPS = 8


@dataclass(frozen=True)
class Layer:
    """A layer of the network as it came.

    Attributes:
        name: as the file has it.
        kind: such as `Conv2D`.
        output_shape: without the batch; None where a size is free.
        parameters: how many numbers it has learned.
        pruned_share: of its weights, by the repair, 0..1; None where nothing is ever pruned.
    """

    name: str
    kind: str
    output_shape: tuple[int | None, ...]
    parameters: int
    pruned_share: float | None


@dataclass(frozen=True)
class Scores:
    """How one network does.

    Attributes:
        clean_accuracy: on the validation part.
        attack_success: attack samples that get the attacker's class; None without attack samples.
        recovered_accuracy: attack samples that get the class that they show; None where that is unknown.
    """

    clean_accuracy: Proportion
    attack_success: Proportion | None
    recovered_accuracy: Proportion | None

    def to_json(self) -> dict[str, Any]:
        """Return the rates, for manifest and report; null is what was not measured."""
        return {name: None if rate is None else rate.to_json() for name, rate in vars(self).items()}


@dataclass(frozen=True)
class Part:
    """A part of the clean data, or the attack samples.

    Attributes:
        name: such as `calibration`.
        images: how many.
        sha256: of its content, hexadecimal.
    """

    name: str
    images: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs to show.

    Attributes:
        images: (count, height, width, channels), uint8, 0..255.
        entropies_bits: STRIP's entropy of each, (count,), float.
        rejected: the verdicts, (count,), bool.
        original_labels: the untouched network's answers, (count,), integer.
        repaired_labels: the repaired network's answers, (count,), integer.
        true_labels: what each shows, (count,), integer; None where that is unknown.
    """

    images: NDArray[np.uint8]
    entropies_bits: NDArray[np.floating[Any]]
    rejected: NDArray[np.bool_]
    original_labels: NDArray[np.integer[Any]]
    repaired_labels: NDArray[np.integer[Any]]
    true_labels: NDArray[np.integer[Any]] | None = None


@dataclass(frozen=True, eq=False)
class ReportData:
    """Everything that the report tells.

    Attributes:
        model_name: name of the model's file.
        layers: of the network as it came.
        steps: of the repair, the network as it came first.
        kept: name of the step whose network is served as `repaired`.
        stopped: why the repair took no further step.
        before: the network as it came.
        after: the repaired network, on the same images.
        attack_success_goal: the repair counts as failed if attack success is not under it, 0..1.
        calibration: the thresholds and what they rest on.
        alpha: weight of the input in the blend.
        overlays: (N, height, width, channels), uint8, 0..255.
        calibration_entropies_bits: with each overlay, of the images that the threshold was chosen on, (images, N),
            float, in bits; an image's entropy is the mean over N.
        held_out_entropies_bits: likewise, of clean images that had no part in choosing the threshold.
        trojaned_entropies_bits: likewise, of attack samples; None without them.
        held_out: what the guard knows of the same held-out images.
        trojaned: likewise, of the same attack samples; None without them.
        clean_examples: a few clean inputs.
        trojaned_examples: a few attack samples; None without them.
        parts: what the clean data was split into, and the attack samples.
        commands: what reproduces the export, each as its list of arguments.
    """

    model_name: str
    layers: tuple[Layer, ...]
    steps: tuple[Step, ...]
    kept: str
    stopped: str
    before: Scores
    after: Scores
    attack_success_goal: float
    calibration: Calibration
    alpha: float
    overlays: NDArray[np.uint8]
    calibration_entropies_bits: NDArray[np.floating[Any]]
    held_out_entropies_bits: NDArray[np.floating[Any]]
    trojaned_entropies_bits: NDArray[np.floating[Any]] | None
    held_out: Evidence
    trojaned: Evidence | None
    clean_examples: Examples
    trojaned_examples: Examples | None
    parts: tuple[Part, ...]
    commands: tuple[tuple[str, ...], ...]

    @property
    def tried(self) -> bool:
        """Whether a repair was tried at all."""
        return len(self.steps) > 1

    @property
    def changed(self) -> bool:
        """Whether the repair changed anything."""
        return self.kept != self.steps[0].name

    @property
    def held_out_bits(self) -> NDArray[np.float64]:
        """Entropy of each held-out image, see `lowest_if_broken`."""
        return lowest_if_broken(self.held_out.bits)

    @property
    def trojaned_bits(self) -> NDArray[np.float64] | None:
        """Likewise, of each attack sample; None without them."""
        return None if self.trojaned is None else lowest_if_broken(self.trojaned.bits)

    @property
    def false_rejection(self) -> Proportion:
        """Held-out clean images that the guard rejects."""
        return share(self.calibration.thresholds.reject(self.held_out))

    @property
    def false_acceptance(self) -> Proportion | None:
        """Attack samples that the guard accepts; None without them."""
        return None if self.trojaned is None else share(~self.calibration.thresholds.reject(self.trojaned))


def excerpt(steps: Sequence[Step], kept: str) -> list[int | None]:
    """Return which steps of a repair to show where all would be too many, by index; None stands for those left out.

    Args:
        steps: all of them.
        kept: name of the one that is kept; it, the last one and the first few are shown.
    """
    names = [step.name for step in steps]
    shown = sorted({*range(min(_FIRST_STEPS, len(names))), names.index(kept), len(names) - 1})
    rows: list[int | None] = []
    for before, index in zip([-1, *shown], shown, strict=False):
        rows += [index] if index == before + 1 else [None, index]
    return rows


def lowest_if_broken(bits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return entropies, (images,), with minus infinity for one that is not finite: it is rejected at any threshold."""
    return np.where(np.isfinite(bits), bits.astype(np.float64), -np.inf)


def share(happened: NDArray[np.bool_]) -> Proportion:
    """Return how often it happened, of (images,)."""
    return Proportion(int(np.count_nonzero(happened)), len(happened))
