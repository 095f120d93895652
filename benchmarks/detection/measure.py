"""Measures a case, and writes each figure as soon as it is known."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from benchmarks.detection.cases import OVERLAYS, SEED, TARGETS, Material, Report, some
from benchmarks.detection.detectors import Measured, compared, judge
from detector.calibration import calibrate, least_images
from detector.statistics import Proportion, auroc
from exporter.convert import repaired_graph, sentinel_graph, to_onnx
from exporter.entropies import entropy_matrix, open_graph
from exporter.repair import RepairOptions, repair_network
from exporter.training import score
from samples.types import Samples

ALPHAS = (0.5, 0.7)
SWEPT_TARGETS = TARGETS[1:]
JOINED = ("bounds", "distill")
"""Repairs that are joined with the detector `consensus`."""


def measure(material: Material, file: Path, *, images: int, only: tuple[str, ...] = (), report: Report) -> None:
    """Measure what is not yet in a case's file: repairs, and then detectors, with the networks that came of them.

    Args:
        material: the case.
        file: its results, JSON; what is there of another network, split or choice of images is measured again.
        images: detectors judge at most so many clean and trojaned ones.
        only: repairs to measure; none given are all of the case's.
        report: told what is going on.
    """
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    key = {"network": _fingerprint(material.model), "test": material.clean.sha256(), "images": images}
    key |= {"alphas": list(ALPHAS), "overlays": list(OVERLAYS), "split": material.split.to_json()}
    key |= {"targets": list(TARGETS), "calibration": len(material.calibration)}
    if results.get("key") != key:
        results = {"key": key, "machine": platform.machine()}
        results["received"] = _rates(material.model, material)
        _save(file, results)
    if material.sweep and "strip" not in results:
        results["strip"] = _strip(material, images, report)
        _save(file, results)
    for method in only or material.repairs:
        _measure_repair(material, method, results, report)
        _save(file, results)
    repaired = {
        method: _kept(material, method) if rates["kept"] != "as received" else None
        for method, rates in results.get("repairs", {}).items()
        if method in JOINED and (not only or method in only)
    }
    measured = Measured(material, images, report)
    for name, detector in compared(repaired, classes_known=len(material.split.repair) > 0).items():
        if name not in results.setdefault("detectors", {}):
            results["detectors"][name] = judge(detector, measured)
            _save(file, results)


def _measure_repair(material: Material, method: str, results: dict[str, Any], report: Report) -> None:
    """Repair, unless that is known and the network that came of it is at hand."""
    options = RepairOptions(method=method, seed=SEED)
    known = results.setdefault("repairs", {}).get(method, {})
    kept = _kept(material, method)
    if known.get("options") == asdict(options) and (method not in JOINED or known.get("onnx") == _digest(kept)):
        return
    started = time.perf_counter()
    repaired = repair_network(
        material.model,
        material.split.repair,
        material.split.validation,
        preprocessing=material.preprocessing,
        options=options,
        on_progress=report,
    )
    seconds = round(time.perf_counter() - started)
    graph = repaired_graph(to_onnx(repaired.model), material.preprocessing)
    _write(kept, graph.SerializeToString())
    # What was found out with the network of before is not true of this one.
    results.setdefault("detectors", {}).pop(f"consensus, {method}", None)
    results["repairs"][method] = {
        **_rates(repaired.model, material),
        "options": asdict(options),
        "kept": repaired.kept,
        "onnx": _digest(kept),
        "seconds": seconds,
    }


def _kept(material: Material, method: str) -> Path:
    """Return where the network of a repair is kept: beside the one that was repaired."""
    assert material.folder is not None  # noqa: S101  a case with repairs has one
    return material.folder / f"repaired-{method}.onnx"


def _digest(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _rates(model: keras.Model, material: Material) -> dict[str, Any]:
    """Return clean accuracy, and of each trigger attack success and recovered accuracy."""
    rates: dict[str, Any] = {"clean_accuracy": score(model, material.clean, material.preprocessing).to_json()}
    for trigger, part in material.trojaned.items():
        success = score(model, part, material.preprocessing).to_json()
        recovered = None
        if part.true_labels is not None:
            recovered = score(model, Samples(part.images, part.true_labels), material.preprocessing).to_json()
        rates[trigger] = {"attack_success": success, "recovered_accuracy": recovered}
    return rates


def _strip(material: Material, images: int, report: Report) -> list[dict[str, Any]]:
    """Return AUROC, FAR and FRR for each weight of the input, number of overlays, target and trigger."""
    session = open_graph(sentinel_graph(to_onnx(material.model), material.preprocessing).SerializeToString())
    overlays = material.split.overlays.images
    rows = []
    for alpha in ALPHAS:

        def entropies(samples: Samples, alpha: float = alpha) -> NDArray[np.float32]:
            return entropy_matrix(session, samples.images, overlays, alpha, report)

        calibration, clean = entropies(material.split.calibration), entropies(some(material.clean, images))
        for trigger, part in material.trojaned.items():
            trojaned = entropies(some(part, images))
            for count in (count for count in OVERLAYS if count <= len(overlays)):
                means = [matrix[:, :count].mean(axis=1) for matrix in (calibration, clean, trojaned)]
                area = auroc(-means[1], -means[2])
                row = {"alpha": alpha, "overlays": count, "trigger": trigger, "auroc": area}
                rows.append(row | {f"at_{target:g}": _errors(means, target) for target in SWEPT_TARGETS})
    return rows


def _errors(entropies: list[NDArray[np.float32]], target: float) -> dict[str, Any] | None:
    """Return FAR and FRR of the threshold for a target FRR; None where the calibration images are too few for it."""
    calibration, clean, trojaned = entropies
    if len(calibration) < least_images(target):
        return None
    threshold = calibrate(calibration, target).threshold_bits
    accepted = Proportion(int(np.count_nonzero(trojaned > threshold)), len(trojaned))
    rejected = Proportion(int(np.count_nonzero(clean <= threshold)), len(clean))
    return {"far": accepted.to_json(), "frr": rejected.to_json(), "threshold_bits": threshold}


def _fingerprint(model: keras.Model) -> str:
    weights = np.concatenate([weight.ravel() for weight in model.get_weights()]).astype(np.float64)
    return f"{len(weights)}:{weights.sum():.9g}:{np.abs(weights).sum():.9g}"


def _save(file: Path, results: dict[str, Any]) -> None:
    _write(file, (json.dumps(results, indent=1) + "\n").encode())


def _write(file: Path, content: bytes) -> None:
    """Write a file, which appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".partial")
    part.write_bytes(content)
    part.replace(file)
