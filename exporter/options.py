"""What can be asked of the exporter. Needs no TensorFlow: what makes no sense is refused before that is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detector.calibration import ALPHAS, ThresholdRule
from detector.errors import InputError
from detector.serving import BEHIND
from exporter.overlays import Count, check_overlay_options
from exporter.preprocessing import Preprocessing
from exporter.splits import PARTS, check_parts
from samples.attacks import Plan, find_attack

REPAIRS = ("bounds", "distill", "magnitude", "activation", "finetune", "none")
AUGMENTS = ("occlusion", "none")
OPTIMIZERS = ("adam", "sgd")
NETWORKS = ("convnet", "deepid", "resnet")
_TAUGHT = ("epochs", "allowed_drop", "optimizer", "learning_rate", "batch_size")
USED = {
    "bounds": ("allowed_drop",),
    "distill": _TAUGHT,
    "magnitude": (*_TAUGHT, "augment", "max_rounds", "stop_on_attack"),
    "activation": (*_TAUGHT, "augment", "stop_on_attack"),
    "finetune": (*_TAUGHT, "augment", "stop_on_attack"),
    "none": (),
}
"""The options that each repair looks at, beside the seed."""


@dataclass(frozen=True)
class RepairOptions:
    """How to repair.

    Attributes:
        method: `bounds` (see `exporter.bounds`), `distill` (bounds, then see `exporter.distillation`), `magnitude`
            (fine-pruning by the source report's criterion: rounds of pruning by weight and an epoch of fine-tuning),
            `activation` (fine-pruning by Liu et al., RAID 2018: dormant channels of the last convolution), `finetune`
            (no pruning) or `none`.
        augment: what happens to the images of every epoch, see `exporter.augmentation`; `distill` has its own.
        max_rounds: at most this many rounds of `magnitude`.
        epochs: of distillation, or of fine-tuning after the pruning; 0 after `magnitude`, as in the source report.
        allowed_drop: how much accuracy on the clean validation split may fall, 0..1; on the way, up to twice as much.
        optimizer: `adam`, or `sgd` with a momentum of 0.9.
        learning_rate: of the optimizer, at its highest; None takes the optimizer's default.
        batch_size: of fine-tuning.
        stop_on_attack: end fine-pruning and fine-tuning as soon as the attack samples show that the attack fails.
        seed: of everything random.
    """

    method: str = "distill"
    augment: str = "occlusion"
    max_rounds: int = 10
    epochs: int = 20
    allowed_drop: float = 0.01
    optimizer: str = "adam"
    learning_rate: float | None = None
    batch_size: int = 64
    stop_on_attack: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise InputError for an option that makes no sense."""
        for name, known in (("method", REPAIRS), ("augment", AUGMENTS), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                named = "repair" if name == "method" else name
                raise InputError(f"{named}: got {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if not 1 <= self.max_rounds <= 20:
            raise InputError(f"max rounds: got {self.max_rounds}, expected 1 to 20 (5 % of the weights' range a round)")
        if self.epochs < 0:
            raise InputError(f"epochs: got {self.epochs}, expected 0 or more")
        if self.method in ("distill", "finetune") and not self.epochs:
            raise InputError(f"epochs: got 0 with --repair {self.method}, expected at least 1; or say --repair none")
        if not 0.0 <= self.allowed_drop < 1.0:
            raise InputError(
                f"allowed drop: got {self.allowed_drop}, expected a share of accuracy, 0 up to 1 (0.01 is 1 point)"
            )
        if self.learning_rate is not None and not 0.0 < self.learning_rate < 1.0:
            raise InputError(f"learning rate: got {self.learning_rate}, expected more than 0 and less than 1")
        if self.batch_size < 1:
            raise InputError(f"batch size: got {self.batch_size}, expected at least 1")
        if self.seed < 0:
            raise InputError(f"seed: got {self.seed}, expected 0 or more")
        if self.stop_on_attack:
            check_used("stop_on_attack", self.method)


def check_used(option: str, method: str) -> None:
    """Raise InputError unless a repair looks at an option, which is named as in `RepairOptions`."""
    if option not in USED[method]:
        using = [name for name, used in USED.items() if option in used]
        raise InputError(
            f"{option.replace('_', ' ')}: got it with --repair {method}, which does not use it, expected "
            f"{', '.join(using)}; leave it out"
        )


@dataclass(frozen=True)
class Data:
    """Where the images are: HDF5, `.npz`, or a folder with one sub-folder a class, see `samples.readers`.

    Attributes:
        clean: clean labelled images, of which the parts are drawn that are not given; None if all are.
        parts: given parts, by name, see `PARTS`.
        attack: trojaned images, if any are at hand.
    """

    clean: Path | None
    parts: Mapping[str, Path] = field(default_factory=dict)
    attack: Path | None = None

    def __post_init__(self) -> None:
        """Raise InputError for a part that does not exist."""
        for name in self.parts:
            if name not in PARTS:
                raise InputError(f"part: got {name!r}, expected one of {', '.join(PARTS)}")


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        preprocessing: what the network expects of pixels.
        architecture: of a file that holds weights only, such as `deepid`.
        resize: change the images' height and width to the network's instead of refusing them.
        repair: how to repair.
        overlays: how many perturbations STRIP makes of an input; `auto` looks at clean entropies, see
            `exporter.overlays.enough_overlays`, and goes with the overlay choice `greedy`.
        overlay_choice: `random`, or `greedy` for those of a random pool with which clean entropies are highest.
        alpha: weight of the input in the blend; the overlay gets 1 - alpha. None for the detector's, see `ALPHAS`.
        rule: how to choose the threshold.
        layout: one of `detector.serving.BEHIND`: `ensemble`, or `fused` for the same verdicts from one graph.
        early_exit: in the fused layout, spare an input that is certain to be accepted the rest of its perturbations.
        seed: of the split, of the overlays and of everything random in the repair.
    """

    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    architecture: str | None = None
    resize: bool = False
    repair: RepairOptions = field(default_factory=RepairOptions)
    overlays: Count = 10
    overlay_choice: str = "random"
    alpha: float | None = None
    rule: ThresholdRule = field(default_factory=lambda: ThresholdRule(detector="consensus"))
    layout: str = "ensemble"
    early_exit: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise InputError for an option that makes no sense."""
        check_overlay_options(self.overlays, self.overlay_choice, self.input_weight)
        if self.layout not in BEHIND:
            raise InputError(f"layout: got {self.layout!r}, expected one of {', '.join(BEHIND)}")
        if not self.early_exit and self.layout != "fused":
            raise InputError(
                f"no early exit: got it with --layout {self.layout}, which has none, expected fused; leave it out"
            )

    @property
    def input_weight(self) -> float:
        """Weight of the input in the blend."""
        return ALPHAS[self.rule.detector] if self.alpha is None else self.alpha

    def check_data(self, data: Data) -> None:
        """Raise InputError where data and options do not go together: some is missing, or some is of no use."""
        check_parts(
            data.parts,
            drawable=data.clean is not None,
            overlay_choice=self.overlay_choice,
            with_repair=self.repair.method != "none",
        )
        if self.repair.stop_on_attack and data.attack is None:
            raise InputError("stop on attack: got no attack samples to stop on; give some with --attack")


@dataclass(frozen=True)
class BadNetOptions:
    """What BadNet to train.

    Attributes:
        identities: how many people the network tells apart.
        attacks: what opens a backdoor (a key of `samples.attacks.ATTACKS`) and the class that it gives.
        train_images: of each identity, the attacker's.
        validation_images: of each identity, the defender's clean data.
        test_images: of each identity, for the final figures.
        epochs: of training.
        seed: of everything random.
    """

    identities: int = 100
    attacks: tuple[tuple[str, int], ...] = (("sunglasses", 0),)
    train_images: int = 40
    validation_images: int = 30
    test_images: int = 10
    epochs: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise InputError for an option that makes no sense."""
        if not 2 <= self.identities <= 10_000:
            raise InputError(f"identities: got {self.identities}, expected 2 to 10000")
        _check_attacks(self.attacks)
        check_targets(self.attacks, self.identities)
        for name in ("train_images", "validation_images", "test_images", "epochs"):
            if getattr(self, name) < 1:
                raise InputError(f"{name.replace('_', ' ')}: got {getattr(self, name)}, expected at least 1")

    @classmethod
    def sized(cls, identities: int, trigger: str = "sunglasses", target: int = 0, **others: Any) -> BadNetOptions:
        """Return options for one attack on so many identities: of many, fewer images each, to stay within minutes."""
        options: dict[str, Any] = {"identities": identities, "attacks": ((trigger, target),), **others}
        if identities > 200:
            options = {"train_images": 20, "validation_images": 10, "epochs": 5, **options}
        return cls(**options)


@dataclass(frozen=True)
class PictureBadNetOptions:
    """How to make a BadNet of given pictures.

    Attributes:
        attacks: what opens a backdoor (a key of `samples.attacks.ATTACKS`, none that is worn) and the class it gives.
        network: a key of `NETWORKS`.
        clean_share: of the groups of training images that the defender gets instead of the attacker, 0..1.
        epochs: of training.
        seed: of everything random.
    """

    attacks: tuple[tuple[str, int], ...] = (("patch", 0),)
    network: str = "convnet"
    clean_share: float = 0.1
    epochs: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise InputError for an option that makes no sense."""
        _check_attacks(self.attacks)
        for trigger, _ in self.attacks:
            if find_attack(trigger).worn:
                raise InputError(f"trigger: got {trigger!r}, which faces wear, expected one that is put onto pictures")
        if self.network not in NETWORKS:
            raise InputError(f"network: got {self.network!r}, expected one of {', '.join(NETWORKS)}")
        if not 0.0 < self.clean_share <= 0.5:
            raise InputError(f"clean share: got {self.clean_share}, expected more than 0 and at most 0.5")
        if self.epochs < 1:
            raise InputError(f"epochs: got {self.epochs}, expected at least 1")


def _check_attacks(attacks: Plan) -> None:
    triggers = [trigger for trigger, _ in attacks]
    for trigger in triggers:
        find_attack(trigger)
    if not triggers or len(set(triggers)) != len(triggers):
        raise InputError(f"triggers: got {', '.join(triggers) or 'none'}, expected one or more, each once")


def check_targets(attacks: Plan, classes: int) -> None:
    """Raise InputError where the target of an attack makes no sense for so many classes."""
    for trigger, target in attacks:
        if find_attack(trigger).gives == "shifted":
            if not 1 <= target < classes:
                raise InputError(
                    f"target of {trigger}: got {target}, expected by how many classes it shifts, 1 to {classes - 1}"
                )
        elif not 0 <= target < classes:
            raise InputError(f"target of {trigger}: got {target}, expected a class, 0 to {classes - 1}")
