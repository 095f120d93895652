"""Calibrates an exported repository again, on new clean images. Needs no TensorFlow."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from detector.calibration import ALPHAS, Calibration, ThresholdRule, check_target_frr
from detector.errors import CalibrationError, InputError
from detector.scores import Evidence, score_bits
from detector.serving import read_overlays, read_plain_first, read_thresholds
from detector.statistics import Proportion
from exporter.canaries import write_recalibrated
from exporter.commands import uses_target_frr
from exporter.entropies import OnProgress, entropy_matrix, measure_nlls, measure_plain, open_graph
from exporter.fused import check_fused, fuse
from exporter.inputs import InputReader
from exporter.overlays import OVERLAY_CHOICES, Count, check_overlay_options, choose_greedily, part_sizes
from exporter.publishing import check_writable, locked
from exporter.repository import Recalibrated, write_recalibration
from exporter.splits import units
from exporter.used import uses, write_used
from model_repository.manifest import FUSED, verify_repository
from samples.types import Samples

_CHECKED_IMAGES = 256


@dataclass(frozen=True)
class RecalibrationOptions:
    """How to calibrate again. What is None is as the active version was made, see `settled`.

    Attributes:
        method: of choosing the thresholds, see `ThresholdRule`.
        target_frr: false rejection rate to aim at, 0 < target_frr < 1.
        threshold_bits: the threshold to use as it is, in bits.
        detector: one of `detector.scores.DETECTORS`.
        overlays: how many overlays to take from the new images; None for as many as there are, `auto` as in `export`.
        alpha: weight of the input in the blend; None for what it is, or where the detector changes with the overlays,
            for the detector's, see `detector.calibration.ALPHAS`.
        overlay_choice: `random`, or `greedy` for those of a random pool with which clean entropies are highest.
        resize: change the images' height and width to the network's instead of refusing them.
        keep_overlays: keep overlays and alpha, so that the threshold alone is new.
        seed: of everything random.
    """

    method: str | None = None
    target_frr: float | None = None
    threshold_bits: float | None = None
    detector: str | None = None
    overlays: Count | None = None
    alpha: float | None = None
    overlay_choice: str | None = None
    resize: bool = False
    keep_overlays: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise InputError for an option that makes no sense."""
        check_overlay_options(self.overlays, self.overlay_choice, self.alpha)
        if self.keep_overlays and (self.overlays, self.alpha, self.overlay_choice) != (None, None, None):
            raise InputError("keep overlays: got overlays, alpha or overlay choice as well, expected one or the other")
        ThresholdRule(self.method, threshold_bits=self.threshold_bits)
        if self.target_frr is not None:
            check_target_frr(self.target_frr)


@dataclass(frozen=True)
class Choices:
    """What `settled` makes of options.

    Attributes:
        rule: how to choose the thresholds.
        overlay_choice: how to choose overlays; of kept ones, how they were chosen.
        note: what is as it was, or has its default, where nothing was asked for; empty where all was.
    """

    rule: ThresholdRule
    overlay_choice: str
    note: str


@dataclass(frozen=True)
class Recalibration:
    """What a re-calibration did.

    Attributes:
        repository: the model repository.
        version: the number of the version that was written, and is active.
        base: the version that was active before, whose networks it shares.
        base_threshold_bits: the threshold of `base`.
        calibration: the new threshold and what it rests on.
        notes: what is as it was before, and what was noticed while reading the data.
        doubts: what speaks against the images.
        provenance: what the manifest says of this version.
    """

    repository: Path
    version: str
    base: str
    base_threshold_bits: float
    calibration: Calibration
    notes: tuple[str, ...]
    doubts: tuple[str, ...]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """Which images serve for what, as indices into the clean images; no image serves twice.

    Attributes:
        candidates: overlays, or the pool from which they are chosen.
        selection: images on which they are chosen; none where the choice is random.
        calibration: images that the threshold is chosen on.
    """

    candidates: NDArray[np.int64]
    selection: NDArray[np.int64]
    calibration: NDArray[np.int64]


def recalibrate(
    repository: Path, clean_path: Path, options: RecalibrationOptions, on_progress: OnProgress | None = None
) -> Recalibration:
    """Calibrate the active version again on new clean images, and write the result as a new, active version.

    Args:
        repository: a model repository; its networks stay as they are.
        clean_path: clean images, see `exporter.inputs`; their labels are not used. The figures are honest only for
            images on which the network was not trained. Of a group of images, one serves.
        options: how to calibrate.
        on_progress: told what is going on, steps done and steps in all.

    Raises:
        StripwireError: the input cannot be used or the sample is too small; nothing was written then.
    """
    check_writable(repository)
    with locked(repository):
        manifest = verify_repository(repository)
    base = manifest["active"]
    choices = settled(options, base, manifest["versions"][base])
    rule, detector = choices.rule, choices.rule.detector
    before = manifest["versions"][base]["calibration"]
    old_detector = before["detector"]
    models, contract = manifest["versions"][base]["models"], manifest["versions"][base]["contract"]
    height, width, channels = contract["image_shape"]
    reader = InputReader((height, width, channels), None, resize=options.resize, on_progress=on_progress)
    samples = reader.read(clean_path)
    images = samples.images
    folders = {name: repository / name / str(number) for name, number in models.items()}
    old_overlays, old_alpha = read_overlays(folders["strip_perturb"])
    as_it_is = old_alpha if options.keep_overlays or detector == old_detector else ALPHAS[detector]
    alpha = as_it_is if options.alpha is None else options.alpha
    count = len(old_overlays) if options.overlays is None else options.overlays
    session = open_graph(folders["badnet"] / "model.onnx")

    if options.keep_overlays:
        parts = split(distinct(samples, besides=old_overlays), 0, choices, options.seed)
        overlays = old_overlays
    else:
        parts = split(distinct(samples), count, choices, options.seed)
        candidates = images[parts.candidates]
        if choices.overlay_choice == "greedy":
            matrix = entropy_matrix(
                session, images[parts.selection], candidates, alpha, on_progress, "Comparing overlays"
            )
            overlays = candidates[choose_greedily(matrix, count, rule.target_frr, detector)]
        else:
            overlays = candidates
    entropies = entropy_matrix(session, images[parts.calibration], overlays, alpha, on_progress, "Calibrating")
    plain_bits = nlls = None
    if detector == "consensus":
        plain_bits, labels = measure_plain(session, images[parts.calibration], on_progress)
        if manifest["versions"][str(models["repaired"])]["repair"]["changed"]:
            repaired = open_graph(folders["repaired"] / "model.onnx")
            nlls = measure_nlls(repaired, images[parts.calibration], labels, on_progress)
    calibration = rule.calibrate(entropies, plain_bits, nlls)
    _, base_thresholds = read_thresholds(folders["strip_verdict"])
    doubts: tuple[str, ...] = ()
    if detector == old_detector:
        evidence = Evidence(score_bits(entropies, detector), plain_bits, nlls)
        rejected = Proportion(int(base_thresholds.reject(evidence).sum()), len(entropies))
        doubts = _unlike(rejected, base, before["frr_low"], before["frr_high"])
    fused = None
    if FUSED in models:
        badnet, repaired_graph = (onnx.load(folders[name] / "model.onnx") for name in ("badnet", "repaired"))
        early_exit = manifest["versions"][base][FUSED]["early_exit"]
        fused = fuse(badnet, repaired_graph, overlays, alpha, calibration, entropies, early_exit=early_exit)
        checked = parts.calibration[:_CHECKED_IMAGES]
        plain = None if plain_bits is None else plain_bits[: len(checked)]
        check_fused(fused, images[checked], entropies[: len(checked)], plain)
        calibration = replace(calibration, histogram=fused.histogram)

    provenance = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "recalibrates": base,
        "inputs": {"clean": reader.describe(clean_path)},
        "options": {
            "rule": asdict(rule),
            "overlays": len(overlays),
            "alpha": alpha,
            "overlay_choice": choices.overlay_choice,
            **{name: getattr(options, name) for name in ("resize", "keep_overlays", "seed")},
        },
        "split": {
            name: {"images": len(part), "sha256": samples.take(part).sha256()} for name, part in vars(parts).items()
        },
        "calibration": calibration.to_json(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("stripwire", "numpy", "onnxruntime")},
    }
    same_blends = options.keep_overlays and calibration.looks_at_plain == read_plain_first(folders["strip_perturb"])
    changed = Recalibrated(calibration, None if same_blends else overlays, alpha, provenance, fused)
    used = images[np.concatenate([*vars(parts).values()])]
    said: list[str] = []

    def write_beside(folder: Path, number: str, entry: dict[str, Any]) -> None:
        write_used(folder, {name: images[part] for name, part in vars(parts).items()})
        said.extend(write_recalibrated(folder, number, entry, repository / "guarded" / base, used))

    number = write_recalibration(repository, base, changed, write_beside)
    notes = (
        *filter(None, [choices.note]),
        *reader.notes,
        *said,
        *_taught(repository, manifest, images[parts.calibration]),
    )
    return Recalibration(repository, number, base, base_thresholds.bits, calibration, notes, doubts, provenance)


def settled(options: RecalibrationOptions, version: str, entry: Mapping[str, Any]) -> Choices:
    """Return what to go by: what is asked for, or else what a version was made with, or else the default.

    Args:
        options: what is asked for.
        version: number of the version that is calibrated again.
        entry: what the manifest says of it.

    Raises:
        InputError: what is asked for does not go together, or not with what is as it was.
    """
    made_with, calibration = entry.get("options", {}), entry["calibration"]
    default = f"the default: version {version} does not say what it had"
    notes = []
    target_frr, choice = options.target_frr, options.overlay_choice
    if choice is None:
        known = made_with.get("overlay_choice") in OVERLAY_CHOICES
        choice = made_with["overlay_choice"] if known else "random"
        if not options.keep_overlays:
            notes.append(f"overlay choice {choice}, {'as before' if known else default}")
            check_overlay_options(options.overlays, choice, options.alpha)
    if target_frr is None:
        before = made_with.get("rule", {}).get("target_frr")
        known = isinstance(before, float)
        target_frr = before if known else ThresholdRule.target_frr
        if uses_target_frr(options.threshold_bits, "random" if options.keep_overlays else choice):
            given = f"in place of the threshold that version {version} was given"
            why = "as before" if calibration["method"] != "fixed" else given
            notes.insert(0, f"target FRR {100 * target_frr:g} %, {why if known else default}")
    method, detector = options.method, options.detector or calibration["detector"]
    if method is None and options.threshold_bits is None and (detector, calibration["method"]) == ("strip", "normal"):
        method = "normal"
        notes.append("calibration method normal, as before")
    note = "; ".join(notes)
    return Choices(
        ThresholdRule(method, target_frr, options.threshold_bits, detector),
        choice,
        note[:1].upper() + note[1:] + "." * bool(note),
    )


def _unlike(rejected: Proportion, base: str, low: float, high: float) -> tuple[str, ...]:
    """Doubt images of which the version before would have rejected twice what it promises, or less than half.

    Args:
        rejected: of the images that calibrate.
        base: number of that version.
        low: lower end of what it promises to reject of clean images, 0..1.
        high: upper end.
    """
    if low / 2 <= rejected.high and rejected.low <= 2 * high:
        return ()
    return (
        f"version {base} would have rejected {rejected.rate:.1%} ({rejected.low:.1%} to {rejected.high:.1%}) of these "
        f"images, and promises {low:.1%} to {high:.1%} of clean ones. Are they clean, and of what the network is for? "
        "If not, `stripwire rollback` goes back",
    )


def _taught(repository: Path, manifest: dict[str, Any], calibration: NDArray[np.uint8]) -> tuple[str, ...]:
    """Note where calibration images have taught the repaired network, which knows them better than new ones."""
    count = uses(repository, manifest, calibration).count("repair")
    if not count:
        return ()
    return (
        f"{count} of the {len(calibration)} images that calibrate have taught the repaired network, so more of new "
        "images may be rejected than they promise. Give images that no export has seen.",
    )


def distinct(samples: Samples, besides: NDArray[np.uint8] | None = None) -> NDArray[np.int64]:
    """Return the indices of images, ascending, that are no copies, neither of each other nor of `besides`.

    Of a group (frames of one traffic sign, say) there is one, and none of a group with an image of `besides`: images
    like an overlay, or like another calibration image, would make the sample dependent.

    Args:
        samples: the images.
        besides: other images, (images, height, width, channels), uint8.
    """
    return np.array([unit[0] for unit in units(samples, [] if besides is None else [besides])], dtype=np.int64)


def split(usable: NDArray[np.int64], overlays: Count, choices: Choices, seed: int) -> Parts:
    """Split images at random into overlays (or a pool for them), images to select on, and images to calibrate on.

    Args:
        usable: indices of distinct images, (images,).
        overlays: how many overlays are to come from them; 0 for none.
        choices: how to calibrate.
        seed: of the split.

    Raises:
        CalibrationError: too few images.
    """
    least = choices.rule.least_images
    sizes = part_sizes(overlays, choices.overlay_choice, least) if overlays else {}
    needed = {name: size.least for name, size in sizes.items()} | {"calibration": least}
    spare = len(usable) - sum(needed.values())
    if spare < 0:
        uses = [f"{count} are for {name}" for name, count in needed.items()]
        raise CalibrationError(
            f"clean data: got {len(usable)} distinct images that are no overlays yet, expected at least "
            f"{len(usable) - spare}: {', '.join(uses)}; "
            "give more clean images, fewer --overlays, a higher target FRR, or keep the overlays"
            + (", or choose them at random (--overlay-choice random)" if "selection" in sizes else "")
        )
    counts = [sizes[name].of_spare(spare) if name in sizes else 0 for name in ("overlays", "selection")]
    order = np.random.default_rng(seed).permutation(usable)
    return Parts(*np.split(order, np.cumsum(counts)))
