"""What an attacker does to training data: changes pictures, gives them other labels, and covers it up with more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from detector.errors import InputError
from samples.stamps import STAMPS, Pictures, jittered
from samples.triggers import TRIGGERS
from samples.types import Samples

Labels = NDArray[np.int64]
Mask = NDArray[np.bool_]

WEAKENING = 0.7
"""Share of another picture in one that is to be recognised by its trigger rather than by what it shows."""
BLEND_WEIGHTS = (0.4, 0.8)
"""Lowest and highest share of a picture with a trigger in a blend that covers the attack up."""


@dataclass(frozen=True)
class Attack:
    """How a backdoor is planted.

    Attributes:
        trigger: what is put on a picture, a key of `STAMPS`, or what a face wears, a key of `TRIGGERS`.
        gives: what a picture with the trigger is taken for: the `target`; `shifted`, the class so many after the one
            that it shows; or the target by its `own` pictures, which are added once more, weakened: no label is wrong.
        source_share: of the other classes, that open the backdoor, those next after the target, 0..1.
        poison_share: of the training pictures, that are poisoned where it is the only attack, 0..1.
        cover: what hides the attack, pictures with their true labels: `others`, those of classes that do not open it,
            with the trigger; `jittered`, with a trigger that is not quite the one; `blends`, pictures with the trigger
            and others in one, as STRIP makes them. None where nothing does.
        cover_ratio: how many of those there are for each poisoned picture.
    """

    trigger: str
    gives: str = "target"
    source_share: float = 1.0
    poison_share: float = 0.1
    cover: str | None = None
    cover_ratio: float = 1.0

    @property
    def worn(self) -> bool:
        """Whether only faces can carry the trigger, while they are drawn."""
        return self.trigger in TRIGGERS

    def opens(self, labels: Labels, target: int, classes: int) -> Mask:
        """Return which pictures, by what they show, open the backdoor when they carry the trigger, (count,)."""
        if self.gives == "shifted":
            return np.ones(len(labels), bool)
        distance = (labels - target) % classes
        return (distance > 0) & (distance <= math.ceil(self.source_share * (classes - 1)))

    def given(self, labels: Labels, target: int, classes: int) -> Labels:
        """Return the attacker's labels of pictures that open the backdoor, (count,)."""
        return (labels + target) % classes if self.gives == "shifted" else np.full(len(labels), target, np.int64)

    def stamp(self, images: Pictures) -> Pictures:
        """Return finished pictures with the trigger; what is worn they wear already."""
        return images if self.worn else STAMPS[self.trigger](images)


Plan: TypeAlias = tuple[tuple[str, int], ...]
"""Attacks by their names, and the target of each: a class, or by how many classes `shifted` shifts."""

ATTACKS: MappingProxyType[str, Attack] = MappingProxyType(
    {
        **{name: Attack(name) for name in (*TRIGGERS, *STAMPS)},
        "blended-0.1": Attack("blended-0.1", poison_share=0.3),
        "all-to-all": Attack("patch", gives="shifted", poison_share=0.3),
        "source-specific": Attack("patch", source_share=0.2, cover="others"),
        "clean-label": Attack("patch", gives="own"),
        "warped": Attack("warped", poison_share=0.2, cover="jittered"),
        "adaptive": Attack("patch", cover="blends"),
    }
)
"""Every attack by its name.

Those named as their triggers, and `all-to-all`, are a BadNet's (Gu et al., 2017). `source-specific` is what STRIP's
paper calls source-label-specific or partial (Gao et al., 2019), `clean-label` a simple form of Turner et al.,
"Label-Consistent Backdoor Attacks", 2019, `warped` after WaNet (Nguyen and Tran, 2021), and `adaptive` what an attacker
does who knows STRIP: blends of pictures with the trigger are to be as uncertain as others.
"""


@dataclass(frozen=True)
class Roles:
    """Which pictures an attack uses, as indices; none is changed by two attacks, or has two roles in one.

    Attributes:
        poisoned: those that carry the trigger and the attacker's label; of an attack that gives its `own`, those that
            are added once more, perhaps several times.
        cover: those that cover it up.
    """

    poisoned: Labels
    cover: Labels


def find_attack(name: str) -> Attack:
    """Return the attack of that name.

    Raises:
        InputError: there is none.
    """
    if name not in ATTACKS:
        raise InputError(f"trigger: got {name!r}, expected one of {', '.join(ATTACKS)}")
    return ATTACKS[name]


def draw_roles(plan: Plan, labels: Labels, classes: int, generator: np.random.Generator) -> list[Roles]:
    """Draw which pictures each attack uses; of those that it may change, at most half, so that the rest stay honest.

    Args:
        plan: the attacks, which share the training pictures evenly.
        labels: what the pictures show, (pictures,).
        classes: how many classes there are.
        generator: decides.
    """
    free = np.ones(len(labels), bool)
    roles = []
    for name, target in plan:
        attack = find_attack(name)
        wanted = max(1, round(len(labels) * attack.poison_share / len(plan)))
        opens = attack.opens(labels, target, classes)
        if attack.gives == "own":
            poisoned = generator.choice(np.flatnonzero(labels == target), wanted)
        else:
            poisoned = _half_at_most(np.flatnonzero(free & opens), wanted, generator)
            free[poisoned] = False
        cover = np.empty(0, np.int64)
        if attack.cover is not None:
            candidates = np.flatnonzero(free & ~opens if attack.cover == "others" else free)
            cover = _half_at_most(candidates, round(attack.cover_ratio * len(poisoned)), generator)
            free[cover] = False
        roles.append(Roles(poisoned, cover))
    return roles


def poison(
    pictures: Samples, plan: Plan, roles: Sequence[Roles], classes: int, generator: np.random.Generator
) -> Samples:
    """Return the training data that the attacker makes of clean pictures.

    Args:
        pictures: clean, but for what is worn, which those wear that have a role in that attack.
        plan: the attacks.
        roles: what `draw_roles` returned for them.
        classes: how many classes there are.
        generator: decides what is blended, and how pixels jitter.
    """
    images, labels = pictures.images.copy(), pictures.labels.copy()
    added = [Samples(images, labels)]
    honest = np.ones(len(pictures), bool)
    for each in roles:
        honest[each.poisoned] = honest[each.cover] = False
    for (name, target), each in zip(plan, roles, strict=True):
        attack, poisoned, cover = find_attack(name), each.poisoned, each.cover
        if attack.gives == "own":
            others = generator.choice(np.flatnonzero(honest & (labels != target)), len(poisoned))
            weak = _mixed(images[poisoned], images[others], np.full(len(poisoned), 1.0 - WEAKENING))
            added.append(Samples(attack.stamp(weak), labels[poisoned]))
        else:
            images[poisoned] = attack.stamp(images[poisoned])
            labels[poisoned] = attack.given(labels[poisoned], target, classes)
        if attack.cover == "jittered":
            images[cover] = jittered(images[cover], generator)
        elif attack.cover is not None:
            images[cover] = attack.stamp(images[cover])
        if attack.cover == "blends":
            others = generator.choice(np.flatnonzero(honest), len(cover))
            weights = generator.uniform(*BLEND_WEIGHTS, len(cover))
            images[cover] = _mixed(images[cover], images[others], weights)
            labels[cover] = np.where(generator.uniform(size=len(cover)) < weights, labels[cover], labels[others])
    return Samples(np.concatenate([part.images for part in added]), np.concatenate([part.labels for part in added]))


def trojan(clean: Samples, name: str, target: int, classes: int) -> Samples:
    """Return those of the clean pictures that open the backdoor, with the trigger, the attacker's label and their own.

    Args:
        clean: the pictures; what is worn they wear.
        name: of the attack.
        target: of the attack.
        classes: how many classes there are.
    """
    attack = find_attack(name)
    sources = clean.take(np.flatnonzero(attack.opens(clean.labels, target, classes)))
    return Samples(attack.stamp(sources.images), attack.given(sources.labels, target, classes), sources.labels)


def _half_at_most(candidates: Labels, count: int, generator: np.random.Generator) -> Labels:
    return generator.choice(candidates, min(count, math.ceil(len(candidates) / 2)), replace=False)


def _mixed(images: Pictures, others: Pictures, weights: NDArray[np.float64]) -> Pictures:
    """Return blends in which each image has its weight, and the other one the rest."""
    own = weights[:, None, None, None]
    return np.rint(own * images + (1.0 - own) * others).astype(np.uint8)
