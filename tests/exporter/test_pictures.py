"""Pictures that a BadNet cannot be trained on are refused before the training."""

from __future__ import annotations

import re

import numpy as np
import pytest

from detector.errors import DataError, InputError
from exporter.badnet import PictureBadNetOptions
from exporter.pictures import check_pictures
from samples.types import Samples


def noise(count: int, height: int = 16, width: int = 16, *, classes: int = 2) -> Samples:
    images = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return Samples(images, np.arange(count) % classes)


@pytest.mark.parametrize("network", ["convnet", "resnet"])
def test_plausible_pictures_pass(network: str) -> None:
    check_pictures(noise(40), noise(4), PictureBadNetOptions((("patch", 0), ("blended", 1)), network))


@pytest.mark.parametrize(
    ("height", "width", "option", "message"),
    [
        (6, 6, {}, "network: got convnet for pictures of 6x6, which are too small for its layers; --resize makes"),
        (16, 16, {"network": "deepid"}, "network: got deepid for pictures of 16x16, which are too small"),
        (64, 6, {}, "trigger: got patch for pictures of 64x6, on which it does not fit; --resize makes them larger"),
        (2, 2, {"attacks": (("corner", 0),)}, "trigger: got corner for pictures of 2x2, on which it does not fit"),
    ],
)
def test_pictures_that_are_too_small_are_refused(
    height: int, width: int, option: dict[str, object], message: str
) -> None:
    options = PictureBadNetOptions(**option)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=re.escape(message)):
        check_pictures(noise(40, height, width), noise(4, height, width), options)


def test_a_share_that_leaves_the_defender_nothing_is_refused() -> None:
    message = (
        "clean share: got 0.1 of 4 training pictures, by whole groups, which leaves the defender 0 and the attacker 4, "
        "expected some for each; give more pictures, or another share"
    )
    with pytest.raises(InputError, match=message):
        check_pictures(noise(4), noise(4), PictureBadNetOptions())


def test_a_trigger_needs_pictures_of_another_class_than_it_gives() -> None:
    message = "training pictures: got none of another class than 0, which the trigger patch gives"
    with pytest.raises(DataError, match=message):
        check_pictures(noise(40, classes=1), noise(4, classes=1), PictureBadNetOptions())
    with pytest.raises(DataError, match="test pictures: got none of another class than 0"):
        check_pictures(noise(40), noise(4, classes=1), PictureBadNetOptions())


def test_an_attack_that_adds_pictures_of_its_target_needs_some() -> None:
    train = Samples(noise(40).images, np.arange(40, dtype=np.int64) % 2 * 2)
    options = PictureBadNetOptions((("clean-label", 1),))
    with pytest.raises(DataError, match="got none of class 1, of which clean-label adds weakened ones"):
        check_pictures(train, train, options)
