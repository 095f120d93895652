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

from benchmarks.detection.cases import JOINED, OVERLAYS, SEED, TARGETS, Material
from benchmarks.detection.detectors import REVISION, Measured, compared, judge
from benchmarks.detection.sweeps import ALPHAS, blend_sweep, strip_sweep
from benchmarks.files import write_whole
from exporter.convert import repaired_graph, to_onnx
from exporter.entropies import OnProgress
from exporter.repair import RepairOptions, repair_network
from exporter.training import score
from samples.types import Samples


def measure(material: Material, file: Path, *, images: int, only: tuple[str, ...] = (), report: OnProgress) -> None:
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
    if results.get("revision") != REVISION:
        results |= {"revision": REVISION, "detectors": {}}
    if material.sweep and "strip" not in results:
        results["strip"] = strip_sweep(material, images, report)
        _save(file, results)
    if material.sweep and "blends" not in results:
        results["blends"] = blend_sweep(material, report)
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


def _measure_repair(material: Material, method: str, results: dict[str, Any], report: OnProgress) -> None:
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
    write_whole(kept, graph.SerializeToString())
    # What was found out with the network of before is not true of this one.
    results.setdefault("detectors", {}).pop(f"consensus + {method}", None)
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


def _fingerprint(model: keras.Model) -> str:
    weights = np.concatenate([weight.ravel() for weight in model.get_weights()]).astype(np.float64)
    return f"{len(weights)}:{weights.sum():.9g}:{np.abs(weights).sum():.9g}"


def _save(file: Path, results: dict[str, Any]) -> None:
    write_whole(file, (json.dumps(results, indent=1) + "\n").encode())
