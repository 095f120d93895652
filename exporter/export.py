"""The whole export: a suspicious Keras model and clean data in, a model repository out."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnxruntime
import tensorflow as tf
from numpy.typing import NDArray

from detector.calibration import Calibration
from detector.errors import CalibrationError, DataError, ModelRefusedError
from detector.scores import Evidence, score_bits
from detector.statistics import Proportion
from exporter.canaries import write_exported
from exporter.classifier import with_probabilities
from exporter.commands import commands
from exporter.convert import check_parity, repaired_graph, sentinel_graph, to_onnx
from exporter.entropies import entropy_matrix, measure_nlls, measure_plain, open_graph
from exporter.fused import check_fused, fuse
from exporter.inputs import InputReader
from exporter.keras_files import load_model
from exporter.options import Data as Data
from exporter.options import ExportOptions as ExportOptions
from exporter.options import RepairOptions
from exporter.overlays import choose_greedily
from exporter.preprocessing import SCALES, Preprocessing
from exporter.repair import Repair, check_attack, check_repairable, repair_network
from exporter.report import HTML_NAME, Notice, Scores, notices, write_report
from exporter.report.collect import collect
from exporter.repository import ServedModel, check_output, write_repository
from exporter.splits import Split, part_to_json, split_clean, take_share
from exporter.training import Progress, score
from exporter.used import write_used
from samples.types import Samples

_SCALE_IMAGES = 1000
_PARITY_IMAGES = 256


@dataclass(frozen=True)
class Export:
    """What an export did.

    Attributes:
        output: the model repository.
        report: the page that tells all this, `report.json` beside it.
        version: the number of the version that was written.
        repair: the steps of the repair.
        before: how the network does as it came.
        after: how the repaired network does.
        false_rejection: validation images that the guard rejects; they had no part in choosing its threshold.
        false_acceptance: attack samples that it accepts; None without them.
        calibration: the threshold and what it rests on.
        split_sizes: how many clean images went where.
        network_outputs: what the network returned as it came, `probabilities` or `logits`.
        notices: what must not be missed.
        notes: what was noticed while reading the data.
        provenance: what the manifest says of this version.
    """

    output: Path
    report: Path
    version: str
    repair: Repair
    before: Scores
    after: Scores
    false_rejection: Proportion
    false_acceptance: Proportion | None
    calibration: Calibration
    split_sizes: dict[str, int]
    network_outputs: str
    notices: tuple[Notice, ...]
    notes: tuple[str, ...]
    provenance: dict[str, Any]


def export(
    model_path: Path, data: Data, output: Path, options: ExportOptions, *, on_progress: Progress | None = None
) -> Export:
    """Repair, convert, calibrate and write a model repository.

    Args:
        model_path: the suspicious Keras model; nothing in the file is run.
        data: where the images are. With `options.repair.stop_on_attack`, half of the attack samples may end the repair,
            and the other half are scored.
        output: the model repository: a new folder, or one to which a version is added.
        options: how to export.
        on_progress: told what is going on, steps done and steps in all.

    Raises:
        StripwireError: the input cannot be used, the sample is too small, or a check failed; nothing was written then.
    """
    options.check_data(data)
    preprocessing = options.preprocessing
    loaded = load_model(model_path, architecture=options.architecture)
    preprocessing.check_channels(loaded.input_shape[-1])
    # All that can fail early does so before the data is read, or at least before the repair, which takes long.
    try:
        model, network_outputs = with_probabilities(loaded, preprocessing)
        check_repairable(model, options.repair.method)
        badnet = sentinel_graph(to_onnx(model), preprocessing)
    except ModelRefusedError as error:
        raise ModelRefusedError(f"{model_path}: {error}") from error
    height, width, channels = model.input_shape[1:]
    image_shape, classes = (height, width, channels), int(model.output_shape[-1])
    check_output(output, image_shape, classes)
    reader = InputReader(image_shape, classes, resize=options.resize, on_progress=on_progress)
    clean = None if data.clean is None else reader.read(data.clean)
    parts = {name: reader.read(path) for name, path in data.parts.items()}
    attack = None if data.attack is None else reader.read_attack(data.attack)
    try:
        split = split_clean(
            clean,
            overlay_count=options.overlays,
            overlay_choice=options.overlay_choice,
            least_calibration=options.rule.least_images,
            with_repair=options.repair.method != "none",
            seed=options.seed,
            **parts,
        )
    except CalibrationError as error:
        if options.rule.detector == "strip":
            raise
        raise CalibrationError(f"{error}. --detector strip calibrates on half as many") from error
    measured = attack
    if attack is not None and options.repair.stop_on_attack:
        measured, attack = _halves(attack, options.seed)
        check_attack(model, measured, preprocessing)
    try:
        check_accuracy(model, split.validation if clean is None else clean, preprocessing, options.seed)
    except DataError as error:
        raise reader.explained(error) from None
    parity_images = np.concatenate([split.overlays.images, split.validation.images])[:_PARITY_IMAGES]
    parity = {"badnet": check_parity(model, badnet, parity_images, preprocessing, "original network")}
    session = open_graph(badnet.SerializeToString())
    overlays = _choose_overlays(session, split, options, on_progress)

    def entropies_of(samples: Samples, description: str = "Measuring STRIP") -> NDArray[np.float32]:
        return entropy_matrix(session, samples.images, overlays, options.input_weight, on_progress, description)

    entropies = entropies_of(split.calibration, "Calibrating")
    plain_bits = labels = None
    if options.rule.detector == "consensus":
        plain_bits, labels = measure_plain(session, split.calibration.images, on_progress)
    calibration = options.rule.calibrate(entropies, plain_bits)  # fails, if at all, before the repair

    repair = repair_network(
        model,
        split.repair,
        split.validation,
        preprocessing=preprocessing,
        options=options.repair,
        attack=measured,
        on_progress=on_progress,
    )
    repaired = repaired_graph(to_onnx(repair.model), preprocessing)
    parity["repaired"] = check_parity(repair.model, repaired, parity_images, preprocessing, "repaired network")

    repaired_session = open_graph(repaired.SerializeToString())

    if labels is not None and repair.changed:
        nlls = measure_nlls(repaired_session, split.calibration.images, labels, on_progress)
        try:
            calibration = options.rule.calibrate(entropies, plain_bits, nlls)
        except CalibrationError as error:  # what was calibrated before the repair still holds
            calibration = replace(calibration, note=f"the repaired network is not asked: {error}")

    def evidence_of(samples: Samples, entropies_bits: NDArray[np.float32]) -> Evidence:
        bits = score_bits(entropies_bits, calibration.detector)
        if not calibration.looks_at_plain:
            return Evidence(bits)
        plain_bits, labels = measure_plain(session, samples.images, on_progress)
        if not calibration.asks_repaired:
            return Evidence(bits, plain_bits)
        return Evidence(bits, plain_bits, measure_nlls(repaired_session, samples.images, labels, on_progress))

    fused = None
    if options.layout == "fused":
        fused = fuse(
            badnet,
            repaired,
            overlays,
            options.input_weight,
            calibration,
            entropies,
            early_exit=options.early_exit,
        )
        checked = slice(_PARITY_IMAGES)
        plain = None if plain_bits is None else plain_bits[checked]
        check_fused(fused, split.calibration.images[checked], entropies[checked], plain)
        calibration = replace(calibration, histogram=fused.histogram)

    deciding = measured if options.repair.stop_on_attack else None
    attacks = {"attack": attack, "deciding_attack": deciding}
    before, after = (_scores(network, split.validation, attack, preprocessing) for network in (model, repair.model))
    report = collect(
        model_path=model_path,
        model=model,
        repair=repair,
        before=before,
        after=after,
        split=split,
        attack=attack,
        deciding=deciding,
        preprocessing=preprocessing,
        overlays=overlays,
        alpha=options.input_weight,
        calibration=calibration,
        calibration_entropies_bits=entropies,
        entropies_of=entropies_of,
        evidence_of=evidence_of,
        commands=commands(model_path, data, output, options),
    )
    rejection, acceptance = report.false_rejection, report.false_acceptance
    guard = {
        "false_rejection": rejection.to_json(),
        "false_acceptance": None if acceptance is None else acceptance.to_json(),
    }
    inputs = {"model": model_path, "clean": data.clean, "attack": data.attack, **data.parts}
    provenance = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "inputs": {name: reader.describe(path) for name, path in inputs.items() if path is not None},
        "options": asdict(options) | {"overlays": len(overlays), "alpha": options.input_weight},
        "network_outputs": network_outputs,
        "split": split.to_json() | {name: part_to_json(part) for name, part in attacks.items() if part is not None},
        "scores": {"before": before.to_json(), "after": after.to_json(), "guard": guard},
        "repair": repair.to_json(),
        "calibration": calibration.to_json(),
        "parity_max_difference": parity,
        "versions": _versions(),
    }
    served = ServedModel(badnet, repaired, overlays, options.input_weight, calibration, classes, provenance, fused)

    def write_beside(folder: Path, number: str, entry: dict[str, Any]) -> None:
        write_report(folder, report, number, provenance)
        trojaned = None if attack is None else attack.images
        write_used(folder, {name: part.images for name, part in vars(split).items()})
        write_exported(folder, number, entry, split.validation.images, trojaned, options.seed)

    number = write_repository(output, served, write_beside)
    return Export(
        output=output,
        report=output / "guarded" / number / HTML_NAME,
        version=number,
        repair=repair,
        before=before,
        after=after,
        false_rejection=rejection,
        false_acceptance=acceptance,
        calibration=calibration,
        split_sizes=split.sizes(),
        network_outputs=network_outputs,
        notices=notices(report),
        notes=(*reader.notes, *_coarse(split, options.repair)),
        provenance=provenance,
    )


def check_accuracy(model: keras.Model, clean: Samples, preprocessing: Preprocessing, seed: int) -> None:
    """Check on clean samples that the network is fed as it was trained.

    Raises:
        DataError: with this preprocessing the network is not better than chance, or clearly worse than at another
            scale; the message has the accuracy with each.
    """
    chosen = np.random.default_rng(seed).permutation(len(clean))[:_SCALE_IMAGES]
    sample = clean.take(chosen)
    others = [Preprocessing(scale) for scale in SCALES] + [replace(preprocessing, scale=scale) for scale in SCALES]
    candidates = dict.fromkeys([preprocessing, *others])
    accuracies = {str(candidate): score(model, sample, candidate) for candidate in candidates}
    chance = 1.0 / model.output_shape[-1]
    table = ", ".join(f"{name}: {result}" for name, result in accuracies.items())
    best = max(accuracies, key=lambda name: accuracies[name].rate)
    if accuracies[best].low <= chance:
        raise DataError(
            f"clean data: the network's accuracy on it is near chance ({chance:.2%}) at every pixel scale ({table}); "
            "expected images of the task that the network was trained for, labels numbered as there, and --mean and "
            "--std if it was trained with them"
        )
    if accuracies[str(preprocessing)].high < accuracies[best].low:
        raise DataError(
            f"scale: got {preprocessing}, at which the network's accuracy on clean data is much lower than at {best} "
            f"({table}); give --mean and --std if it was trained with them, and otherwise --scale as there"
        )


def _choose_overlays(
    session: onnxruntime.InferenceSession, split: Split, options: ExportOptions, on_progress: Progress | None
) -> NDArray[np.uint8]:
    """Return the overlays, (perturbations, height, width, channels)."""
    candidates = split.overlays.images
    if options.overlay_choice == "random":
        return candidates
    matrix = entropy_matrix(
        session, split.selection.images, candidates, options.input_weight, on_progress, "Comparing overlays"
    )
    rule = options.rule
    chosen: NDArray[np.uint8] = candidates[choose_greedily(matrix, options.overlays, rule.target_frr, rule.detector)]
    return chosen


def _coarse(split: Split, repair: RepairOptions) -> tuple[str, ...]:
    """Note where the validation part is too small for the allowed drop to mean what it says."""
    if repair.method == "none" or repair.allowed_drop == 0 or repair.allowed_drop * len(split.validation) >= 1:
        return ()
    return (
        f"The repair was chosen on {len(split.validation)} validation images, of which an allowed drop of "
        f"{repair.allowed_drop:.1%} is not one: no further error was allowed. Give more clean images.",
    )


def _halves(attack: Samples, seed: int) -> tuple[Samples, Samples]:
    """Return the attack samples that may end the repair, and those that are scored; no group is in both."""
    halves = take_share(attack, 0.5, np.random.default_rng(seed))
    if not all(map(len, halves)):
        raise DataError(
            "stop on attack: got attack samples that cannot be halved, expected distinct images of 2 groups or more: "
            "some to stop on, and others to score"
        )
    return halves


def _scores(network: keras.Model, validation: Samples, attack: Samples | None, preprocessing: Preprocessing) -> Scores:
    clean_accuracy = score(network, validation, preprocessing)
    if attack is None:
        return Scores(clean_accuracy, None, None)
    shown = None if attack.true_labels is None else Samples(attack.images, attack.true_labels)
    recovered = None if shown is None else score(network, shown, preprocessing)
    return Scores(clean_accuracy, score(network, attack, preprocessing), recovered)


def _versions() -> dict[str, str]:
    packages = ("stripwire", "keras", "numpy", "onnx", "onnxruntime", "tf2onnx")
    found = {"python": platform.python_version(), "tensorflow": tf.__version__}
    return found | {name: version(name) for name in packages}
