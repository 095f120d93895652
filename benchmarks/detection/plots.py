"""What was measured, as one picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.detection.cases import CASES
from benchmarks.detection.tables import HEADLINE, Row

PLOT_NAME = "detection.png"
SHOWN = {
    "strip 0.5": ("#9a6a2f", "o"),
    "strip 0.7": ("#d9a441", "o"),
    "consensus + bounds": ("#5aa7d6", "D"),
    "consensus + distill": ("#14507a", "D"),
    "confidence": ("#b0568c", "v"),
    "ART's STRIP": ("#a8a8a8", "s"),
    "SCALE-UP": ("#a9cc9c", "^"),
    "SCALE-UP + clean data": ("#4f8a3c", "^"),
}
"""The detectors that are drawn: colour and marker."""
_INK, _PALE = "#333333", "#e4e4e4"
_TICKS = (0, 0.2, 1, 5, 20, 50, 100)


def draw(folder: Path, found: Iterable[Row]) -> Path:
    """Write a picture of the FAR at the headline target, in per cent with its 95 % interval, and return its path.

    A line for each attack on a data set; of several seeds each has its marker.
    """
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        case = CASES[row.case]
        attack = f"two: {row.attack}" if case.attack == "two" else case.attack
        lines.setdefault((case.data, attack), []).append(row)
    data = list(dict.fromkeys(name for name, _ in lines))
    sizes = [sum(name == each for name, _ in lines) for each in data]
    figure = Figure(figsize=(9, 1.6 + 0.34 * sum(sizes) + 0.35 * len(data)), facecolor="white", layout="constrained")
    axes = figure.subplots(len(data), 1, sharex=True, squeeze=False, height_ratios=[size + 0.6 for size in sizes])[:, 0]
    for name, axis in zip(data, axes, strict=True):
        own = {attack: of_attack for (each, attack), of_attack in lines.items() if each == name}
        _panel(axis, name, own)
    handles = [
        axes[0].plot([], [], marker, color=colour, label=detector)[0] for detector, (colour, marker) in SHOWN.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    axes[-1].set_xlabel(f"trojaned inputs accepted at a target FRR of {100 * HEADLINE:g} %, in %", fontsize=9)
    file = folder / PLOT_NAME
    figure.savefig(file, dpi=130)
    return file


def _panel(axis: Axes, title: str, attacks: dict[str, list[Row]]) -> None:
    """Draw one data set: a line for each attack."""
    height = 0.7 / len(SHOWN)
    for line, of_attack in enumerate(attacks.values()):
        for number, (detector, (colour, marker)) in enumerate(SHOWN.items()):
            rates = [rate for row in of_attack if row.detector == detector and (rate := row.rate(HEADLINE, "far"))]
            for index, rate in enumerate(rates):
                place = line + (number - (len(SHOWN) - 1) / 2 + (index - (len(rates) - 1) / 2) * 0.25) * height
                axis.plot([100 * rate.low, 100 * rate.high], [place, place], color=colour, linewidth=1.0, alpha=0.6)
                axis.plot(100 * rate.rate, place, marker, color=colour, markersize=3.5)
    axis.set_xscale("symlog", linthresh=1.0)
    axis.set_xlim(-0.05, 110)
    axis.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS], fontsize=8)
    axis.minorticks_off()
    axis.axvline(100 * HEADLINE, color=_INK, linewidth=0.6, linestyle=":")
    axis.set_yticks(range(len(attacks)), list(attacks), fontsize=8)
    axis.set_ylim(len(attacks) - 0.5, -0.5)
    axis.set_title(title, loc="left", fontsize=9, fontweight="bold", color=_INK)
    axis.grid(axis="x", color=_PALE, linewidth=0.6)
    for boundary in range(1, len(attacks)):
        axis.axhline(boundary - 0.5, color=_PALE, linewidth=0.6)
    axis.tick_params(length=0, colors=_INK)
    axis.spines[["top", "right", "left"]].set_visible(False)
