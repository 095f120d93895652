"""The report's figures, as SVG that takes its colours from the page, each with a sentence that says what it shows."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray

from exporter.report.data import LEAST_BITS
from exporter.report.notices import percent

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"

# Drawn in these colours, none of which is otherwise used, and shown in the page's, which differ in light and dark.
_TEXT, _GRID, _CLEAN, _TROJANED, _RECOVERED = "#0000f0", "#0000f1", "#0000f2", "#0000f3", "#0000f4"
_PAGE_COLOURS = {
    _TEXT: "currentColor",
    _GRID: "var(--grid)",
    _CLEAN: "var(--clean)",
    _TROJANED: "var(--trojaned)",
    _RECOVERED: "var(--recovered)",
}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
}
_WIDTH_INCHES = 4.0  # so that text keeps its size on a telephone, and is no giant's on a desk
_NAMES_SHOWN = 8


@dataclass(frozen=True)
class Drawn:
    """A figure of the report.

    Attributes:
        name: an identifier.
        title: of a few words.
        sentence: what it shows, with the number that matters; or why there is nothing to show.
        svg: the drawing, without fixed size; None where nothing was measured.
    """

    name: str
    title: str
    sentence: str
    svg: Markup | None


def draw_figures(numbers: dict[str, Any]) -> dict[str, Drawn]:
    """Return the figures by name; `numbers` is what `exporter.report.document.document` returned."""
    drawings = (_repair, _histogram, _opinions, _roc, _thresholds, _overlays)
    with mpl.rc_context(_STYLE):
        return {figure.name: figure for figure in (draw(numbers) for draw in drawings)}


def _repair(numbers: dict[str, Any]) -> Drawn:
    repair, title = numbers["repair"], "Accuracy while the network is repaired"
    steps, names = repair["steps"], [step["name"] for step in repair["steps"]]
    if len(steps) == 1:
        return Drawn("repair", title, f"There is nothing to draw: {repair['stopped']}.", None)
    kept = names.index(repair["kept"])
    first, chosen = steps[0], steps[kept]
    sentence = (
        f"The network of step “{repair['kept']}” was kept: on clean images it is right on "
        f"{percent(chosen['clean_accuracy'])} (as received {percent(first['clean_accuracy'])})"
    )
    if chosen["attack_success"] is None:
        sentence += "; without attack samples, the attack's success was not measured"
    else:
        sentence += (
            f", and the attack works on {percent(chosen['attack_success'])} ({percent(first['attack_success'])})"
        )
    lines = (
        ("clean accuracy", "clean_accuracy", _CLEAN, "o-"),
        ("attack success", "attack_success", _TROJANED, "s-"),
        ("recovered accuracy", "recovered_accuracy", _RECOVERED, "^-"),
    )

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for label, key, colour, style in lines:
            if first[key] is not None:
                axes.plot([step[key] for step in steps], style, color=colour, label=label)
        axes.axvline(kept, color=_TEXT, linestyle="--", linewidth=1, label="kept")
        every = -(-len(names) // _NAMES_SHOWN)
        ticks = [index for index in range(0, len(names), every) if index == kept or abs(index - kept) >= every]
        ticks = sorted({*ticks, kept})
        axes.set_xticks(ticks, [names[index] for index in ticks], rotation=35, ha="right", rotation_mode="anchor")
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylabel("share of images")
        _legend(figure)

    return Drawn("repair", title, sentence + ".", _svg("repair", 3.3, draw))


def _histogram(numbers: dict[str, Any]) -> Drawn:
    histogram, guard = numbers["histogram"], numbers["by_entropy"]
    edges, threshold = histogram["edges_bits"], numbers["guard"]["threshold_bits"]
    groups = {"clean": histogram["held_out"]}
    sentence = (
        f"What lies at or left of the threshold of {_bits(threshold)} is rejected: "
        f"{percent(guard['frr']['rate'])} of {guard['frr']['count']} clean images that had no part in choosing it"
    )
    if guard["far"] is None:
        sentence += "; there were no attack samples to compare with"
    else:
        groups["trojaned"] = histogram["trojaned"]
        sentence += f", and {percent(1 - guard['far']['rate'])} of {guard['far']['count']} trojaned ones"

    def draw(figure: Figure) -> None:
        rows = figure.subplots(len(groups), sharex=True, squeeze=False)[:, 0]
        for axes, (name, counts) in zip(rows, groups.items(), strict=True):
            colour = _CLEAN if name == "clean" else _TROJANED
            label = f"{name}, held out" if name == "clean" else name
            axes.stairs(counts, edges, fill=True, color=colour, alpha=0.75, label=f"{label} (n = {sum(counts)})")
            if name == "clean":
                scale = sum(counts) / sum(histogram["calibration"])
                scaled = np.multiply(histogram["calibration"], scale)
                axes.stairs(scaled, edges, color=_TEXT, linewidth=0.9, label="calibration, scaled to it")
            threshold_label = f"threshold {_bits(threshold)}" if axes is rows[-1] else None
            axes.axvline(threshold, color=_TEXT, linestyle="--", linewidth=1, label=threshold_label)
            axes.set_ylabel("images")
            axes.yaxis.get_major_locator().set_params(integer=True, nbins=4)
        _entropy_axis(rows[-1], numbers)
        _legend(figure)

    height = 2.6 if len(groups) == 1 else 3.4
    return Drawn("histogram", "Entropy of clean and trojaned inputs", sentence + ".", _svg("histogram", height, draw))


def _opinions(numbers: dict[str, Any]) -> Drawn:
    opinions, guard, title = numbers["opinions"], numbers["guard"], "What the guard looks at, for each input"
    if opinions is None:
        return Drawn("opinions", title, "STRIP looks at the entropy alone.", None)
    bits, plain_bits, nats = (guard[f"threshold_{name}"] for name in ("bits", "plain_bits", "nll"))
    criteria = [f"at or under {_bits(bits)} for its blends"]
    if plain_bits is not None:
        criteria.append(f"at or under {_bits(plain_bits)} as it came, of which the original network is too sure")
    if nats is not None:
        criteria.append(
            f"at or over {nats:.2f} nats, where the repaired network gives too little probability to what the original "
            "sees"
        )
    sentence = (
        f"An input is rejected {', or '.join(criteria)}. Together this rejects {percent(guard['frr']['rate'])} of "
        "clean inputs"
    )
    if guard["far"] is not None:
        sentence += f" and {percent(1 - guard['far']['rate'])} of trojaned ones"
    blends = ("bits", bits, "entropy (median, bits)")
    plain = ("plain_bits", plain_bits, "entropy as it came (bits)")
    panels = [(blends, plain)]
    if nats is not None:
        panels = [(blends, ("nlls", nats, "nll (nats)")), (plain, ("nlls", nats, ""))]

    def draw(figure: Figure) -> None:
        drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False, gridspec_kw={"wspace": 0.1})[0]
        for axes, panel in zip(drawn, panels, strict=True):
            _scatter(axes, opinions, panel, labelled=axes is drawn[0])
        _legend(figure)

    return Drawn("opinions", title, sentence + ".", _svg("opinions", 3.4, draw))


def _scatter(
    axes: Axes, opinions: dict[str, Any], panel: Sequence[tuple[str, float | None, str]], *, labelled: bool
) -> None:
    """Draw one score of each input against another, with their thresholds.

    Args:
        axes: to draw on.
        opinions: of held-out and trojaned images.
        panel: key, threshold and label of the score along each axis.
        labelled: whether the legend is to have what is drawn.
    """
    for name, label, colour, marker in (
        ("trojaned", "trojaned", _TROJANED, "x"),
        ("held_out", "clean, held out", _CLEAN, "o"),
    ):
        if opinions[name] is not None:
            points = [_drawable(opinions[name][key], key) for key, _, _ in panel]
            first = label if labelled else None
            axes.plot(*points, marker, color=colour, markersize=3, alpha=0.5, label=first, clip_on=False)
    for (key, threshold, what), line, axis in zip(panel, (axes.axvline, axes.axhline), "xy", strict=True):
        if threshold is not None:
            first = "thresholds" if labelled and axis == "x" else None
            line(threshold, color=_TEXT, linestyle="--", linewidth=1, label=first)
        axes.set(**{f"{axis}label": what})
        if key == "nlls":
            # What both agree on is crowded at 0, and what they do not spreads over orders of magnitude.
            axes.set_yscale("symlog", linthresh=0.1)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_ylim(bottom=0)
        else:
            axes.set(**{f"{axis}scale": "log"})
            ticks = axes.xaxis if axis == "x" else axes.yaxis
            ticks.set_major_locator(LogLocator(numticks=4))
            ticks.set_major_formatter(_decade)
            ticks.set_minor_formatter(NullFormatter())


def _drawable(values: Sequence[float | None], key: str) -> NDArray[np.float64]:
    """Return scores to draw; on a logarithmic axis entropies of 0 bits stand at its lower end."""
    numbers = np.array([np.nan if value is None else value for value in values])
    return numbers if key == "nlls" else np.maximum(numbers, LEAST_BITS)


def _bits(value: float) -> str:
    return f"{value:.3g} bits"


def _roc(numbers: dict[str, Any]) -> Drawn:
    roc, guard, title = numbers["roc"], numbers["guard"], "Trojaned inputs caught against clean inputs rejected"
    if roc is None:
        return Drawn("roc", title, "Not measured: there were no attack samples.", None)
    caught = 1 - guard["far"]["rate"]
    sentence = (
        f"AUROC is {guard['auroc']:.4f} ({guard['auroc_low']:.4f} to {guard['auroc_high']:.4f}; 1 separates perfectly, "
        "0.5 is chance); at the threshold in use "
        f"{percent(caught)} of trojaned inputs are caught (FAR {percent(guard['far']['rate'])}) for "
        f"{percent(guard['frr']['rate'])} of clean ones rejected (FRR)."
    )

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        by_entropy, together = roc["by_entropy"], roc["guard"]
        alone = "every threshold" if together is None else "by entropy alone"
        axes.plot(by_entropy["frr"], by_entropy["detection_rate"], color=_CLEAN, label=alone, clip_on=False)
        if together is not None:
            detection_rate = together["detection_rate"]
            axes.plot(together["frr"], detection_rate, color=_RECOVERED, label="all together", clip_on=False)
        chance = np.linspace(0, 1, 200)
        axes.plot(chance, chance, ":", color=_TEXT, linewidth=1, label="chance")
        used = "the one in use"
        axes.plot(guard["frr"]["rate"], caught, "D", color=_TROJANED, markersize=6, label=used, clip_on=False)
        ticks = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)
        # Linear up to 1 %, logarithmic beyond: what matters is at the left, and 0 must be on it.
        axes.set_xscale("symlog", linthresh=0.01, linscale=0.5)
        axes.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("FRR: clean inputs rejected")
        axes.set_ylabel("trojaned inputs caught (1 - FAR)")
        _legend(figure)

    return Drawn("roc", title, sentence, _svg("roc", 3.1, draw))


def _thresholds(numbers: dict[str, Any]) -> Drawn:
    curve, in_use = numbers["thresholds"], numbers["guard"]["threshold_bits"]
    at, frr = curve["threshold_bits"], numbers["by_entropy"]["frr"]
    sentence = (
        f"At {_bits(in_use)}, {percent(frr['rate'])} of {frr['count']} held-out clean images are "
        f"rejected (95 % interval {percent(frr['low'])} to {percent(frr['high'])}); a higher threshold catches "
        "more and rejects more."
    )

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.fill_between(at, curve["frr_low"], curve["frr_high"], color=_CLEAN, alpha=0.25, linewidth=0)
        axes.plot(at, curve["frr"], color=_CLEAN, label="FRR, 95 % interval shaded")
        if curve["far"] is not None:
            axes.plot(at, curve["far"], "-.", color=_TROJANED, label="FAR")
        axes.axvline(in_use, color=_TEXT, linestyle="--", linewidth=1, label="in use")
        axes.set_xlim(at[0], at[-1])
        highest = min(1.0, 1.05 * max(*curve["frr_high"], 0.1))
        # FAR begins at 1: the axis reaches up to it only where it would never come into sight.
        axes.set_ylim(0, highest if curve["far"] is None or min(curve["far"]) < highest else 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _entropy_axis(axes, numbers, "threshold")
        axes.set_ylabel("share of images")
        _legend(figure)

    return Drawn("thresholds", "FRR against threshold", sentence, _svg("thresholds", 2.9, draw))


def _overlays(numbers: dict[str, Any]) -> Drawn:
    curve, title = numbers["overlays"], "Number of overlays against separation"
    counts, share = curve["count"], curve["share"]
    if len(counts) == 1:
        return Drawn("overlays", title, "There is nothing to compare: STRIP uses a single overlay.", None)
    sentence = (
        f"With all {counts[-1]} overlays, {percent(share)} of clean inputs have less than "
        f"{_bits(curve['clean_low_bits'][-1])} (with one alone, {_bits(curve['clean_low_bits'][0])})"
    )
    separation = curve["auroc"]
    if separation is not None:
        sentence += f"; AUROC is {separation[-1]:.4f} (with one alone, {separation[0]:.4f})"

    def draw(figure: Figure) -> None:
        rows = figure.subplots(1 if separation is None else 2, sharex=True, squeeze=False)[:, 0]
        low = np.array(curve["clean_low_bits"], float)
        rows[0].plot(counts, low, "o-", color=_CLEAN, label=f"clean: {100 * share:g} % lie under")
        if separation is not None:
            high = np.array(curve["trojaned_high_bits"], float)
            rows[0].plot(counts, high, "s-", color=_TROJANED, label=f"trojaned: {100 * share:g} % lie over")
            rows[1].plot(counts, separation, "^-", color=_RECOVERED, label="AUROC")
            rows[1].set_ylabel("AUROC")
            room = 0.1 * (1 - min(separation)) + 0.001
            rows[1].set_ylim(min(separation) - room, max(separation) + room)
            rows[1].ticklabel_format(useOffset=False)
        rows[0].set_ylabel("entropy (bits)")
        rows[0].set_ylim(bottom=0)
        rows[-1].xaxis.get_major_locator().set_params(integer=True)
        rows[-1].set_xlabel("overlays used")
        _legend(figure)

    return Drawn("overlays", title, sentence + ".", _svg("overlays", 2.6 if separation is None else 3.4, draw))


def _entropy_axis(axes: Axes, numbers: dict[str, Any], what: str = "entropy") -> None:
    """Label the axis of entropies or thresholds: logarithmic for medians."""
    median = numbers["guard"]["detector"] == "consensus"
    axes.set_xlabel(f"{what} ({'median, ' if median else ''}bits)")
    if median:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(_decade)


def _decade(value: float, _: float = 0.0) -> str:
    """Return a power of ten for an axis: as short as can be, or neighbours run into each other."""
    exponent = round(math.log10(value))
    return f"{value:g}" if exponent >= -3 else "10" + str(exponent).translate(_SUPERSCRIPT)


def _legend(figure: Figure) -> None:
    """Put what the lines are above the axes, where it hides none."""
    figure.legend(loc="outside upper center", ncols=2, borderaxespad=0.2)


def _svg(name: str, height_inches: float, draw: Callable[[Figure], None]) -> Markup:
    """Return what `draw` draws as SVG to put into a page: no size, no colours of its own, no identifier met twice."""
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    draw(figure)
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())  # noqa: S314 - written by matplotlib a line ago
    for child in root.findall(f"{_SVG}metadata"):
        root.remove(child)
    for element in root.iter():
        # In a page, SVG needs neither namespaces nor the older name of a link.
        element.tag = element.tag.removeprefix(_SVG)
        if link := element.attrib.pop(_LINK, None):
            element.set("href", link.replace("#", f"#{name}-"))
        if identifier := element.get("id"):
            element.set("id", f"{name}-{identifier}")
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title", "aria-describedby": f"{name}-sentence"}
    text = ElementTree.tostring(root, encoding="unicode").replace("url(#", f"url(#{name}-")
    # Our own colours only, nothing of the data passes here: tick names were escaped above.
    text = re.sub("|".join(_PAGE_COLOURS), lambda match: _PAGE_COLOURS[match[0]], text)
    return Markup(text)  # noqa: S704
