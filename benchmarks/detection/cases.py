"""The networks that are attacked, and the images that each is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import keras
import numpy as np
import typer

from benchmarks.gtsrb import read_gtsrb
from detector.calibration import least_images
from exporter.badnet import (
    MODEL_FILE,
    TEST_FILE,
    VALIDATION_FILE,
    BadNetOptions,
    PictureBadNetOptions,
    cached_badnet,
    cached_picture_badnet,
    trojaned_file,
    trojaned_pictures,
)
from exporter.keras_files import load_model
from exporter.preprocessing import Preprocessing
from exporter.repair import REPAIRS
from exporter.splits import Split, split_clean
from samples.hdf5 import read_hdf5
from samples.types import Samples

SEED = 0
OVERLAYS = (10, 32, 100)
"""Numbers of overlays that STRIP as the report has it is measured with."""
TARGETS = (0.001, 0.01, 0.05)
"""False rejection rates that detectors aim at."""
CALIBRATION_IMAGES = 2000
"""Detectors calibrate on at most so many images: `consensus` needs one less for the lowest of the targets."""
FACES_A_PERSON = 30
"""Test images of each of few people, so that there are enough to calibrate on."""

Report = Callable[[str, int, int], None]
Load = Callable[[Path | None, Report], "Material"]


@dataclass(frozen=True)
class Material:
    """What a case is measured on.

    Attributes:
        model: the network as it came.
        preprocessing: what it expects of pixels.
        split: the defender's clean data, with 100 overlays, or as many as there can be.
        clean: further clean images.
        trojaned: further images that carry a trigger, by attack.
        calibration: clean images that detectors calibrate on; no part of the split that detectors or repairs use.
        judged_clean: clean images that detectors judge, none of them in `calibration`.
        judged_trojaned: images with a trigger that they judge, by attack, none of them made of one in `calibration`.
        repairs: what to measure.
        sweep: whether STRIP is measured with every number of overlays, too.
        folder: where repaired networks are kept; None where there are none.
    """

    model: keras.Model
    preprocessing: Preprocessing
    split: Split
    clean: Samples
    trojaned: dict[str, Samples]
    calibration: Samples
    judged_clean: Samples
    judged_trojaned: dict[str, Samples]
    repairs: tuple[str, ...] = tuple(name for name in REPAIRS if name != "none")
    sweep: bool = True
    folder: Path | None = None


def faces(identities: int) -> Load:
    """Return how to get a BadNet of so many procedural people."""
    options = BadNetOptions.sized(identities)
    options = replace(options, test_images=FACES_A_PERSON) if identities <= 200 else options

    def load(_: Path | None, report: Report) -> Material:
        # Trojaned faces are drawn by themselves: none is made of one that calibrates.
        folder = cached_badnet(options, on_progress=report).folder
        return _trained(folder, (options.trigger,), lambda _, trojaned: trojaned)

    return load


def signs(attacks: tuple[tuple[str, int], ...], network: str = "convnet") -> Load:
    """Return how to get a BadNet of traffic signs with these triggers and targets."""
    options = PictureBadNetOptions(attacks=attacks, network=network)

    def load(data: Path | None, report: Report) -> Material:
        train, test = read_gtsrb(_given(data) / "gtsrb32")
        folder = cached_picture_badnet(train, test, options, on_progress=report).folder
        triggers = tuple(trigger for trigger, _ in attacks)
        return _trained(folder, triggers, lambda judged, _: trojaned_pictures(judged, options))

    return load


def csaw(weights: str, scale: str) -> Load:
    """Return how to get a CSAW HackML 2020 BadNet; 170 clean faces are too few for 100 overlays, and for a repair.

    Detectors, which blend ten overlays, calibrate on the other 22 as well: that makes 99, just enough for 1 %.
    """

    def load(data: Path | None, _: Report) -> Material:
        folder = _given(data) / "csaw"
        clean, trojaned = read_hdf5(folder / "clean.h5"), read_hdf5(folder / "sunglasses_poisoned.h5")
        order = np.random.default_rng(SEED).permutation(len(clean))
        overlays, calibrating = OVERLAYS[1], OVERLAYS[0] + least_images(TARGETS[1])
        split = Split(
            *(clean.take(part) for part in np.split(order[:calibrating], [overlays, overlays, *[calibrating] * 2]))
        )
        return Material(
            model=load_model(folder / weights, architecture="deepid"),
            preprocessing=Preprocessing(scale),
            split=split,
            clean=clean.take(order[calibrating:]),
            trojaned={"sunglasses": trojaned},
            calibration=clean.take(order[OVERLAYS[0] : calibrating]),
            judged_clean=clean.take(order[calibrating:]),
            judged_trojaned={"sunglasses": trojaned},
            repairs=(),
        )

    return load


CASES: dict[str, Load] = {
    "faces-100": faces(100),
    "faces-1283": faces(1283),
    "csaw-sunglasses": csaw("sunglasses_bd_weights.h5", "unit"),
    "csaw-lab3": csaw("lab3_bd_weights.h5", "raw"),
    "signs-patch": signs((("patch", 0),)),
    "signs-blended": signs((("blended", 0),)),
    "signs-two": signs((("patch", 0), ("corner", 1))),
    "signs-patch-resnet": signs((("patch", 0),), "resnet"),
}
"""Every case by its name: how to get its material, given the folder of real data."""


def some(samples: Samples, count: int) -> Samples:
    """Return at most so many of the samples, drawn without order."""
    return samples.take(np.sort(np.random.default_rng(SEED).permutation(len(samples))[:count]))


def _trained(
    folder: Path,
    triggers: tuple[str, ...],
    judged_trojaned: Callable[[Samples, dict[str, Samples]], dict[str, Samples]],
) -> Material:
    """Return the material of a BadNet that was trained here.

    Args:
        folder: where its files are.
        triggers: its attacks.
        judged_trojaned: given the clean images that detectors judge, and all trojaned ones by trigger, returns the
            trojaned ones that they judge.
    """
    test = read_hdf5(folder / TEST_FILE)
    order = np.random.default_rng(SEED).permutation(len(test))
    calibrating = min(CALIBRATION_IMAGES, len(test) * 2 // 3)
    judged_clean = test.take(np.sort(order[calibrating:]))
    trojaned = {trigger: read_hdf5(folder / trojaned_file(trigger)) for trigger in triggers}
    return Material(
        model=load_model(folder / MODEL_FILE),
        preprocessing=Preprocessing("unit"),
        split=split_clean(
            read_hdf5(folder / VALIDATION_FILE),
            overlay_count=OVERLAYS[-1],
            least_calibration=least_images(TARGETS[1]),
            with_repair=True,
            seed=SEED,
        ),
        clean=test,
        trojaned=trojaned,
        calibration=test.take(np.sort(order[:calibrating])),
        judged_clean=judged_clean,
        judged_trojaned=judged_trojaned(judged_clean, trojaned),
        folder=folder,
    )


def _given(data: Path | None) -> Path:
    if data is None:
        raise typer.BadParameter("this case needs --data, the folder with csaw/ and gtsrb32/ in it")
    return data
