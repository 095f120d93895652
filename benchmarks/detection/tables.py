"""What was measured, as Markdown and as one CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.detection.cases import CASES, JOINED, TARGETS
from benchmarks.detection.detectors import compared
from benchmarks.detection.sweeps import SWEPT_TARGETS, WEIGHTS
from detector.scores import DETECTORS
from detector.statistics import Proportion, auroc_interval

CSV_NAME = "detection.csv"
HEADLINE = 0.01
"""The target false rejection rate by which detectors are compared at a glance."""

ENTROPIES = {"strip": "mean (strip)", "consensus": "median (of consensus)"}
"""What each detector makes of the entropies of blends; sweeps over blends look at that alone."""

Results = dict[str, Any]
"""What was measured of each case, by its name."""


@dataclass(frozen=True)
class Row:
    """What a detector makes of an attack.

    Attributes:
        case: name of the case.
        attack: one of its attacks.
        detector: name of the detector.
        passes: forward passes for an input.
        figures: AUROC, and FAR and FRR at each target.
    """

    case: str
    attack: str
    detector: str
    passes: int
    figures: dict[str, Any]

    def rate(self, target: float | None, name: str) -> Proportion | None:
        """Return the `far` or the `frr` at a target, or at the detector's own threshold; None where there is none."""
        errors = self.figures.get("fixed" if target is None else f"at_{target:g}")
        return None if errors is None else Proportion(errors[name]["successes"], errors[name]["count"])


def read_results(folder: Path) -> Results:
    """Return what was measured of each case that was."""
    found = {name: folder / f"{name}.json" for name in CASES}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in found.items() if file.is_file()}


def rows(results: Results) -> Iterator[Row]:
    """Yield a row for each case, detector and attack."""
    order = [*compared(dict.fromkeys(JOINED), classes_known=True)]
    for case, result in results.items():
        for detector, found in sorted(result.get("detectors", {}).items(), key=lambda pair: order.index(pair[0])):
            for attack, figures in found["attacks"].items():
                yield Row(case, attack, detector, found["passes"], figures)


def write_csv(folder: Path, results: Results) -> Path:
    """Write a line for each row and target, without rates where calibration images are too few for it.

    A line without a target is a threshold that the detector comes with.
    """
    file = folder / CSV_NAME
    names = ["case", "attack", "detector", "passes", "auroc", "auroc_low", "auroc_high", "target_frr"]
    names += [f"{rate}{end}" for rate in ("far", "frr") for end in ("", "_low", "_high", "_images")]
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(names)
        for row in rows(results):
            for target in [*TARGETS, None]:
                if ("fixed" if target is None else f"at_{target:g}") in row.figures:
                    far, frr = (_plain(row.rate(target, name)) for name in ("far", "frr"))
                    start = [
                        row.case,
                        row.attack,
                        row.detector,
                        row.passes,
                        *(f"{end:.4f}" for end in _area(row.figures)),
                    ]
                    writer.writerow([*start, "" if target is None else target, *far, *frr])
    return file


def tables(results: Results) -> str:
    """Return everything as Markdown: repairs, detectors, and STRIP by itself."""
    swept = [_strip_table(name, result) for name, result in results.items() if "strip" in result]
    found = [*rows(results)]
    calibrated = [row for row in found if f"at_{HEADLINE:g}" in row.figures]
    passes = {row.detector: row.passes for row in found}
    costs = ", ".join(f"{detector} {count}" for detector, count in passes.items())
    return "\n\n".join(
        [
            _repair_table({name: result for name, result in results.items() if CASES[name].whole}),
            f"Forward passes for an input, beside the one of the network that is served: {costs}.",
            _matrix("AUROC (95 % interval)", calibrated, lambda row: _told_area(row.figures)),
            *(_target_table(calibrated, target) for target in TARGETS),
            _seeds_table(calibrated),
            _fixed_table(found),
            *(_weights_table(results, detector) for detector in DETECTORS),
            _choice_table(results),
            "What repairs leave of the attacks of the other cases",
            _repair_table({name: result for name, result in results.items() if not CASES[name].whole}),
            *swept,
        ]
    )


def _area(figures: dict[str, Any]) -> tuple[float, float, float]:
    """Return the AUROC, and the ends of its 95 % interval."""
    errors = next(errors for errors in figures.values() if isinstance(errors, dict))
    return figures["auroc"], *auroc_interval(figures["auroc"], errors["frr"]["count"], errors["far"]["count"])


def _told_area(figures: dict[str, Any]) -> str:
    area, low, high = _area(figures)
    return f"{area:.3f} ({low:.3f}-{high:.3f})"


def _target_table(found: list[Row], target: float) -> str:
    def cell(row: Row) -> str:
        far, frr = row.rate(target, "far"), row.rate(target, "frr")
        if far is None or frr is None:
            return "too few images"
        return f"{100 * far.rate:.1f} ({100 * far.low:.1f}-{100 * far.high:.1f}) [{100 * frr.rate:.1f}]"

    return _matrix(f"FAR at a target FRR of {100 * target:g} %, in % (95 % interval) [the FRR then]", found, cell)


def _seeds_table(found: Iterable[Row]) -> str:
    """Return the FAR with each seed, of attacks that were measured with several."""
    lines: dict[tuple[str, str], dict[str, dict[int, str]]] = {}
    for row in found:
        far = row.rate(HEADLINE, "far")
        if far is not None:
            case = CASES[row.case]
            attack = f"two: {row.attack}" if case.attack == "two" else case.attack
            of_line = lines.setdefault((case.data, attack), {})
            of_line.setdefault(row.detector, {})[case.seed] = f"{100 * far.rate:.1f}"
    several = {line: of_line for line, of_line in lines.items() if max(map(len, of_line.values())) > 1}
    detectors = list(dict.fromkeys(detector for of_line in several.values() for detector in of_line))
    table = [f"| networks | attack | {' | '.join(detectors)} |", "|---" * (2 + len(detectors)) + "|"]
    for (data, attack), of_line in several.items():
        cells = ["; ".join(of_line.get(detector, {}).values()) or "-" for detector in detectors]
        table.append(f"| {data} | {attack} | {' | '.join(cells)} |")
    title = f"FAR at a target FRR of {100 * HEADLINE:g} %, in %: a network for each seed"
    return "\n".join([title, "", *table])


def _repair_table(results: Results) -> str:
    lines = ["| case | repair | clean accuracy | attack | attack success | recovered accuracy | minutes |"]
    lines.append("|---|---|---|---|---|---|---|")
    for case, result in results.items():
        repairs = {"as received": result["received"]}
        for repair, rates in result.get("repairs", {}).items():
            kept = {"as received": " (kept nothing)", "bounded": " (kept the bounds)" * (repair != "bounds")}
            repairs[repair + kept.get(rates["kept"], "")] = rates
        for repair, rates in repairs.items():
            minutes = f"{rates['seconds'] / 60:.0f}" if "seconds" in rates else ""
            for trigger, attack in rates.items():
                if isinstance(attack, dict) and "attack_success" in attack:
                    cells = [rates["clean_accuracy"], attack["attack_success"], attack["recovered_accuracy"]]
                    clean, success, recovered = map(_figure, cells)
                    lines.append(f"| {case} | {repair} | {clean} | {trigger} | {success} | {recovered} | {minutes} |")
    return "\n".join(lines)


def _matrix(title: str, found: Iterable[Row], cell: Callable[[Row], str]) -> str:
    """Return a table with a line for each case and attack, and a column for each detector."""
    lines: dict[str, dict[str, str]] = {}
    for row in found:
        lines.setdefault(f"{row.case} | {row.attack}", {})[row.detector] = cell(row)
    detectors = list(dict.fromkeys(detector for line in lines.values() for detector in line))
    table = [f"| case | attack | {' | '.join(detectors)} |", "|---" * (2 + len(detectors)) + "|"]
    table += [f"| {name} | {' | '.join(line.get(each, '-') for each in detectors)} |" for name, line in lines.items()]
    return "\n".join([title, "", *table])


def _fixed_table(found: list[Row]) -> str:
    lines = [
        "Thresholds that detectors come with",
        "",
        "| case | attack | detector | FAR | FRR |",
        "|---|---|---|---|---|",
    ]
    for row in found:
        far, frr = row.rate(None, "far"), row.rate(None, "frr")
        if far is not None:
            lines.append(f"| {row.case} | {row.attack} | {row.detector} | {far} | {frr} |")
    return "\n".join(lines)


def _strip_table(case: str, result: dict[str, Any]) -> str:
    lines = [f"**{case}**", "", "| alpha | N | trigger | AUROC | FAR at 1 % | FRR then | FAR at 5 % | FRR then |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in result["strip"]:
        cells = []
        for target in SWEPT_TARGETS:
            errors = row[f"at_{target:g}"]
            cells += [_figure(errors["far"]), _figure(errors["frr"])] if errors else ["too few images", ""]
        start = f"| {row['alpha']:g} | {row['overlays']} | {row['trigger']} | {_told_area(row)} | "
        lines.append(start + " | ".join(cells) + " |")
    return "\n".join(lines)


def _weights_table(results: Results, detector: str) -> str:
    """Return the FAR at each weight of the input, and which weight has the highest threshold."""
    lines = [
        f"{ENTROPIES[detector]}: FAR in % at a target FRR of {100 * HEADLINE:g} % by weight of the input",
        "",
        f"| case | attack | {' | '.join(f'{weight:g}' for weight in WEIGHTS)} | highest threshold at |",
        "|---" * (3 + len(WEIGHTS)) + "|",
    ]
    for (case, trigger), found in _blends(results, detector, "random").items():
        errors = [row[f"at_{HEADLINE:g}"] for row in found]
        highest = max(zip(errors, WEIGHTS, strict=True), key=lambda pair: float(pair[0]["threshold_bits"]))[1]
        rates = " | ".join(f"{100 * each['far']['rate']:.1f}" for each in errors)
        lines.append(f"| {case} | {trigger} | {rates} | {highest:g} |")
    return "\n".join(lines)


def _choice_table(results: Results) -> str:
    """Return the FAR with overlays that chance chose, and with those that clean images chose."""
    lines = [f"FAR at a target FRR of {100 * HEADLINE:g} % [the FRR then] by choice of the ten overlays", ""]
    lines += ["| case | attack | entropies | random | greedy |", "|---|---|---|---|---|"]
    for detector in DETECTORS:
        by_chance = _blends(results, detector, "random")
        for (case, trigger), (greedy,) in _blends(results, detector, "greedy").items():
            random = next(row for row in by_chance[case, trigger] if row["alpha"] == greedy["alpha"])
            errors = [row[f"at_{HEADLINE:g}"] for row in (random, greedy)]
            cells = [f"{_figure(each['far'])} [{100 * each['frr']['rate']:.1f}]" for each in errors]
            lines.append(f"| {case} | {trigger} | {ENTROPIES[detector]} {greedy['alpha']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _blends(results: Results, detector: str, choice: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the rows of a detector and a choice of overlays, by case and attack."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case, result in results.items():
        for row in result.get("blends", []):
            if (row["detector"], row["choice"]) == (detector, choice):
                found.setdefault((case, row["trigger"]), []).append(row)
    return found


def _plain(rate: Proportion | None) -> list[str]:
    return [""] * 4 if rate is None else [f"{rate.rate:.5f}", f"{rate.low:.5f}", f"{rate.high:.5f}", str(rate.count)]


def _figure(rate: dict[str, Any] | None) -> str:
    return "-" if rate is None else str(Proportion(rate["successes"], rate["count"]))
