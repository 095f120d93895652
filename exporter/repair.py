"""Fine-pruning: zero weights that clean data does not need, then teach the network on clean data again.

Liu et al., "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", RAID 2018, with the source
report's criterion for what is pruned.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from detector.errors import DataError, InputError
from exporter.augmentation import occlude
from exporter.training import Progress, Trainer, score, seed_everything
from samples.types import Samples

AUGMENTATIONS = ("occlusion", "none")
REPAIRS = ("magnitude", "none")
ATTACK_SUCCESS_GOAL = 0.01
FRACTION_PER_ROUND = 0.05


@dataclass(frozen=True)
class RepairOptions:
    """How to repair.

    Attributes:
        method: `magnitude` (fine-pruning by the source report's criterion) or `none`.
        augment: `occlusion` or `none`, applied to the images of every fine-tuning epoch.
        max_rounds: at most this many rounds of pruning and one epoch of fine-tuning.
        final_epochs: of fine-tuning after the last round; 0 as in the source report.
        allowed_drop: how much accuracy on the clean validation split may fall, 0..1.
        learning_rate: of Adam.
        batch_size: of fine-tuning.
        seed: of everything random.
    """

    method: str = "magnitude"
    augment: str = "occlusion"
    max_rounds: int = 10
    final_epochs: int = 20
    allowed_drop: float = 0.03
    learning_rate: float = 1e-3
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise InputError for an option that makes no sense."""
        if self.method not in REPAIRS:
            raise InputError(f"repair: got {self.method!r}, expected one of {', '.join(REPAIRS)}")
        if self.augment not in AUGMENTATIONS:
            raise InputError(f"augment: got {self.augment!r}, expected one of {', '.join(AUGMENTATIONS)}")
        if not 1 <= self.max_rounds <= 20:
            raise InputError(f"max rounds: got {self.max_rounds}, expected 1 to 20 (5 % of the weights' range a round)")
        if self.final_epochs < 0:
            raise InputError(f"final epochs: got {self.final_epochs}, expected 0 or more")
        if not 0.0 <= self.allowed_drop < 1.0:
            raise InputError(
                f"allowed drop: got {self.allowed_drop}, expected a share of accuracy, 0 up to 1 (0.03 is 3 points)"
            )
        if not 0.0 < self.learning_rate < 1.0:
            raise InputError(f"learning rate: got {self.learning_rate}, expected more than 0 and less than 1")
        if self.batch_size < 1:
            raise InputError(f"batch size: got {self.batch_size}, expected at least 1")


@dataclass(frozen=True)
class Round:
    """The network after a step of the repair.

    Attributes:
        name: of the step: `as received`, `round 1` and so on, `final epoch 1` and so on.
        fraction: of the weights' range under which weights were pruned.
        clean_accuracy: on the clean validation split, 0..1.
        attack_success: share of the attack samples that get the attacker's class, 0..1; None without attack samples.
        pruned_share: of the convolution weights, 0..1.
    """

    name: str
    fraction: float
    clean_accuracy: float
    attack_success: float | None
    pruned_share: float

    @property
    def attack_failed(self) -> bool:
        """Whether there were attack samples, and under 1 % of them still get the attacker's class."""
        return self.attack_success is not None and self.attack_success < ATTACK_SUCCESS_GOAL


@dataclass(frozen=True)
class Repair:
    """A repaired network and how it came about.

    Attributes:
        model: the repaired network.
        rounds: every step that was taken, from the network as it came.
        kept: name of the step whose network `model` is.
        stopped: why no further round was run.
    """

    model: keras.Model
    rounds: tuple[Round, ...]
    kept: str
    stopped: str

    @property
    def changed(self) -> bool:
        """Whether `model` differs from the network as it came; if not, its backdoor is untouched."""
        return self.kept != self.rounds[0].name

    def to_json(self) -> dict[str, Any]:
        """Return all but the network, for the manifest."""
        return {
            "changed": self.changed,
            "kept": self.kept,
            "stopped": self.stopped,
            "rounds": [asdict(row) for row in self.rounds],
        }


def pruning_mask(kernel: NDArray[np.floating[Any]], fraction: float) -> NDArray[np.bool_]:
    """Return which weights stay: those above `min + (max - min) * fraction` over the signed weights of this kernel.

    The source report's criterion. Signed: the most negative weights go first, however large they are.

    Args:
        kernel: all weights of one convolution's kernel, any shape.
        fraction: of the range, 0..1.

    Returns:
        The kernel's shape; False where a weight is to become 0.
    """
    low, high = kernel.min(), kernel.max()
    return np.asarray(kernel > low + (high - low) * fraction)


def fine_prune(
    model: keras.Model,
    clean: Samples,
    validation: Samples,
    *,
    scale: str,
    options: RepairOptions,
    attack: Samples | None = None,
    on_progress: Progress | None = None,
) -> Repair:
    """Prune, fine-tune on clean data, repeat.

    Each round prunes by 5 % more of each kernel's range (of `Conv2D` layers) and fine-tunes for one epoch; a pruned
    weight stays 0. The rounds stop when the accuracy on `validation` has fallen by more than the allowed drop; further
    epochs of fine-tuning follow, from the last network within it. The last network within it is kept.

    Args:
        model: the network as it came; not changed.
        clean: what to fine-tune on.
        validation: clean samples for the stopping decision, disjoint from `clean`.
        scale: `unit` or `raw`, what the network expects of pixels.
        options: how to repair.
        attack: trojaned samples, if any are at hand: their success stops the rounds once under 1 %.
        on_progress: told about every batch.

    Raises:
        DataError: there are no clean samples to fine-tune on, or none to validate with.
        InputError: the network has no convolution to prune.
    """
    for name, samples in (("repair", clean), ("validation", validation)):
        if len(samples) == 0 and options.method != "none":
            raise DataError(f"{name} split: got no images, expected some; give more clean images")
    seed_everything(options.seed)
    repaired = keras.models.clone_model(model)
    repaired.set_weights(model.get_weights())
    convolutions = [layer for layer in repaired.layers if isinstance(layer, keras.layers.Conv2D)]
    if options.method == "magnitude" and not convolutions:
        raise InputError("repair: got a network without a convolution, expected one to prune; use --repair none")

    def measure(name: str, fraction: float) -> Round:
        weights = sum(layer.kernel.numpy().size for layer in convolutions)
        zeros = sum(int(np.count_nonzero(layer.kernel.numpy() == 0)) for layer in convolutions)
        return Round(
            name=name,
            fraction=fraction,
            clean_accuracy=score(repaired, validation, scale).rate,
            attack_success=None if attack is None else score(repaired, attack, scale).rate,
            pruned_share=zeros / weights if weights else 0.0,
        )

    rounds = [measure("as received", 0.0)]
    kept, kept_weights = rounds[0], repaired.get_weights()
    stopped = f"all {options.max_rounds} rounds were run"
    if options.method == "none":
        return Repair(repaired, tuple(rounds), kept.name, "no repair was asked for")
    least_accuracy = rounds[0].clean_accuracy - options.allowed_drop
    trainer = Trainer(
        repaired,
        clean,
        scale=scale,
        batch_size=options.batch_size,
        seed=options.seed,
        augment=occlude if options.augment == "occlusion" else None,
        on_progress=on_progress,
    )
    masks = [np.ones(layer.kernel.shape, dtype=bool) for layer in convolutions]
    for number in range(1, options.max_rounds + 1):
        for index, layer in enumerate(convolutions):
            kernel = layer.kernel.numpy()
            masks[index] &= pruning_mask(kernel, number * FRACTION_PER_ROUND)
            layer.kernel.assign(kernel * masks[index])
            # The optimizer applies a variable's constraint after each of its steps.
            layer.kernel.constraint = _KeepZero(masks[index])
        trainer.run(1, options.learning_rate, f"Fine-pruning, round {number} of at most {options.max_rounds}")
        latest = measure(f"round {number}", number * FRACTION_PER_ROUND)
        rounds.append(latest)
        if latest.clean_accuracy < least_accuracy:
            stopped = f"round {number} lost more than {options.allowed_drop:.1%} of clean accuracy"
            break
        kept, kept_weights = latest, repaired.get_weights()
        if latest.attack_failed:
            stopped = f"attack success fell under {ATTACK_SUCCESS_GOAL:.0%}"
            break
    repaired.set_weights(kept_weights)

    def keep_if_good(epoch: int) -> bool:
        nonlocal kept, kept_weights
        latest = measure(f"final epoch {epoch}", kept.fraction)
        rounds.append(latest)
        if latest.clean_accuracy >= least_accuracy:
            kept, kept_weights = latest, repaired.get_weights()
        return not kept.attack_failed

    if options.final_epochs and not kept.attack_failed:
        for layer in convolutions:  # of the round that was kept
            layer.kernel.constraint = _KeepZero(layer.kernel.numpy() != 0)
        trainer.run(options.final_epochs, options.learning_rate, "Final fine-tuning", go_on=keep_if_good)
        repaired.set_weights(kept_weights)
    return Repair(repaired, tuple(rounds), kept.name, stopped)


class _KeepZero(keras.constraints.Constraint):  # type: ignore[misc]
    """Holds pruned weights at zero."""

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        self._mask = keras.ops.convert_to_tensor(mask.astype(np.float32))

    def __call__(self, kernel: Any) -> Any:
        return kernel * self._mask
