"""The numbers of a report, as `report.json` holds them; figures and page are drawn from these alone.

Keys of the JSON, format 2. Rates and shares are 0..1, entropies in bits; null is what was not measured. A *proportion*
is {rate, low, high, successes, count}: the rate, its exact 95 % interval, and what it rests on.

- `format`: 2.
- `model`, `version`: the file that came in, the number of the version that was written.
- `notices`: [{level, text}], the most important first; level is `alarm` or `note`.
- `networks`: {original, repaired}, each {clean_accuracy, attack_success, recovered_accuracy}: proportions.
- `repair`: {tried, changed, kept, stopped, goal, steps: [{name, clean_accuracy, attack_success, recovered_accuracy,
  pruned_share}]}; the repair succeeded if attack success is under `goal`.
- `layers`: [{name, kind, output_shape, parameters, pruned_share}].
- `guard`: {detector, threshold_bits, threshold_plain_bits, threshold_nll, method, target_frr, frr_low, frr_high,
  images, note, alpha, overlays, frr, far, auroc, auroc_low, auroc_high}. `frr_low` to `frr_high` is the 95 % range that
  calibration expects, or what `note` says of it; the proportions `frr` (held-out clean images rejected) and `far`
  (trojaned images accepted) were measured, of the verdicts; AUROC, with its 95 % interval, is that of the p-values, or
  of the entropies for the detector `strip`.
- `by_entropy`: {frr, far, auroc, auroc_low, auroc_high}: likewise, of the threshold on the entropy alone. An image's
  entropy is the mean over the overlays here and below, and the lower median for the detector `consensus`.
- `opinions`: {held_out, trojaned}, each {bits, plain_bits, nlls}: of each image its entropy, the entropy of the
  original network's answer to it as it came, and its nll in nats, null where the repaired network is not asked. Null
  for the detector `strip`.
- `histogram`: {edges_bits, calibration, held_out, trojaned}: images in each bin; one edge more than bins.
- `roc`: {by_entropy, guard}, each {frr, detection_rate}: the corners of the curve, by entropy and by p-value; detection
  rate is 1 - FAR. Null without attack samples, and `guard` for the detector `strip`.
- `thresholds`: {threshold_bits, frr, frr_low, frr_high, far}: at each threshold, on held-out and trojaned images; the
  interval holds at each threshold by itself.
- `overlays`: {count, share, clean_low_bits, trojaned_high_bits, auroc}: with the first `count` overlays only, the
  entropy under which `share` of the clean images lie, the one over which `share` of the trojaned images lie, and AUROC.
- `examples`: {clean, trojaned}, each [{entropy_bits, rejected, original_label, repaired_label, true_label}].
- `parts`: [{name, images, sha256}].
- `commands`: [[argument]].
- `provenance`: what the manifest says of this version.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.scores import score_bits
from detector.statistics import auroc, auroc_interval
from detector.strip import is_trojaned
from exporter.report.data import LEAST_BITS, Examples, ReportData, lowest_if_broken, share
from exporter.report.notices import notices

FORMAT = 2
_ELSEWHERE = ("calibration_frr", "histogram")  # of a calibration: what else is told here stands for them
_BINS = 50
_THRESHOLDS = 80
_OVERLAY_COUNTS = 50
_USUAL_SHARE = 0.05


def document(data: ReportData, version: str, provenance: dict[str, Any]) -> dict[str, Any]:
    """Return all numbers of the report, fit for strict JSON; the keys are documented above.

    Args:
        data: what the report tells.
        version: number of the version in the model repository.
        provenance: what the manifest says of it; plain values only.
    """
    calibration, threshold = data.calibration, data.calibration.threshold_bits
    detector = calibration.detector
    held_out, trojaned = data.held_out_bits, data.trojaned_bits
    far = data.false_acceptance
    guard_roc = None
    if trojaned is None:
        entropy_far = area = entropy_area = None
    else:
        entropy_far, entropy_area = share(~is_trojaned(trojaned, threshold)), auroc(-held_out, -trojaned)
        area = entropy_area
        if detector != "strip" and data.trojaned is not None:
            p_values = [calibration.regions.p_value(evidence.scores()) for evidence in (data.held_out, data.trojaned)]
            area, guard_roc = auroc(-p_values[0], -p_values[1]), _roc(*p_values)
    written = {
        "format": FORMAT,
        "model": data.model_name,
        "version": version,
        "notices": [asdict(notice) for notice in notices(data)],
        "networks": {"original": data.before.to_json(), "repaired": data.after.to_json()},
        "repair": {
            "tried": data.tried,
            "changed": data.changed,
            "kept": data.kept,
            "stopped": data.stopped,
            "goal": data.attack_success_goal,
            "steps": [asdict(step) for step in data.steps],
        },
        "layers": [asdict(layer) for layer in data.layers],
        "guard": {
            **{name: value for name, value in calibration.to_json().items() if name not in _ELSEWHERE},
            "alpha": data.alpha,
            "overlays": len(data.overlays),
            "frr": data.false_rejection.to_json(),
            "far": None if far is None else far.to_json(),
            **_area(area, data),
        },
        "by_entropy": {
            "frr": share(is_trojaned(held_out, threshold)).to_json(),
            "far": None if entropy_far is None else entropy_far.to_json(),
            **_area(entropy_area, data),
        },
        "opinions": _opinions(data),
        "histogram": _histogram(_scores(data.calibration_entropies_bits, detector), held_out, trojaned, detector),
        "roc": None if trojaned is None else {"by_entropy": _roc(held_out, trojaned), "guard": guard_roc},
        "thresholds": _thresholds(held_out, trojaned, threshold, detector),
        "overlays": _by_overlays(data),
        "examples": {
            "clean": _examples(data.clean_examples),
            "trojaned": None if data.trojaned_examples is None else _examples(data.trojaned_examples),
        },
        "parts": [asdict(part) for part in data.parts],
        "commands": data.commands,
        "provenance": provenance,
    }
    plain: dict[str, Any] = _plain(written)
    return plain


def _histogram(
    calibration: NDArray[np.float64],
    held_out: NDArray[np.float64],
    trojaned: NDArray[np.float64] | None,
    detector: str,
) -> dict[str, Any]:
    groups = {"calibration": calibration, "held_out": held_out, "trojaned": trojaned}
    measured = np.concatenate([group for group in groups.values() if group is not None])
    edges = _spread(detector, _lowest(measured), measured.max(initial=0.0) or 1.0, _BINS + 1)
    # What is not finite was put lowest: it is counted in the lowest bin.
    counts = {
        name: None if group is None else np.histogram(group.clip(edges[0]), edges)[0] for name, group in groups.items()
    }
    return {"edges_bits": edges, **counts}


def _area(area: float | None, data: ReportData) -> dict[str, float | None]:
    if area is None or data.trojaned_bits is None:
        return dict.fromkeys(("auroc", "auroc_low", "auroc_high"))
    low, high = auroc_interval(area, len(data.held_out_bits), len(data.trojaned_bits))
    return {"auroc": area, "auroc_low": low, "auroc_high": high}


def _opinions(data: ReportData) -> dict[str, Any] | None:
    if data.calibration.detector == "strip":
        return None
    return {
        name: None if part is None else vars(part)
        for name, part in (("held_out", data.held_out), ("trojaned", data.trojaned))
    }


def _scores(entropies_bits: NDArray[np.floating[Any]], detector: str) -> NDArray[np.float64]:
    """Return each image's entropy as the detector takes it, from that under each overlay, (images, overlays)."""
    return lowest_if_broken(score_bits(entropies_bits.astype(np.float64), detector))


def _roc(clean: NDArray[np.floating[Any]], trojaned: NDArray[np.floating[Any]]) -> dict[str, Any]:
    """Return the corners of the curve of scores, (images,) each, of which the low ones are suspicious."""
    thresholds = np.unique(np.concatenate([clean, trojaned]))
    rates = np.stack([_at_or_under(group, thresholds) for group in (clean, trojaned)])
    rates = np.concatenate([np.zeros((2, 1)), rates], axis=1)
    # Only corners: a point between two others on a straight horizontal or vertical line says nothing.
    steps = np.diff(rates, axis=1) > 0
    straight = (steps[:, :-1] == steps[:, 1:]).all(axis=0) & (steps.sum(axis=0) == 1)[1:]
    rates = rates[:, np.concatenate([[True], ~straight, [True]])]
    return {"frr": rates[0], "detection_rate": rates[1]}


def _thresholds(
    clean: NDArray[np.float64], trojaned: NDArray[np.float64] | None, threshold_bits: float, detector: str
) -> dict[str, Any]:
    highest = max(1.6 * threshold_bits, float(np.quantile(clean, 0.3, method="higher")))
    # Under the lowest clean entropy, there is one order of magnitude to show how FAR goes on.
    thresholds = _spread(detector, 0.1 * min(threshold_bits, _lowest(clean)), highest or 1.0, _THRESHOLDS)
    rates = [share(clean <= each) for each in thresholds]
    return {
        "threshold_bits": thresholds,
        "frr": [rate.rate for rate in rates],
        "frr_low": [rate.low for rate in rates],
        "frr_high": [rate.high for rate in rates],
        "far": None if trojaned is None else 1.0 - _at_or_under(trojaned, thresholds),
    }


def _lowest(entropies: NDArray[np.float64]) -> float:
    return float(entropies[np.isfinite(entropies)].min(initial=np.inf))


def _spread(detector: str, lowest: float, highest: float, count: int) -> NDArray[np.float64]:
    """Return so many entropies up to the highest: medians spread over orders of magnitude, from the lowest."""
    if detector == "strip":
        return np.linspace(0.0, highest, count)
    highest = max(highest, 2 * LEAST_BITS)
    spread: NDArray[np.float64] = np.geomspace(min(max(lowest, LEAST_BITS), highest / 2), highest, count)
    return spread


def _at_or_under(entropies: NDArray[np.floating[Any]], thresholds: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return the share of entropies, (images,), at or under each threshold, (thresholds,)."""
    return np.asarray(np.searchsorted(np.sort(entropies), thresholds, side="right") / len(entropies))


def _by_overlays(data: ReportData) -> dict[str, Any]:
    share = _USUAL_SHARE if data.calibration.target_frr is None else data.calibration.target_frr
    total = len(data.overlays)
    counts = np.unique(np.linspace(1, total, min(total, _OVERLAY_COUNTS)).round().astype(int))
    detector = data.calibration.detector
    clean = [_scores(data.held_out_entropies_bits[:, :count], detector) for count in counts]
    low = [np.quantile(entropies, share, method="lower") for entropies in clean]
    high = separation = None
    if data.trojaned_entropies_bits is not None:
        trojaned = [_scores(data.trojaned_entropies_bits[:, :count], detector) for count in counts]
        high = [np.quantile(entropies, 1.0 - share, method="higher") for entropies in trojaned]
        separation = [auroc(-one, -other) for one, other in zip(clean, trojaned, strict=True)]
    return {
        "count": counts,
        "share": share,
        "clean_low_bits": low,
        "trojaned_high_bits": high,
        "auroc": separation,
    }


def _examples(examples: Examples) -> list[dict[str, Any]]:
    truth = examples.true_labels
    return [
        {
            "entropy_bits": entropy,
            "rejected": rejected,
            "original_label": examples.original_labels[row],
            "repaired_label": examples.repaired_labels[row],
            "true_label": None if truth is None else truth[row],
        }
        for row, (entropy, rejected) in enumerate(zip(examples.entropies_bits, examples.rejected, strict=True))
    ]


def _plain(value: Any) -> Any:
    """Return `value` of Python's own types: no arrays, no number that is not finite, no text that UTF-8 cannot hold."""
    if isinstance(value, dict):
        return {_plain(str(name)): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):  # a file's name may hold bytes that are no UTF-8
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return value
