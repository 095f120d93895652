"""How often the original, the repaired and the guarded network are right, wrong and fooled.

FRR (false rejection rate): clean images that the guard rejects. FAR (false acceptance rate): trojaned images that it
accepts. Attack success: trojaned images answered with the attacker's class, those that really show it included.
Recovered accuracy: trojaned images answered with the class that they really show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from client.api import ModelMetadata, OnProgress, Verdicts
from detector.errors import DataError, InputError
from detector.statistics import Proportion, auroc, auroc_interval
from samples.types import Samples


class Classifier(Protocol):
    """What `evaluate` asks of a client; `client.api.GuardedClient` is one."""

    def metadata(self) -> ModelMetadata:
        """Tell the number of classes."""
        ...

    def classify(
        self, images: NDArray[np.uint8], *, probabilities: bool = False, on_progress: OnProgress | None = None
    ) -> Verdicts:
        """Classify (batch, height, width, channels) images."""
        ...

    def original_probabilities(
        self, images: NDArray[np.uint8], *, on_progress: OnProgress | None = None
    ) -> NDArray[np.float32]:
        """Return the original network's (batch, M) probabilities."""
        ...


@dataclass(frozen=True)
class NetworkResult:
    """How one network does by itself.

    Attributes:
        clean_accuracy: clean images answered rightly.
        attack_success: trojaned images answered with the attacker's class; None without trojaned images.
        recovered_accuracy: trojaned images answered with their true class; None where that is unknown.
    """

    clean_accuracy: Proportion
    attack_success: Proportion | None
    recovered_accuracy: Proportion | None


@dataclass(frozen=True)
class GuardedResult:
    """How the guarded network does: the repaired one's labels, and STRIP's verdicts.

    `..._of_accepted` is out of the images that were accepted (`n=0` where none was), `..._end_to_end` out of all.

    Attributes:
        false_rejection: FRR, clean images that were rejected.
        false_acceptance: FAR, trojaned images that were accepted; None without trojaned images.
        clean_accuracy_of_accepted: clean images answered rightly.
        clean_accuracy_end_to_end: clean images accepted and answered rightly.
        attack_success_of_accepted: trojaned images answered with the attacker's class; None without trojaned images.
        attack_success_end_to_end: trojaned images accepted and answered with it; None without trojaned images.
        recovered_accuracy_of_accepted: trojaned images answered with their true class; None where that is unknown.
        recovered_accuracy_end_to_end: trojaned images accepted and answered with it; None where that is unknown.
    """

    false_rejection: Proportion
    false_acceptance: Proportion | None
    clean_accuracy_of_accepted: Proportion
    clean_accuracy_end_to_end: Proportion
    attack_success_of_accepted: Proportion | None
    attack_success_end_to_end: Proportion | None
    recovered_accuracy_of_accepted: Proportion | None
    recovered_accuracy_end_to_end: Proportion | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Everything that was measured.

    Attributes:
        original: the untouched, backdoored network.
        repaired: the repaired network, verdicts left aside.
        guarded: the repaired network behind the verdicts.
        auroc: how well low entropy tells trojaned from clean, 0..1; None without trojaned images.
        auroc_of_p_value: how well a low p-value does.
        clean_entropies_bits: (count,), float32, in the order of the clean samples.
        trojaned_entropies_bits: (count,), float32, in the order of the trojaned samples; None without them.
        clean_p_values: (count,), float32, 0..1, in the order of the clean samples.
        trojaned_p_values: (count,), float32, 0..1, in the order of the trojaned samples; None without them.
        classes: M.
    """

    original: NetworkResult
    repaired: NetworkResult
    guarded: GuardedResult
    auroc: float | None
    auroc_of_p_value: float | None
    clean_entropies_bits: NDArray[np.float32]
    trojaned_entropies_bits: NDArray[np.float32] | None
    clean_p_values: NDArray[np.float32]
    trojaned_p_values: NDArray[np.float32] | None
    classes: int

    def interval(self, area: float) -> tuple[float, float]:
        """Return the 95 % interval of one of the two areas, (low, high), each 0..1.

        Raises:
            InputError: there were no trojaned images.
        """
        trojaned = self.trojaned_p_values
        return auroc_interval(area, len(self.clean_p_values), 0 if trojaned is None else len(trojaned))

    def to_json(self, *, entropies: bool = False) -> dict[str, Any]:
        """Return plain dictionaries, lists and numbers; what was not measured is None.

        Args:
            entropies: put the entropies of every image in as well.
        """
        written: dict[str, Any] = {
            part: {
                name: None if proportion is None else proportion.to_json() for name, proportion in vars(result).items()
            }
            for part, result in (("original", self.original), ("repaired", self.repaired), ("guarded", self.guarded))
        }
        for name, area in (("auroc", self.auroc), ("auroc_of_p_value", self.auroc_of_p_value)):
            written[name] = area
            written[f"{name}_low"], written[f"{name}_high"] = (None, None) if area is None else self.interval(area)
        written["classes"] = self.classes
        if entropies:
            trojaned = self.trojaned_entropies_bits
            written["clean_entropies_bits"] = self.clean_entropies_bits.tolist()
            written["trojaned_entropies_bits"] = None if trojaned is None else trojaned.tolist()
        return written


def proportion(happened: NDArray[np.bool_]) -> Proportion:
    """Return how often it happened: `happened` is (count,), bool."""
    return Proportion(int(np.count_nonzero(happened)), len(happened))


def network_result(
    clean_labels: NDArray[np.integer[Any]],
    clean: Samples,
    trojaned_labels: NDArray[np.integer[Any]] | None = None,
    trojaned: Samples | None = None,
) -> NetworkResult:
    """Score one network's answers: labels are (count,), one per sample."""
    attack = recovered = None
    if trojaned is not None and trojaned_labels is not None:
        attack = proportion(trojaned_labels == trojaned.labels)
        if trojaned.true_labels is not None:
            recovered = proportion(trojaned_labels == trojaned.true_labels)
    return NetworkResult(proportion(clean_labels == clean.labels), attack, recovered)


def guarded_result(
    clean_verdicts: Verdicts,
    clean: Samples,
    trojaned_verdicts: Verdicts | None = None,
    trojaned: Samples | None = None,
) -> GuardedResult:
    """Score the guarded network's answers, one verdict per sample.

    What counts as rejected is the verdict, also where the server only marks trojaned images and does not block them.
    """
    right = clean_verdicts.labels == clean.labels
    accepted = ~clean_verdicts.trojaned
    far = attack_of = attack_all = recovered_of = recovered_all = None
    if trojaned is not None and trojaned_verdicts is not None:
        passed = ~trojaned_verdicts.trojaned
        fooled = trojaned_verdicts.labels == trojaned.labels
        far = proportion(passed)
        attack_of, attack_all = proportion(fooled[passed]), proportion(fooled & passed)
        if trojaned.true_labels is not None:
            recovered = trojaned_verdicts.labels == trojaned.true_labels
            recovered_of, recovered_all = proportion(recovered[passed]), proportion(recovered & passed)
    return GuardedResult(
        false_rejection=proportion(~accepted),
        false_acceptance=far,
        clean_accuracy_of_accepted=proportion(right[accepted]),
        clean_accuracy_end_to_end=proportion(right & accepted),
        attack_success_of_accepted=attack_of,
        attack_success_end_to_end=attack_all,
        recovered_accuracy_of_accepted=recovered_of,
        recovered_accuracy_end_to_end=recovered_all,
    )


def evaluate(
    client: Classifier, clean: Samples, trojaned: Samples | None = None, on_progress: OnProgress | None = None
) -> Evaluation:
    """Measure the original, the repaired and the guarded network through a running server.

    The samples must be strangers to calibration and repair, or the figures flatter.

    Args:
        client: an open `GuardedClient`.
        clean: clean images; `labels` are their true classes.
        trojaned: images with the trigger; `labels` are the class that the attacker wants.
        on_progress: called with (images done, images in all); every image counts twice, once per network.

    Raises:
        DataError: a set is empty, not what the model takes, or labelled out of the model's range.
        ServerError: no usable answer; see the hierarchy in `detector.errors`.
    """
    classes = client.metadata().classes
    _check("clean", clean, classes)
    if trojaned is not None:
        _check("trojaned", trojaned, classes)
    total = 2 * (len(clean) + (0 if trojaned is None else len(trojaned)))

    def progress(before: int) -> Callable[[int, int], None] | None:
        return None if on_progress is None else lambda done, _: on_progress(before + done, total)

    clean_original, clean_repaired, clean_verdicts = _ask(client, clean, progress, 0)
    if trojaned is None:
        trojaned_original = trojaned_repaired = trojaned_verdicts = None
    else:
        trojaned_original, trojaned_repaired, trojaned_verdicts = _ask(client, trojaned, progress, 2 * len(clean))
    entropies = None if trojaned_verdicts is None else trojaned_verdicts.entropy_bits
    return Evaluation(
        original=network_result(clean_original, clean, trojaned_original, trojaned),
        repaired=network_result(clean_repaired, clean, trojaned_repaired, trojaned),
        guarded=guarded_result(clean_verdicts, clean, trojaned_verdicts, trojaned),
        auroc=None if entropies is None else auroc(_suspicion(clean_verdicts.entropy_bits), _suspicion(entropies)),
        auroc_of_p_value=(
            None if trojaned_verdicts is None else auroc(-clean_verdicts.p_values, -trojaned_verdicts.p_values)
        ),
        clean_entropies_bits=clean_verdicts.entropy_bits,
        trojaned_entropies_bits=entropies,
        clean_p_values=clean_verdicts.p_values,
        trojaned_p_values=None if trojaned_verdicts is None else trojaned_verdicts.p_values,
        classes=classes,
    )


def _suspicion(entropies_bits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Low entropy is suspicious, and none at all most of all: the server rejects what has no finite entropy."""
    return np.where(np.isfinite(entropies_bits), -entropies_bits, np.float32(np.inf))


def _ask(
    client: Classifier, samples: Samples, progress: Callable[[int], OnProgress | None], before: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], Verdicts]:
    """Return the original's labels, the repaired network's labels, and the verdicts."""
    verdicts = client.classify(samples.images, probabilities=True, on_progress=progress(before))
    if verdicts.probabilities is None:
        raise InputError("client: got no probabilities though they were asked for, expected (batch, M)")
    original = client.original_probabilities(samples.images, on_progress=progress(before + len(samples)))
    # The repaired network's own opinion: the label of a blocked image is M.
    return original.argmax(axis=1), verdicts.probabilities.argmax(axis=1), verdicts


def _check(name: str, samples: Samples, classes: int) -> None:
    """Refuse, before the long wait and not after it, samples that cannot be scored."""
    counts = [len(part) for part in (samples.images, samples.labels, samples.true_labels) if part is not None]
    if counts[0] == 0 or len(set(counts)) != 1:
        raise DataError(f"{name} samples: got {counts} images and labels, expected at least one and a label for each")
    for kind, labels in (("labels", samples.labels), ("true_labels", samples.true_labels)):
        if labels is not None and (labels.min() < 0 or labels.max() >= classes):
            raise DataError(
                f"{name} samples: got {kind} from {labels.min()} to {labels.max()}, "
                f"but the model has {classes} classes: 0 to {classes - 1}"
            )
