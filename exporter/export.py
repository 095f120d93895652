"""The whole export: a suspicious Keras model and clean data in, a model repository out."""

from __future__ import annotations

import hashlib
import math
import platform
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnxruntime
import tensorflow as tf
from numpy.typing import NDArray

from detector.calibration import (
    Calibration,
    calibrate,
    check_target_frr,
    check_threshold,
    fixed_threshold,
    least_images,
)
from detector.errors import CalibrationError, DataError, InputError
from detector.strip import check_alpha, entropy_bits, perturb, weighted_overlays
from exporter.classifier import with_probabilities
from exporter.convert import check_parity, open_session, repaired_graph, sentinel_graph, to_onnx
from exporter.keras_files import load_model
from exporter.preprocessing import SCALES, Preprocessing
from exporter.repair import Repair, RepairOptions, repair_network
from exporter.repository import ServedModel, check_output, write_repository
from exporter.training import Progress, score
from model_repository.manifest import sha256_of
from samples.hdf5 import check_labels, read_hdf5
from samples.types import Samples

_SCALE_IMAGES = 1000
_PARITY_IMAGES = 256
_BATCH = 32


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        preprocessing: what the network expects of pixels.
        architecture: of a file that holds weights only, such as `deepid`.
        repair: how to repair.
        overlays: how many perturbations STRIP makes of an input.
        alpha: weight of the input in the blend; the overlay gets 1 - alpha.
        target_frr: false rejection rate that the threshold aims at, 0..1; not used with `threshold_bits`.
        threshold_bits: a threshold to use as it is, in bits.
        seed: of the split and of everything random in the repair.
    """

    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    architecture: str | None = None
    repair: RepairOptions = field(default_factory=RepairOptions)
    overlays: int = 10
    alpha: float = 0.5
    target_frr: float = 0.05
    threshold_bits: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise InputError for an option that makes no sense."""
        check_alpha(self.alpha)
        if not 1 <= self.overlays <= 1000:
            raise InputError(f"overlays: got {self.overlays}, expected 1 to 1000 (10 is usual)")
        check_target_frr(self.target_frr)
        if self.threshold_bits is not None:
            check_threshold(self.threshold_bits)


@dataclass(frozen=True)
class Split:
    """Clean data, each image in one part only."""

    overlays: Samples
    calibration: Samples
    validation: Samples
    repair: Samples

    def sizes(self) -> dict[str, int]:
        """Return how many images each part has."""
        return {name: len(part) for name, part in vars(self).items()}


@dataclass(frozen=True)
class Export:
    """What an export did.

    Attributes:
        output: the model repository.
        version: the number of the version that was written.
        repair: the rounds of the repair.
        calibration: the threshold and what it rests on.
        split_sizes: how many clean images went where.
        provenance: what the manifest says of this version.
    """

    output: Path
    version: str
    repair: Repair
    calibration: Calibration
    split_sizes: dict[str, int]
    provenance: dict[str, Any]


def export(
    model_path: Path,
    clean_path: Path,
    output: Path,
    options: ExportOptions,
    *,
    attack_path: Path | None = None,
    on_progress: Progress | None = None,
) -> Export:
    """Repair, convert, calibrate and write a model repository.

    Args:
        model_path: the suspicious Keras model; nothing in the file is run.
        clean_path: clean labelled images, official HDF5 layout.
        output: the model repository: a new folder, or one to which a version is added.
        options: how to export.
        attack_path: trojaned images, if any are at hand; they end the repair as soon as the attack fails.
        on_progress: told what is going on, steps done and steps in all.

    Raises:
        StripwireError: the input cannot be used, the sample is too small, or a check failed; nothing was written then.
    """
    inputs = {"model": model_path, "clean": clean_path} | ({} if attack_path is None else {"attack": attack_path})
    preprocessing = options.preprocessing
    loaded = load_model(model_path, architecture=options.architecture)
    preprocessing.check_channels(loaded.input_shape[-1])
    model, outputs = with_probabilities(loaded, preprocessing)
    # What cannot be converted is refused before any data is read.
    badnet = sentinel_graph(to_onnx(model), preprocessing)
    digests = {name: {"file": path.name, "sha256": sha256_of(path)} for name, path in inputs.items() if path.is_file()}
    image_shape, classes = tuple(model.input_shape[1:]), int(model.output_shape[-1])
    check_output(output, image_shape, classes)
    clean = _read(clean_path, image_shape, classes, on_progress)
    attack = None if attack_path is None else _read(attack_path, image_shape, classes, on_progress)
    check_accuracy(model, clean, preprocessing, options.seed)
    split = split_clean(clean, options)
    parity_images = np.concatenate([split.overlays.images, split.validation.images])[:_PARITY_IMAGES]

    # All that can fail early does so before the repair, which takes long.
    parity = {"badnet": check_parity(model, badnet, parity_images, preprocessing, "original network")}
    session = open_session(badnet)
    entropies = measure_entropies(session, split.calibration.images, split.overlays.images, options.alpha, on_progress)
    calibration = (
        calibrate(entropies, options.target_frr)
        if options.threshold_bits is None
        else fixed_threshold(entropies, options.threshold_bits)
    )

    repaired = repair_network(
        model,
        split.repair,
        split.validation,
        preprocessing=preprocessing,
        options=options.repair,
        attack=attack,
        on_progress=on_progress,
    )
    graph = repaired_graph(to_onnx(repaired.model), preprocessing)
    parity["repaired"] = check_parity(repaired.model, graph, parity_images, preprocessing, "repaired network")

    provenance = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "inputs": digests,
        "options": asdict(options),
        "network_outputs": outputs,
        "split_sizes": split.sizes(),
        "accuracy": {
            name: score(net, split.validation, preprocessing).to_json()
            for name, net in (("original_validation", model), ("repaired_validation", repaired.model))
        },
        "repair": repaired.to_json(),
        "calibration": asdict(calibration),
        "parity_max_difference": parity,
        "versions": _versions(),
    }
    served = ServedModel(badnet, graph, split.overlays.images, options.alpha, calibration, classes, provenance)
    number = write_repository(output, served)
    return Export(output, number, repaired, calibration, split.sizes(), provenance)


def check_accuracy(model: keras.Model, clean: Samples, preprocessing: Preprocessing, seed: int) -> None:
    """Check on clean samples that the network is fed as it was trained.

    Raises:
        DataError: with this preprocessing the network is not better than chance, or clearly worse than with a plain
            scale; the message has the accuracy with each.
    """
    chosen = np.random.default_rng(seed).permutation(len(clean))[:_SCALE_IMAGES]
    sample = clean.take(chosen)
    plain = [Preprocessing(scale) for scale in SCALES]
    candidates = [preprocessing, *(other for other in plain if other != preprocessing)]
    accuracies = {str(candidate): score(model, sample, candidate) for candidate in candidates}
    chance = 1.0 / model.output_shape[-1]
    table = ", ".join(f"{name}: {result}" for name, result in accuracies.items())
    best = max(accuracies, key=lambda name: accuracies[name].rate)
    if accuracies[best].low <= chance:
        raise DataError(
            f"clean data: the network's accuracy on it is near chance ({chance:.2%}) at every pixel scale ({table}); "
            "expected images and labels of the task that the network was trained for"
        )
    if accuracies[str(preprocessing)].high < accuracies[best].low:
        raise DataError(
            f"scale: got {preprocessing}, at which the network's accuracy on clean data is much lower than at {best} "
            f"({table}); use --scale {best} alone"
        )


def split_clean(clean: Samples, options: ExportOptions) -> Split:
    """Split clean samples at random into overlays, calibration, validation and repair, which share no image.

    Identical images count as one: copies of an overlay or of a calibration image would make the sample dependent.

    Raises:
        CalibrationError: too few distinct images for all parts.
    """
    digests = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in clean.images]
    _, distinct = np.unique(digests, return_index=True)
    order = np.random.default_rng(options.seed).permutation(np.sort(distinct))
    shares = (0.2, 0.15) if options.repair.method != "none" else (0.8, 0.2)
    calibration, validation = (int((len(order) - options.overlays) * share) for share in shares)
    least_calibration = 2 if options.threshold_bits is not None else least_images(options.target_frr)
    if calibration < least_calibration or validation < 2:
        needed = options.overlays + math.ceil(max(least_calibration / shares[0], 2 / shares[1]))
        raise CalibrationError(
            f"clean data: got {len(order)} distinct images, expected at least {needed}: {options.overlays} are "
            f"overlays, and {shares[0]:.0%} of the others calibrate, of which a target FRR of {options.target_frr:g} "
            f"needs {least_calibration}; give more clean images, or a higher target FRR"
        )
    ends = np.cumsum([options.overlays, calibration, validation])
    overlays, calibrating, validating, repairing = (clean.take(part) for part in np.split(order, ends))
    return Split(overlays, calibrating, validating, repairing)


def measure_entropies(
    session: onnxruntime.InferenceSession,
    images: NDArray[np.uint8],
    overlays: NDArray[np.uint8],
    alpha: float,
    on_progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Return STRIP's entropy of each image, computed as the server computes it.

    Args:
        session: on the sentinel's graph.
        images: (images, height, width, channels), uint8.
        overlays: (perturbations, height, width, channels), uint8.
        alpha: weight of the input in the blend.
        on_progress: told about every batch.

    Returns:
        (images,), float32, in bits.
    """
    weighted = weighted_overlays(overlays, alpha)
    entropies = []
    for start in range(0, len(images), _BATCH):
        perturbations = perturb(images[start : start + _BATCH], weighted, alpha)
        (probabilities,) = session.run(None, {"perturbations": perturbations})
        entropies.append(entropy_bits(probabilities))
        if on_progress is not None:
            on_progress("Calibrating STRIP", min(start + _BATCH, len(images)), len(images))
    return np.concatenate(entropies) if entropies else np.empty(0, dtype=np.float32)


def _read(path: Path, image_shape: tuple[int, ...], classes: int, on_progress: Progress | None) -> Samples:
    def report(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(f"Reading {path.name}", done, total)

    samples = read_hdf5(path, on_progress=report)
    if samples.images.shape[1:] != image_shape:
        raise DataError(
            f"{path}: got images of height, width, channels {samples.images.shape[1:]}, expected {image_shape} as the "
            "network takes them"
        )
    check_labels(samples, classes, path)
    return samples


def _versions() -> dict[str, str]:
    packages = ("stripwire", "keras", "numpy", "onnx", "onnxruntime", "tf2onnx")
    found = {"python": platform.python_version(), "tensorflow": tf.__version__}
    return found | {name: version(name) for name in packages}
