"""Repairs a network: take away what clean data does not need, then teach it on clean data again."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import keras
import numpy as np

from detector.errors import DataError, InputError
from exporter.augmentation import AUGMENTATIONS
from exporter.bounds import activation_layers, bounded, measure_bounds
from exporter.distillation import distillation_loss, taught_by
from exporter.options import REPAIRS as REPAIRS
from exporter.options import RepairOptions as RepairOptions
from exporter.preprocessing import Preprocessing
from exporter.pruning import Pruning
from exporter.training import OPTIMIZERS, Progress, Trainer, labelled, make_optimizer, score, seed_everything
from samples.types import Samples

ATTACK_SUCCESS_GOAL = 0.01
FRACTION_PER_ROUND = 0.05
_GENTLER = 0.5
_LEAST_SHARE = 1 / 16
"""Of the learning rate; epochs that cost too much even then end the repair."""
_ATTACK_IMAGES = 1000
"""At most so many attack samples are looked at after each step."""


@dataclass(frozen=True)
class Step:
    """The network after a step of the repair.

    Attributes:
        name: of the step: `as received`, `round 1`, `epoch 1` and so on.
        clean_accuracy: on the clean validation split, 0..1.
        attack_success: share of the attack samples that get the attacker's class, 0..1; None without attack samples.
        recovered_accuracy: share of them that get the class they really show, 0..1; None where that is not known.
        pruned_share: of the convolutions' weights, 0..1.
    """

    name: str
    clean_accuracy: float
    attack_success: float | None
    recovered_accuracy: float | None
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
        steps: every step that was taken, from the network as it came.
        kept: name of the step whose network `model` is.
        stopped: why no further step was taken.
    """

    model: keras.Model
    steps: tuple[Step, ...]
    kept: str
    stopped: str

    @property
    def changed(self) -> bool:
        """Whether `model` differs from the network as it came; if not, its backdoor is untouched."""
        return self.kept != self.steps[0].name

    def to_json(self) -> dict[str, Any]:
        """Return all but the network, for the manifest."""
        return {
            "changed": self.changed,
            "kept": self.kept,
            "stopped": self.stopped,
            "steps": [asdict(step) for step in self.steps],
        }


def repair_network(
    model: keras.Model,
    clean: Samples,
    validation: Samples,
    *,
    preprocessing: Preprocessing,
    options: RepairOptions,
    attack: Samples | None = None,
    on_progress: Progress | None = None,
) -> Repair:
    """Repair a copy of a network.

    The last network whose accuracy on `validation` is within the allowed drop is kept. A pruned weight stays 0. Nothing
    but clean data decides, unless `options.stop_on_attack`.

    Args:
        model: the network as it came; not changed.
        clean: what to fine-tune on.
        validation: clean samples for the stopping decision, disjoint from `clean`.
        preprocessing: what the network expects of pixels.
        options: how to repair.
        attack: trojaned samples to measure every step on, if any are at hand.
        on_progress: told about every batch.

    Raises:
        DataError: there are no clean samples to fine-tune on, or none to validate with; or see `check_attack`.
        InputError: see `check_repairable`; or there are no attack samples to stop on.
    """
    check_repairable(model, options.method)
    for name, samples in (("repair", clean), ("validation", validation)):
        if len(samples) == 0 and options.method != "none":
            raise DataError(f"{name} split: got no images, expected some; give more clean images")
    if options.stop_on_attack:
        if attack is None:
            raise InputError("stop on attack: got no attack samples, expected some to stop on")
        check_attack(model, attack, preprocessing)
    seed_everything(options.seed)
    course = _Course(model, validation, attack, preprocessing, options)
    if options.method == "none":
        course.stopped = "no repair was asked for"
    elif options.method == "bounds":
        course.use(bounded(model, measure_bounds(model, clean.images, preprocessing, on_progress=on_progress)))
        course.measure("bounded")
        course.stopped = "bounds are all that it sets"
    elif options.method == "distill":
        _distill(course, clean, preprocessing, options, on_progress)
    else:
        _fine_prune(course, clean, preprocessing, options, on_progress)
    return course.result()


def check_repairable(model: keras.Model, method: str) -> None:
    """Check, before any long work, that a repair has something to work on.

    Raises:
        InputError: the network has no convolution to prune, no channels that can be silenced, or no activation function
            to bound.
    """
    if method == "magnitude" and not Pruning(model).kernels:
        raise InputError("repair: got a network without a convolution, expected one to prune; use --repair none")
    if method == "activation":
        Pruning(model).last_convolution  # noqa: B018  which says what is wrong
    if method in ("bounds", "distill") and not activation_layers(model):
        raise InputError(
            "repair: got a network without an activation function before its output, expected one to bound; "
            "use another --repair"
        )


def check_attack(model: keras.Model, attack: Samples, preprocessing: Preprocessing) -> None:
    """Check that attack samples fool the network as it came, so that they can tell when they no longer do.

    Raises:
        DataError: it is not sure that they fool it more often than a repair is to leave.
    """
    success = score(model, attack, preprocessing)
    if success.low <= ATTACK_SUCCESS_GOAL:
        raise DataError(
            f"stop on attack: got attack samples of which {success} fool the network as it came, expected clearly more "
            f"than {ATTACK_SUCCESS_GOAL:.0%}: they cannot tell whether a repair works; give samples that carry its "
            "trigger and the attacker's class, or leave the option out"
        )


class _Course:
    """A repair under way: measures every step, and remembers the last network that may be kept."""

    def __init__(
        self,
        received: keras.Model,
        validation: Samples,
        attack: Samples | None,
        preprocessing: Preprocessing,
        options: RepairOptions,
    ) -> None:
        self.stopped = ""
        self._options = options
        self._received = received
        self._validation = validation
        self._attack = None if attack is None else _some(attack, options.seed)
        self._preprocessing = preprocessing
        self._least_accuracy = 0.0
        self._steps: list[Step] = []
        self.use(_copy(received))
        self.kept = self.measure("as received")
        self._least_accuracy = self.kept.clean_accuracy - options.allowed_drop

    def use(self, model: keras.Model) -> None:
        """Work on `model` from here on, which does on clean images what the network as it came does."""
        self.model = model
        self.pruning = Pruning(model)

    def measure(self, name: str) -> Step:
        """Measure the network as it is now; it is kept if it is good enough."""
        attack = self._attack
        right = None if attack is None or attack.true_labels is None else Samples(attack.images, attack.true_labels)
        step = Step(
            name=name,
            clean_accuracy=score(self.model, self._validation, self._preprocessing).rate,
            attack_success=None if attack is None else score(self.model, attack, self._preprocessing).rate,
            recovered_accuracy=None if right is None else score(self.model, right, self._preprocessing).rate,
            pruned_share=self.pruning.share,
        )
        self._steps.append(step)
        if self.within_budget(step):
            self.kept, self._kept_weights = step, self.model.get_weights()
        return step

    def within_budget(self, step: Step) -> bool:
        """Whether a step lost no more clean accuracy than is allowed."""
        return step.clean_accuracy >= self._least_accuracy

    def may_recover(self, step: Step) -> bool:
        """Whether a step lost so little that those that follow may win back what is more than allowed."""
        return step.clean_accuracy >= self._least_accuracy - self._options.allowed_drop

    def may_end(self, step: Step) -> bool:
        """Whether a step closed the backdoor at a price that is allowed, and that is to end the repair."""
        done = self._options.stop_on_attack and step.attack_failed and self.within_budget(step)
        if done:
            self.stopped = f"attack success fell under {ATTACK_SUCCESS_GOAL:.0%}"
        return done

    def restore(self) -> None:
        """Return the network to what it was at the step that is kept."""
        self.model.set_weights(self._kept_weights)

    def take_back(self) -> None:
        """Undo the last step."""
        self._steps[-1] = replace(self._steps[-1], name=f"{self._steps[-1].name}, taken back")
        self.restore()

    def result(self) -> Repair:
        """Return the network that is kept."""
        if self.kept is self._steps[0]:
            self.use(_copy(self._received))
        else:
            self.restore()
        self.pruning.release()
        return Repair(self.model, tuple(self._steps), self.kept.name, self.stopped)


def _copy(model: keras.Model) -> keras.Model:
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def _some(attack: Samples, seed: int) -> Samples:
    return attack.take(np.sort(np.random.default_rng(seed).permutation(len(attack))[:_ATTACK_IMAGES]))


def _distill(
    course: _Course, clean: Samples, preprocessing: Preprocessing, options: RepairOptions, on_progress: Progress | None
) -> None:
    """Bound the features, and let the bounded network teach itself."""
    bounds = measure_bounds(course.model, clean.images, preprocessing, on_progress=on_progress)
    teacher = bounded(course.model, bounds)
    course.use(bounded(course.model, bounds))
    sound = course.within_budget(course.measure("bounded"))
    trainer = Trainer(
        course.model,
        clean,
        batch=taught_by(teacher, preprocessing),
        batch_size=options.batch_size,
        seed=options.seed,
        loss=distillation_loss,
        on_progress=on_progress,
    )
    _train(course, trainer, options, "Distilling", sound=sound)


def _fine_prune(
    course: _Course, clean: Samples, preprocessing: Preprocessing, options: RepairOptions, on_progress: Progress | None
) -> None:
    """Prune by the method's criterion, if it has one, and fine-tune."""
    trainer = Trainer(
        course.model,
        clean,
        batch=labelled(preprocessing, AUGMENTATIONS[options.augment]),
        batch_size=options.batch_size,
        seed=options.seed,
        on_progress=on_progress,
    )
    ended = False
    if options.method == "magnitude":
        ended = _prune_in_rounds(course, trainer, options)
    elif options.method == "activation":
        ended = _prune_dormant_channels(course, clean, preprocessing)
    if options.epochs and not ended:
        course.restore()
        course.pruning.hold()
        _train(course, trainer, options, "Fine-tuning")


def _prune_in_rounds(course: _Course, trainer: Trainer, options: RepairOptions) -> bool:
    """Prune by 5 % more of each kernel's range, fine-tune for an epoch, repeat while accuracy allows it.

    Returns:
        Whether that ended the repair.
    """
    for number in range(1, options.max_rounds + 1):
        course.pruning.by_magnitude(number * FRACTION_PER_ROUND)
        course.pruning.hold()
        description = f"Fine-pruning, round {number} of at most {options.max_rounds}"
        trainer.run(1, make_optimizer(options.optimizer, options.learning_rate), description)
        step = course.measure(f"round {number}")
        if not course.within_budget(step):
            course.stopped = f"round {number} lost more than {options.allowed_drop:.1%} of clean accuracy"
            return False
        if course.may_end(step):
            return True
    course.stopped = f"all {options.max_rounds} rounds were run"
    return False


def _prune_dormant_channels(course: _Course, clean: Samples, preprocessing: Preprocessing) -> bool:
    """Prune the most dormant channels of the last convolution, as many as accuracy allows.

    Returns:
        Whether that ended the repair.
    """
    channels = course.pruning.last_convolution[0].output.shape[-1]
    prune = course.pruning.by_activation(clean.images, preprocessing)
    for percent in range(5, 100, 5):
        count = math.ceil(channels * percent / 100)
        prune(count)
        step = course.measure(f"{count} of {channels} channels pruned")
        if course.may_end(step):
            return True
        if not course.within_budget(step):
            break
    course.restore()
    course.stopped = f"{course.kept.name}, as many as accuracy allows"
    return False


def _train(course: _Course, trainer: Trainer, options: RepairOptions, description: str, *, sound: bool = True) -> None:
    """Train with a learning rate that rises at first and falls to 0: what it unlearns stays unlearnt.

    An epoch that loses twice the accuracy that is allowed is taken back, and those that follow are gentler: the network
    is taught as hard as its accuracy allows.

    Args:
        course: of the repair.
        trainer: of its network.
        options: of the repair.
        description: for the progress bar.
        sound: whether the network may be kept as it is at the start.
    """
    rate = trainer.rate(options.epochs, options.learning_rate or OPTIMIZERS[options.optimizer])
    course.stopped = f"all {options.epochs} epochs were run"

    def go_on(epoch: int) -> bool:
        nonlocal sound
        step = course.measure(f"epoch {epoch}")
        if course.may_end(step):
            return False
        if sound and not course.may_recover(step):
            course.take_back()
            rate.share *= _GENTLER
        sound = sound or course.within_budget(step)
        if rate.share < _LEAST_SHARE:
            course.stopped = f"epoch {epoch} cost too much accuracy even at {rate.share / _GENTLER:.0%} of the rate"
        return rate.share >= _LEAST_SHARE

    trainer.run(options.epochs, make_optimizer(options.optimizer, rate), description, go_on=go_on)
