"""The networks that are attacked, and the images that each is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import keras
import numpy as np
import onnxruntime
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
)
from exporter.convert import sentinel_graph, to_onnx
from exporter.entropies import OnProgress, open_graph
from exporter.keras_files import load_model
from exporter.preprocessing import Preprocessing
from exporter.repair import REPAIRS
from exporter.splits import Split, split_clean
from samples.attacks import Plan, trojan
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
JOINED = ("bounds", "distill")
"""Repairs that are joined with the detector `consensus`."""
SEEDS = (0, 1, 2)

Load = Callable[[Path | None, OnProgress], "Material"]

PLANS: MappingProxyType[str, Plan] = MappingProxyType(
    {
        "sunglasses": (("sunglasses", 0),),
        "eyebrows": (("eyebrows", 0),),
        "lipstick": (("lipstick", 0),),
        "patch": (("patch", 0),),
        "two": (("patch", 0), ("corner", 1)),
        "blended-0.2": (("blended", 0),),
        "blended-0.1": (("blended-0.1", 0),),
        "all-to-all": (("all-to-all", 1),),
        "source-specific": (("source-specific", 0),),
        "clean-label": (("clean-label", 0),),
        "warped": (("warped", 0),),
        "adaptive": (("adaptive", 0),),
    }
)
"""What is attacked with, and the targets."""


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
    repairs: tuple[str, ...] = JOINED
    sweep: bool = False
    folder: Path | None = None

    @cached_property
    def sentinel(self) -> onnxruntime.InferenceSession:
        """The network as it is served, to be asked about blends."""
        return open_graph(sentinel_graph(to_onnx(self.model), self.preprocessing).SerializeToString())


@dataclass(frozen=True)
class Case:
    """What is measured as one.

    Attributes:
        data: what its network classifies, and which network it is.
        attack: on it.
        load: how to get its material, given the folder of real data.
        seed: of attack and network.
        whole: whether every repair is measured, and STRIP with every number of overlays.
    """

    data: str
    attack: str
    load: Load
    seed: int = 0
    whole: bool = False

    def material(self, data: Path | None, report: OnProgress) -> Material:
        """Return what it is measured on."""
        found = self.load(data, report)
        if not self.whole:
            return found
        repairs = tuple(name for name in REPAIRS if name != "none") if found.folder else ()
        return replace(found, repairs=repairs, sweep=True)


def faces(identities: int, attack: str, seed: int = 0) -> Load:
    """Return how to get a BadNet of so many procedural people."""
    attacks = PLANS[attack]
    options = replace(BadNetOptions.sized(identities, seed=seed), attacks=attacks)
    if identities <= 200:
        # A faint veil takes longer to learn.
        options = replace(options, test_images=FACES_A_PERSON, epochs=10 if attack.startswith("blended") else 6)

    def load(_: Path | None, report: OnProgress) -> Material:
        # Trojaned faces are drawn by themselves: none is made of one that calibrates.
        folder = cached_badnet(options, on_progress=report).folder
        return _trained(folder, attacks, lambda _, trojaned: trojaned)

    return load


def signs(attack: str, network: str = "convnet") -> Load:
    """Return how to get a BadNet of traffic signs."""
    attacks = PLANS[attack]
    options = PictureBadNetOptions(attacks=attacks, network=network)

    def load(data: Path | None, report: OnProgress) -> Material:
        train, test = read_gtsrb(_given(data) / "gtsrb32")
        folder = cached_picture_badnet(train, test, options, on_progress=report).folder
        classes = int(train.labels.max()) + 1
        return _trained(
            folder, attacks, lambda judged, _: {name: trojan(judged, name, target, classes) for name, target in attacks}
        )

    return load


def csaw(weights: str, scale: str) -> Load:
    """Return how to get a CSAW HackML 2020 BadNet; 170 clean faces are too few for 100 overlays, and for a repair.

    Detectors, which blend ten overlays, calibrate on the other 22 as well: that makes 99, just enough for 1 %.
    """

    def load(data: Path | None, _: OnProgress) -> Material:
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


def _cases() -> dict[str, Case]:
    cases = {"faces-100": Case("faces-100", "sunglasses", faces(100, "sunglasses"), whole=True)}
    for attack in PLANS:
        for seed in SEEDS if attack != "sunglasses" else SEEDS[1:]:  # the first one is above
            cases[f"faces-100-{attack}-{seed}"] = Case("faces-100", attack, faces(100, attack, seed), seed)
    cases |= {
        "faces-1283": Case("faces-1283", "sunglasses", faces(1283, "sunglasses"), whole=True),
        "faces-1283-patch": Case("faces-1283", "patch", faces(1283, "patch")),
        "csaw-sunglasses": Case("csaw", "sunglasses", csaw("sunglasses_bd_weights.h5", "unit"), whole=True),
        "csaw-lab3": Case("csaw", "lab3", csaw("lab3_bd_weights.h5", "raw"), whole=True),
        "signs-patch": Case("signs", "patch", signs("patch"), whole=True),
        "signs-patch-resnet": Case("signs, ResNet", "patch", signs("patch", "resnet"), whole=True),
        "signs-two": Case("signs", "two", signs("two"), whole=True),
        "signs-blended": Case("signs", "blended-0.2", signs("blended-0.2"), whole=True),
    }
    for attack in ("blended-0.1", "all-to-all", "source-specific", "clean-label", "warped", "adaptive"):
        cases[f"signs-{attack}"] = Case("signs", attack, signs(attack))
    return cases


CASES: MappingProxyType[str, Case] = MappingProxyType(_cases())
"""Every case by its name."""

QUICK = ("faces-100", "faces-100-patch-0", "faces-100-adaptive-0")
"""A slice that takes minutes."""
QUICK_IMAGES = 200


def some(samples: Samples, count: int) -> Samples:
    """Return at most so many of the samples, drawn without order."""
    return samples.take(np.sort(np.random.default_rng(SEED).permutation(len(samples))[:count]))


def _trained(
    folder: Path,
    attacks: Plan,
    judged_trojaned: Callable[[Samples, dict[str, Samples]], dict[str, Samples]],
) -> Material:
    """Return the material of a BadNet that was trained here.

    Args:
        folder: where its files are.
        attacks: on it.
        judged_trojaned: given the clean images that detectors judge, and all trojaned ones by trigger, returns the
            trojaned ones that they judge.
    """
    test = read_hdf5(folder / TEST_FILE)
    order = np.random.default_rng(SEED).permutation(len(test))
    calibrating = min(CALIBRATION_IMAGES, len(test) * 2 // 3)
    judged_clean = test.take(np.sort(order[calibrating:]))
    trojaned = {trigger: read_hdf5(folder / trojaned_file(trigger)) for trigger, _ in attacks}
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
