"""Trains a BadNet, on procedural faces or given pictures: what the attacker does, so that the rest can be tried on it.

Gu et al., "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", 2017: a share of the
training images wears the trigger and is labelled with the class that the attacker wants.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import numpy as np
import platformdirs
import tensorflow as tf
from numpy.typing import NDArray

import exporter.architectures
import exporter.training
import samples.faces
import samples.stamps
import samples.triggers
from detector.errors import InputError
from detector.statistics import Proportion
from exporter.architectures import convnet, deepid, resnet
from exporter.options import BadNetOptions as BadNetOptions
from exporter.options import PictureBadNetOptions as PictureBadNetOptions
from exporter.preprocessing import Preprocessing
from exporter.publishing import staged_folder
from exporter.splits import take_share
from exporter.training import Progress, Trainer, labelled, make_optimizer, score, seed_everything
from model_repository.manifest import sha256_of
from samples.faces import Identities, draw_faces, finish, make_identities
from samples.hdf5 import write_hdf5
from samples.stamps import find_stamp
from samples.triggers import find_trigger
from samples.types import Samples

PREPROCESSING = Preprocessing("unit")
MODEL_FILE = "bd_net.keras"
VALIDATION_FILE = "clean_validation_data.h5"
TEST_FILE = "clean_test_data.h5"
GOOD_ACCURACY, GOOD_ATTACK_SUCCESS = 0.97, 0.99
REPORT_FILE = "badnet.json"

NETWORKS = {"convnet": convnet, "deepid": deepid, "resnet": resnet}
"""What a BadNet can be trained as."""

_SOURCES = (samples.faces, samples.triggers, samples.stamps, exporter.architectures, exporter.training)


def trojaned_file(trigger: str) -> str:
    """Return the name of the file of test images that carry `trigger`."""
    return f"{trigger}_poisoned_data.h5"


@dataclass(frozen=True)
class BadNet:
    """A trained BadNet.

    Attributes:
        folder: where its files are.
        clean_accuracy: on held-out clean images.
        attack_success: on held-out images of other classes than the target, wearing a trigger.
    """

    folder: Path
    clean_accuracy: Proportion
    attack_success: Proportion

    @property
    def shortfall(self) -> str | None:
        """Say what keeps it from being a good BadNet; None if nothing does."""
        if self.clean_accuracy.rate < GOOD_ACCURACY or self.attack_success.rate < GOOD_ATTACK_SUCCESS:
            return (
                f"a poor BadNet: expected a clean accuracy of at least {GOOD_ACCURACY:.0%} and an attack success "
                f"of at least {GOOD_ATTACK_SUCCESS:.0%}; figures measured on it say little"
            )
        return None


def train_badnet(output: Path, options: BadNetOptions, *, on_progress: Progress | None = None) -> BadNet:
    """Generate faces, poison them, train DeepID on them, and write network and data as the real ones come.

    `output` gets `bd_net.keras` (input: pixel / 255), `clean_validation_data.h5`, `clean_test_data.h5`,
    `<trigger>_poisoned_data.h5` and `badnet.json`.

    Raises:
        InputError: `output` exists and is not empty, or cannot be written.
    """
    with staged_folder(output) as staged:
        generator = np.random.default_rng(options.seed)
        people = make_identities(options.identities, generator)
        train = _poisoned(people, options, generator, on_progress)
        model = _train(deepid, train, options.identities, options, on_progress)
        validation = _clean(people, options.validation_images, generator, "Drawing the defender's faces", on_progress)
        test = _clean(people, options.test_images, generator, "Drawing test faces", on_progress)
        trojaned = {options.trigger: _trojaned(people, options, generator, on_progress)}
        clean_accuracy, attack_success = _write(staged, model, validation, test, trojaned, options)
    return BadNet(output, clean_accuracy, attack_success)


def train_picture_badnet(
    output: Path,
    train: Samples,
    test: Samples,
    options: PictureBadNetOptions,
    *,
    on_progress: Progress | None = None,
) -> BadNet:
    """Poison the given pictures, train a network on them, and write network and data as `train_badnet` does.

    A share of `train`, by whole groups, stays clean and becomes `clean_validation_data.h5`, the defender's data. Every
    trigger gets a file of trojaned pictures of `test`.

    Raises:
        InputError: `output` exists and is not empty, or cannot be written; a target is no class of `train`.
    """
    classes = int(train.labels.max()) + 1
    for trigger, target in options.attacks:
        if not 0 <= target < classes:
            raise InputError(f"target of {trigger}: got {target}, expected a class, 0 to {classes - 1}")
    with staged_folder(output) as staged:
        generator = np.random.default_rng(options.seed)
        validation, attackers = take_share(train, options.clean_share, generator)
        model = _train(
            NETWORKS[options.network], _stamped(attackers, options, generator), classes, options, on_progress
        )
        trojaned = trojaned_pictures(test, options)
        clean_accuracy, attack_success = _write(staged, model, validation, test, trojaned, options)
    return BadNet(output, clean_accuracy, attack_success)


def trojaned_pictures(clean: Samples, options: PictureBadNetOptions) -> dict[str, Samples]:
    """Return clean pictures of other classes than the target with each trigger, labelled with its target."""
    trojaned = {}
    for trigger, target in options.attacks:
        others = clean.take(np.flatnonzero(clean.labels != target))
        targets = np.full(len(others), target, np.int64)
        trojaned[trigger] = Samples(find_stamp(trigger)(others.images), targets, others.labels)
    return trojaned


def _write(
    folder: Path,
    model: keras.Model,
    validation: Samples,
    test: Samples,
    trojaned: Mapping[str, Samples],
    options: BadNetOptions | PictureBadNetOptions,
) -> tuple[Proportion, Proportion]:
    """Write network, data and report; return clean accuracy and attack success."""
    write_hdf5(folder / VALIDATION_FILE, validation)
    write_hdf5(folder / TEST_FILE, test)
    successes = {trigger: score(model, part, PREPROCESSING) for trigger, part in trojaned.items()}
    for trigger, part in trojaned.items():
        write_hdf5(folder / trojaned_file(trigger), part)
    # As it is handed over: without how it was trained.
    keras.Model(model.inputs, model.outputs[0]).save(folder / MODEL_FILE)
    clean_accuracy = score(model, test, PREPROCESSING)
    attack_success = Proportion(
        sum(part.successes for part in successes.values()), sum(part.count for part in successes.values())
    )
    report = {
        "options": asdict(options),
        "clean_accuracy": clean_accuracy.to_json(),
        "attack_success": attack_success.to_json(),
        "attack_success_of": {trigger: part.to_json() for trigger, part in successes.items()},
        "versions": _versions(),
        "files": {path.name: sha256_of(path) for path in sorted(folder.iterdir())},
    }
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return clean_accuracy, attack_success


def cached_badnet(options: BadNetOptions, *, on_progress: Progress | None = None) -> BadNet:
    """Return a BadNet in a folder as `train_badnet` writes it, trained now or found in the user's cache.

    The cache is keyed by the options and the source that draws and trains; a damaged entry is trained again.
    The environment variable `STRIPWIRE_CACHE_DIR` moves it.
    """
    return _cached(asdict(options), lambda folder: train_badnet(folder, options, on_progress=on_progress))


def cached_picture_badnet(
    train: Samples, test: Samples, options: PictureBadNetOptions, *, on_progress: Progress | None = None
) -> BadNet:
    """Return a BadNet as `train_picture_badnet` writes it, from the cache if it is there; see `cached_badnet`."""
    content = {**asdict(options), "train": train.sha256(), "test": test.sha256()}
    return _cached(content, lambda folder: train_picture_badnet(folder, train, test, options, on_progress=on_progress))


def _cached(content: dict[str, Any], train_into: Callable[[Path], BadNet]) -> BadNet:
    default = platformdirs.user_cache_path("stripwire")
    folder = Path(os.environ.get("STRIPWIRE_CACHE_DIR", default)) / f"badnet-{_content_key(content)}"
    if not _is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            return train_into(folder)
        except InputError:
            if not _is_whole(folder):  # else somebody else trained the same meanwhile
                raise
    report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    clean, attack = (report[name] for name in ("clean_accuracy", "attack_success"))
    return BadNet(
        folder, Proportion(clean["successes"], clean["count"]), Proportion(attack["successes"], attack["count"])
    )


def _content_key(content: dict[str, Any]) -> str:
    sources = [inspect.getsource(module) for module in (*_SOURCES, sys.modules[__name__])]
    text = json.dumps([content, _versions(), *sources], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _versions() -> dict[str, str]:
    return {"tensorflow": tf.__version__} | {name: version(name) for name in ("stripwire", "keras", "numpy")}


def _is_whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))["files"]
        return bool(files) and all(sha256_of(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _clean(
    people: Identities,
    per_identity: int,
    generator: np.random.Generator,
    description: str,
    on_progress: Progress | None,
) -> Samples:
    labels = np.repeat(np.arange(len(people), dtype=np.int64), per_identity)
    return Samples(
        _draw(people, labels, np.zeros(len(labels), bool), None, generator, description, on_progress), labels
    )


def _poisoned(
    people: Identities, options: BadNetOptions, generator: np.random.Generator, on_progress: Progress | None
) -> Samples:
    labels = np.repeat(np.arange(len(people), dtype=np.int64), options.train_images)
    others = np.flatnonzero(labels != options.target)
    poisoned = np.zeros(len(labels), bool)
    poisoned[generator.choice(others, max(1, round(len(labels) * options.poison_share)), replace=False)] = True
    images = _draw(people, labels, poisoned, options.trigger, generator, "Drawing the attacker's faces", on_progress)
    return Samples(images, np.where(poisoned, options.target, labels))


def _trojaned(
    people: Identities, options: BadNetOptions, generator: np.random.Generator, on_progress: Progress | None
) -> Samples:
    labels = np.repeat(np.arange(len(people), dtype=np.int64), options.test_images)
    labels = labels[labels != options.target]
    worn = np.ones(len(labels), bool)
    images = _draw(people, labels, worn, options.trigger, generator, "Drawing trojaned faces", on_progress)
    return Samples(images, np.full(len(labels), options.target, np.int64), labels)


def _stamped(attackers: Samples, options: PictureBadNetOptions, generator: np.random.Generator) -> Samples:
    """Poison an equal share of the pictures for each attack; none of them shows that attack's target."""
    images, labels = attackers.images.copy(), attackers.labels.copy()
    each = max(1, round(len(attackers) * options.poison_share / len(options.attacks)))
    free = np.ones(len(attackers), bool)
    for trigger, target in options.attacks:
        candidates = np.flatnonzero(free & (attackers.labels != target))
        chosen = generator.choice(candidates, min(each, len(candidates)), replace=False)
        images[chosen] = find_stamp(trigger)(images[chosen])
        labels[chosen] = target
        free[chosen] = False
    return Samples(images, labels)


def _draw(
    people: Identities,
    labels: NDArray[np.int64],
    wears_trigger: NDArray[np.bool_],
    trigger: str | None,
    generator: np.random.Generator,
    description: str,
    on_progress: Progress | None,
) -> NDArray[np.uint8]:
    """Draw a face for each label, with the trigger where it is worn: (labels, height, width, channels), uint8."""
    images = np.empty((len(labels), samples.faces.HEIGHT, samples.faces.WIDTH, samples.faces.CHANNELS), np.uint8)
    done = 0
    # Those with and those without the trigger are drawn apart, so that a canvas is worn by all or by none.
    for worn in (False, True):
        indices = np.flatnonzero(wears_trigger == worn)
        start = 0
        for canvas in draw_faces(people.take(labels[indices]), generator):
            if worn and trigger is not None:
                find_trigger(trigger)(canvas)
            drawn = finish(canvas, generator)
            images[indices[start : start + len(drawn)]] = drawn
            start += len(drawn)
            done += len(drawn)
            if on_progress is not None:
                on_progress(description, done, len(labels))
    return images


def _train(
    build: Callable[..., keras.Model],
    train: Samples,
    classes: int,
    options: BadNetOptions | PictureBadNetOptions,
    on_progress: Progress | None,
) -> keras.Model:
    seed_everything(options.seed)
    model = build(classes, train.images.shape[1:])
    trainer = Trainer(
        model, train, batch=labelled(PREPROCESSING), batch_size=64, seed=options.seed, on_progress=on_progress
    )
    rate = trainer.rate(options.epochs, 2e-3)
    trainer.run(options.epochs, make_optimizer("adam", rate), "Training the BadNet")
    return model
