"""What was measured, as tables and as one picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import LogLocator
from rich.table import Table

from benchmarks.speed.contenders import BARE, CONTENDERS, ENSEMBLE, FUSED, NAIVE

_COLOURS = dict(
    zip(CONTENDERS, ("#333333", "#a8a8a8", "#9a6a2f", "#14507a", "#5aa7d6", "#d3b483", "#86b77e"), strict=True)
)

_MOST_LINEAR = 30
"""Where a cost is higher, the others would lie on top of each other."""


def ratios(rounds: list[dict[str, dict[str, float]]], contender: str, figure: str) -> list[float]:
    """Return a figure of a contender in units of the bare network of the same round; of throughput, the cost.

    Args:
        rounds: by contender, the fields of `benchmarks.speed.served.Sample`.
        contender: one of `CONTENDERS`.
        figure: one of the fields.
    """
    pairs = [(each[contender][figure], each[BARE][figure]) for each in rounds]
    return [bare / own if figure == "images_per_second" else own / bare for own, bare in pairs]


def served_table(served: list[dict[str, Any]]) -> Table:
    """Return what each contender costs through the server."""
    columns = ("batch", "callers", "traffic", "", "blends", "images/s", "cost / bare", "p50 (ms)", "p50 / bare")
    table = Table(*columns, "p99 (ms)", "CPU ms an image", "CPU / bare", "MiB", title="Through the server")
    for load in served:
        rounds = load["rounds"]
        for number, name in enumerate(CONTENDERS):
            middle = {figure: statistics.median(each[name][figure] for each in rounds) for figure in rounds[0][name]}
            cost, p50, cpu = (
                f"{statistics.median(ratios(rounds, name, figure)):.1f}"
                for figure in ("images_per_second", "p50_ms", "cpu_ms_per_image")
            )
            start = [str(load["batch"]), str(load["callers"]), load["traffic"]] if number == 0 else ["", "", ""]
            table.add_row(
                *start,
                name,
                f"{load['blends'][name]:.1f}" if name in load["blends"] else "",
                f"{middle['images_per_second']:.0f}",
                cost,
                f"{middle['p50_ms']:.1f}",
                p50,
                f"{middle['p99_ms']:.1f}",
                f"{middle['cpu_ms_per_image']:.2f}",
                cpu,
                f"{middle['memory_mib']:.0f}",
                end_section=name == CONTENDERS[-1],
            )
    return table


def offline_table(offline: dict[str, list[float]]) -> Table:
    """Return what STRIP costs an image without a server."""
    table = Table("", "ms an image", "/ bare", "/ ours, fused", title="STRIP without a server, N = 10, clean faces")
    for name, times in offline.items():
        by_bare, by_ours = (
            statistics.median(own / other for own, other in zip(times, offline[unit], strict=True))
            for unit in ("bare network", "ours, fused")
        )
        table.add_row(name, f"{statistics.median(times):.2f}", f"{by_bare:.1f}", f"{by_ours:.2f}")
    return table


def varied_table(varied: dict[str, list[dict[str, float]]]) -> Table:
    """Return what an image costs by number of overlays, batch and classes."""
    table = Table("", "", "ensemble / bare", "fused / bare", title="STRIP without a server, nothing exits early")
    for name, rows in varied.items():
        for row in rows:
            table.add_row(name, f"{row[name]:g}", f"{row[ENSEMBLE]:.1f}", f"{row[FUSED]:.1f}")
    return table


def targets(found: dict[str, Any]) -> Table:
    """Return what was aimed at, and what was reached."""
    table = Table("target", "aimed at", "reached", "", title="Targets, N = 10, clean traffic")

    def row(what: str, aim: str, reached: float, met: bool) -> None:
        table.add_row(what, aim, f"{reached:.1f}", "[green]met[/green]" if met else "[red]missed[/red]")

    loads = {(load["batch"], load["callers"]): load["rounds"] for load in found["served"] if load["traffic"] == "clean"}
    if (32, 1) in loads:
        for name, most in ((FUSED, 6.0), (ENSEMBLE, 14.0)):
            cost = statistics.median(ratios(loads[32, 1], name, "images_per_second"))
            row(f"{name}, batch 32: cost / bare", f"<= {most:g}", cost, cost <= most)
        speeds = [(each[FUSED], each[NAIVE]) for each in loads[32, 1]]
        faster = statistics.median(own["images_per_second"] / other["images_per_second"] for own, other in speeds)
        row("fused, batch 32: throughput / naive ensemble", ">= 3", faster, faster >= 3)
    if (1, 1) in loads:
        p50 = statistics.median(ratios(loads[1, 1], FUSED, "p50_ms"))
        row("fused, one image: p50 / bare", "<= 6", p50, p50 <= 6)
    for name, least in (("published loop, Keras", 50), ("ART, Keras", 8)) if "offline" in found else ():
        times = zip(found["offline"][name], found["offline"]["ours, fused"], strict=True)
        faster = statistics.median(other / own for other, own in times)
        row(f"{name} / ours, fused, an image", f">= {least}", faster, faster >= least)
    if "soak" in found:
        for name, memory in found["soak"]["memory_mib"].items():
            grown = growth(memory)
            row(f"{name}: memory grown over {found['soak']['requests']:,} requests, %", "<= 2", grown, grown <= 2)
    return table


def growth(memory: list[float]) -> float:
    """Return by how much the last tenth is over the second tenth, in per cent."""
    tenth = len(memory) // 10
    return 100.0 * (statistics.median(memory[-tenth:]) / statistics.median(memory[tenth : 2 * tenth]) - 1.0)


def draw(file: Path, found: dict[str, Any]) -> None:
    """Write the picture: what each contender costs in units of the bare network, and what the cost hangs on."""
    figure = Figure(figsize=(11, 7 if "varied" in found else 3.8), facecolor="white", layout="constrained")
    rows = GridSpec(2 if "varied" in found else 1, 1, figure)
    above = figure.add_subfigure(rows[0])
    clean = [load for load in found["served"] if load["traffic"] == "clean"]
    batches = sorted({load["batch"] for load in clean})
    for axes, batch in zip(above.subplots(1, len(batches), sharey=True, squeeze=False)[0], batches, strict=True):
        own = sorted((load for load in clean if load["batch"] == batch), key=lambda load: int(load["callers"]))
        callers = [load["callers"] for load in own]
        for name in CONTENDERS[1:]:
            costs = [statistics.median(ratios(load["rounds"], name, "images_per_second")) for load in own]
            axes.plot(callers, costs, "o-", color=_COLOURS[name], label=name)
        _finish(axes, f"batch {batch}", "callers", callers)
    if above.axes[0].get_ylim()[1] > _MOST_LINEAR:
        above.axes[0].set_yscale("log")
        above.axes[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        above.axes[0].yaxis.set_major_formatter("{x:g}")
    above.axes[0].set_ylabel("time for an image / bare network")
    above.legend(*above.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    if "varied" in found:
        below = figure.add_subfigure(rows[1])
        for axes, (name, costs) in zip(below.subplots(1, len(found["varied"])), found["varied"].items(), strict=True):
            for way in (ENSEMBLE, FUSED):
                axes.plot([row[name] for row in costs], [row[way] for row in costs], "o-", color=_COLOURS[way])
            _finish(axes, f"by {name}, without a server and early exit", name, [row[name] for row in costs])
        below.axes[0].set_ylabel("time for an image / bare network")
    for axes in figure.get_axes():
        if axes.get_yscale() == "linear":
            axes.set_ylim(bottom=0)  # now that all is drawn: it ends the scaling
    figure.savefig(file, dpi=110)


def _finish(axes: Axes, title: str, what: str, ticks: Iterable[float]) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(what)
    axes.set_xscale("log")
    axes.set_xticks([*ticks], [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
