"""Draws `docs/dashboard.png`: every panel of the dashboard, from what a real Prometheus answers to its expressions.

`python -m tests.deploy.grafana.picture` trains a small BadNet, exports and serves it, and has Prometheus watch it and
its monitor under traffic, part of it an attack. Matplotlib draws, not Grafana: places, titles, legends, colours and
units are the dashboard's, the look is not Grafana's.
"""

from __future__ import annotations

import argparse
import math
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MultipleLocator, PercentFormatter
from numpy.typing import NDArray

from deploy.prometheus.local import LocalPrometheus
from exporter.badnet import BadNetOptions, train_badnet
from exporter.export import Data, ExportOptions, export
from samples.hdf5 import read_hdf5, write_hdf5
from tests.deploy.grafana import board
from tests.deploy.grafana.scene import scene, wait_until

OUTPUT = Path(__file__).parents[3] / "docs" / "dashboard.png"
VARIABLES = {"namespace": ".*", "pod": ".*", "window": "2m", "__rate_interval": "15s"}

_CELL = (0.72, 0.42)  # inches
_STEP_SECONDS = 3
_TEXT, _FAINT, _PANEL, _PAGE = "#ccccdc", "#2d3037", "#181b1f", "#111217"
_PALETTE = ("#73bf69", "#fade2a", "#5794f2", "#ff9830", "#b877d9", "#8ab8ff", "#ca95e5", "#f2495c")
_COLOURS = {"red": "#f2495c", "blue": "#5794f2", "green": "#73bf69"}


@dataclass(frozen=True)
class Line:
    """One series: its name, seconds since the beginning, values, and how the dashboard overrides its looks."""

    name: str
    seconds: NDArray[np.float64]
    values: NDArray[np.float64]
    looks: Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """What Prometheus knows of a stretch of time, in seconds since 1970."""

    prometheus: LocalPrometheus
    start: float
    end: float

    def lines(self, panel: Mapping[str, Any]) -> list[Line]:
        """Return the series of a panel."""
        found = []
        for target in board.targets(panel):
            expression = board.substituted(target.expression, VARIABLES)
            for series in self.prometheus.over(expression, self.start, self.end, _STEP_SECONDS):
                name = re.sub(r"{{(\w+)}}", lambda label: series["metric"].get(label[1], ""), target.legend).strip()  # noqa: B023
                times, values = np.array(series["values"], np.float64).T
                found.append(Line(name, times - self.start, values, _looks(panel, target.legend)))
        return found


def _looks(panel: Mapping[str, Any], legend: str) -> dict[str, Any]:
    looks = dict(panel["fieldConfig"]["defaults"].get("custom", {}))
    for override in panel["fieldConfig"]["overrides"]:
        if override["matcher"]["options"] == legend:
            looks |= {each["id"].removeprefix("custom."): each["value"] for each in override["properties"]}
    return looks


def draw(record: Record, output: Path) -> None:
    """Draw every panel where the dashboard places it."""
    everything = board.load()["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in everything)
    figure = Figure(figsize=(24 * _CELL[0], height * _CELL[1]), facecolor=_PAGE)
    for panel in everything:
        place = panel["gridPos"]
        left, top = place["x"] / 24, 1 - place["y"] / height
        if panel["type"] == "row":
            figure.text(0.008, top - 0.7 / height, panel["title"], color=_TEXT, weight="bold", size=13)
            continue
        box = (left + 0.05, top - (place["h"] - 2.2) / height, place["w"] / 24 - 0.065, (place["h"] - 3.4) / height)
        axes = figure.add_axes(box, facecolor=_PANEL)
        figure.text(left + 0.008, top - 0.75 / height, panel["title"], color=_TEXT, size=11)
        lines = record.lines(panel)
        {"timeseries": _draw_lines, "heatmap": _draw_heat_map, "state-timeline": _draw_states}[panel["type"]](
            axes, panel, lines
        )
        axes.set_xlim(0, record.end - record.start)
        axes.xaxis.set_major_locator(MultipleLocator(120))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds / 60:g} min"))
        axes.tick_params(colors=_TEXT, labelsize=8)
        axes.grid(color=_FAINT, linewidth=0.6)
        axes.spines[:].set_color(_FAINT)
        if not lines:
            axes.text(0.5, 0.5, "No data", color=_TEXT, transform=axes.transAxes, ha="center")
    figure.savefig(output, dpi=72, facecolor=_PAGE)


def _draw_lines(axes: Axes, panel: Mapping[str, Any], lines: list[Line]) -> None:
    by_name = {line.name: line for line in lines}
    stacked = panel["fieldConfig"]["defaults"]["custom"].get("stacking", {}).get("mode") == "normal"
    floor: NDArray[np.float64] | None = None
    for index, line in enumerate(lines):
        colour = _COLOURS.get(line.looks.get("color", {}).get("fixedColor"), _PALETTE[index % len(_PALETTE)])
        style = "--" if "lineStyle" in line.looks else "-"
        width, opacity = line.looks.get("lineWidth", 1), line.looks.get("fillOpacity", 0) / 100
        values, below = line.values, np.zeros_like(line.values)
        if stacked and floor is not None and len(floor) == len(values):
            values, below = values + floor, floor
        floor = values
        if (lower := by_name.get(line.looks.get("fillBelowTo", ""))) is not None:
            below = np.interp(line.seconds, lower.seconds, lower.values)
        label = line.name if width else None
        axes.plot(line.seconds, values, style, color=colour, linewidth=1.4 * width, label=label)
        axes.fill_between(line.seconds, below, values, color=colour, alpha=opacity, linewidth=0)
    scale = panel["fieldConfig"]["defaults"]["custom"].get("scaleDistribution")
    if scale is not None:
        axes.set_yscale(scale["type"], base=scale["log"], linthresh=scale["linearThreshold"])
    axes.set_ylim(bottom=0)
    if all(np.nanmax(line.values, initial=0) == 0 for line in lines):
        axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(_formatter(panel["fieldConfig"]["defaults"]["unit"]))
    if lines:
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.13),
            ncols=4,
            frameon=False,
            fontsize=8,
            labelcolor=_TEXT,
            handlelength=1.2,
            columnspacing=1.2,
        )


def _draw_heat_map(axes: Axes, _: Mapping[str, Any], lines: list[Line]) -> None:
    """Draw one row for each bucket, as Grafana does: what it counts less what the bucket under it counts."""
    lines = sorted(lines, key=lambda line: math.inf if line.name == "+Inf" else float(line.name))
    seconds = lines[0].seconds
    counts = np.diff(np.stack([line.values for line in lines]), axis=0, prepend=0.0)
    colours = LinearSegmentedColormap.from_list("oranges", [_PANEL, "#ff9830", "#fff3d6"])
    axes.pcolormesh(seconds, np.arange(len(lines) + 1), np.maximum(counts, 0)[:, 1:], cmap=colours)
    axes.set_yticks(np.arange(len(lines)) + 1, [f"{float(line.name):.3g}" for line in lines])
    for label in axes.get_yticklabels()[:-1:2]:
        label.set_visible(False)


def _draw_states(axes: Axes, _: Mapping[str, Any], lines: list[Line]) -> None:
    for row, line in enumerate(reversed(lines)):
        for state, colour in ((0, _COLOURS["red"]), (1, _COLOURS["green"])):
            axes.fill_between(
                line.seconds, row + 0.15, row + 0.85, where=line.values == state, color=colour, alpha=0.8, step="post"
            )
    axes.set_yticks(np.arange(len(lines)) + 0.5, [line.name for line in reversed(lines)])
    axes.set_ylim(0, max(1, len(lines)))


def _formatter(unit: str) -> Any:
    if unit == "percentunit":
        return PercentFormatter(1)
    if unit.startswith("suffix:"):
        return FuncFormatter(lambda value, _: f"{value:g}{unit.removeprefix('suffix:')}")
    if unit == "µs":
        return FuncFormatter(lambda value, _: f"{value / 1000:g} ms")
    if unit == "short":
        return FuncFormatter(lambda value, _: f"{value:g}")
    if unit == "d":
        return FuncFormatter(lambda value, _: f"{value:g} days")
    return EngFormatter({"s": "s", "bytes": "B", "reqps": "req/s"}.get(unit, ""))


def main() -> None:
    """Set the scene, wait, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="of traffic; the middle third is an attack")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stripwire-picture-") as name:
        folder = Path(name)
        data, repository = folder / "badnet", folder / "repository"
        train_badnet(data, BadNetOptions(identities=12, train_images=60, validation_images=60, test_images=40))
        trojaned = read_hdf5(data / "sunglasses_poisoned_data.h5")
        write_hdf5(data / "attack.h5", trojaned.take(np.arange(0, len(trojaned), 2)))
        write_hdf5(data / "sunglasses_poisoned_data.h5", trojaned.take(np.arange(1, len(trojaned), 2)))
        export(
            data / "bd_net.keras",
            Data(data / "clean_validation_data.h5", attack=data / "attack.h5"),
            repository,
            ExportOptions(),
        )
        with scene(repository, data, folder) as running:
            start = time.time()
            wait_until(start + options.seconds / 3)
            running.traffic.share = 0.5
            wait_until(start + options.seconds * 2 / 3)
            running.traffic.share = 0.1
            wait_until(start + options.seconds)
            draw(Record(running.prometheus, start, time.time()), options.output)
    print(f"{options.output} written")


if __name__ == "__main__":
    main()
