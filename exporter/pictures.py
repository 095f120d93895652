"""What pictures must be for a BadNet to be trained on them; asked before the training, which takes long."""

from __future__ import annotations

import numpy as np

from detector.errors import DataError, InputError
from exporter.badnet import NETWORKS, PictureBadNetOptions
from exporter.splits import take_share
from samples.attacks import find_attack
from samples.types import Samples


def check_pictures(train: Samples, test: Samples, options: PictureBadNetOptions) -> None:
    """Raise where `exporter.badnet.train_picture_badnet` could not train on `train`, or not measure on `test`.

    Args:
        train: what to train on.
        test: what to measure on, of the same shape and classes.
        options: how.

    Raises:
        DataError: the pictures are too small, or show not the classes that an attack needs.
        InputError: the defender's share of them is nothing.
    """
    (height, width, channels), classes = train.images.shape[1:], int(train.labels.max()) + 1
    defenders, attackers = take_share(train, options.clean_share, np.random.default_rng(options.seed))
    if not (len(defenders) and len(attackers)):
        raise InputError(
            f"clean share: got {options.clean_share:g} of {len(train)} training pictures, by whole groups, which "
            f"leaves the defender {len(defenders)} and the attacker {len(attackers)}, expected some for each; give "
            "more pictures, or another share"
        )
    for trigger, target in options.attacks:
        attack = find_attack(trigger)
        for name, part in (("training", attackers), ("test", test)):
            if not attack.opens(part.labels, target, classes).any():
                raise DataError(
                    f"{name} pictures: got none of another class than {target}, which the trigger {trigger} gives, "
                    "expected some to put it on; give pictures of two classes or more"
                )
        if attack.gives == "own" and not (attackers.labels == target).any():
            raise DataError(
                f"training pictures: got none of class {target}, of which {trigger} adds weakened ones, expected some; "
                "give more pictures, or another target"
            )
        try:
            attack.stamp(train.images[:1])
        except ValueError as error:
            raise DataError(
                f"trigger: got {trigger} for pictures of {height}x{width}, on which it does not fit; --resize makes "
                "them larger"
            ) from error
    try:
        NETWORKS[options.network](classes, (height, width, channels))
    except ValueError as error:
        raise DataError(
            f"network: got {options.network} for pictures of {height}x{width}, which are too small for its layers; "
            "--resize makes them larger, or choose another --network"
        ) from error
