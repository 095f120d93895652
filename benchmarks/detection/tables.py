"""What was measured, as Markdown and as one CSV."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from benchmarks.detection.cases import CASES, TARGETS
from benchmarks.detection.measure import SWEPT_TARGETS
from detector.statistics import Proportion

CSV_NAME = "detection.csv"


def read_results(folder: Path) -> dict[str, Any]:
    """Return what was measured of each case that was."""
    found = {name: folder / f"{name}.json" for name in CASES}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in found.items() if file.is_file()}


def tables(results: dict[str, Any]) -> str:
    """Return everything as Markdown: repairs, detectors, and STRIP by itself."""
    swept = [_strip_table(name, result) for name, result in results.items() if "strip" in result]
    return "\n\n".join([_repair_table(results), _detector_table(results), *swept])


def write_csv(folder: Path, results: dict[str, Any]) -> Path:
    """Write one line for each case, attack, detector and target; without FAR where calibration images are too few."""
    file = folder / CSV_NAME
    names = ["case", "attack", "detector", "passes", "auroc", "target_frr"]
    names += [f"{rate}{end}" for rate in ("far", "frr") for end in ("", "_low", "_high", "_images")]
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(names)
        for case, attack, detector, passes, row in _rows(results):
            for target in [*TARGETS, None]:
                key = "fixed" if target is None else f"at_{target:g}"
                if key in row:
                    far, frr = (_plain((row[key] or {}).get(rate)) for rate in ("far", "frr"))
                    writer.writerow([case, attack, detector, passes, f"{row['auroc']:.4f}", target, *far, *frr])
    return file


def _rows(results: dict[str, Any]) -> list[tuple[str, str, str, int, dict[str, Any]]]:
    """Return case, attack, detector, passes and figures of each row."""
    return [
        (case, attack, detector, found["passes"], row)
        for case, result in results.items()
        for detector, found in result.get("detectors", {}).items()
        for attack, row in found["attacks"].items()
    ]


def _detector_table(results: dict[str, Any]) -> str:
    cells = [cell for target in TARGETS for cell in (f"FAR at {100 * target:g} %", "FRR then")]
    lines = [f"| case | attack | detector | passes | AUROC | {' | '.join(cells)} |"]
    lines.append("|---" * (5 + len(cells)) + "|")
    for case, attack, detector, passes, row in _rows(results):
        start = f"| {case} | {attack} | {detector} | {passes} | {row['auroc']:.3f} | "
        if "at_0.01" not in row:
            continue
        cells = []
        for target in TARGETS:
            errors = row[f"at_{target:g}"]
            cells += [_figure(errors["far"]), _figure(errors["frr"])] if errors else ["too few images", ""]
        lines.append(start + " | ".join(cells) + " |")
    return "\n".join(lines)


def _repair_table(results: dict[str, Any]) -> str:
    lines = ["| case | repair | clean accuracy | trigger | attack success | recovered accuracy | minutes |"]
    lines.append("|---|---|---|---|---|---|---|")
    for case, result in results.items():
        for repair, rates in {"as received": result["received"], **result.get("repairs", {})}.items():
            minutes = f"{rates['seconds'] / 60:.0f}" if "seconds" in rates else ""
            for trigger, attack in rates.items():
                if isinstance(attack, dict) and "attack_success" in attack:
                    cells = [rates["clean_accuracy"], attack["attack_success"], attack["recovered_accuracy"]]
                    clean, success, recovered = map(_figure, cells)
                    lines.append(f"| {case} | {repair} | {clean} | {trigger} | {success} | {recovered} | {minutes} |")
    return "\n".join(lines)


def _strip_table(case: str, result: dict[str, Any]) -> str:
    lines = [f"**{case}**", "", "| alpha | N | trigger | AUROC | FAR at 1 % | FRR then | FAR at 5 % | FRR then |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in result.get("strip", []):
        cells = []
        for target in SWEPT_TARGETS:
            errors = row[f"at_{target:g}"]
            cells += [_figure(errors["far"]), _figure(errors["frr"])] if errors else ["too few images", ""]
        start = f"| {row['alpha']:g} | {row['overlays']} | {row['trigger']} | {row['auroc']:.3f} | "
        lines.append(start + " | ".join(cells) + " |")
    return "\n".join(lines)


def _plain(rate: dict[str, Any] | None) -> list[str]:
    if rate is None:
        return [""] * 4
    return [*(f"{rate[name]:.5f}" for name in ("rate", "low", "high")), str(rate["count"])]


def _figure(rate: dict[str, Any] | None) -> str:
    return "-" if rate is None else str(Proportion(rate["successes"], rate["count"]))
