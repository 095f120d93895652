"""The export report: `report.html`, for people, and `report.json`, every number behind it.

The page is one file: no script, nothing fetched, opens from disk, light or dark. Names of files and layers come from a
suspicious model; they are escaped, and the page's own content security policy forbids all that it does not hold.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image

from detector.strip import perturb, weighted_overlays
from exporter.repair import Step
from exporter.report.data import Examples, Layer, Part, ReportData, Scores, excerpt
from exporter.report.document import document
from exporter.report.figures import draw_figures
from exporter.report.notices import Notice, notices, percent

__all__ = ["Examples", "Layer", "Notice", "Part", "ReportData", "Scores", "Step", "excerpt", "notices", "write_report"]

HTML_NAME = "report.html"
JSON_NAME = "report.json"


def write_report(folder: Path, data: ReportData, version: str, provenance: dict[str, Any]) -> None:
    """Write `report.html` and `report.json` into `folder`, which exists.

    Args:
        folder: where to.
        data: what they tell; `exporter.report.document` documents the keys of the JSON.
        version: number of the version in the model repository.
        provenance: what the manifest says of it; plain values only.
    """
    numbers = document(data, version, provenance)
    (folder / JSON_NAME).write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / HTML_NAME).write_text(_page(numbers, data), encoding="utf-8")


def _page(numbers: dict[str, Any], data: ReportData) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("exporter.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "rate": _rate, "said": _said}
    return environment.get_template("report.html.j2").render(
        numbers,
        figures=draw_figures(numbers),
        shown_steps=excerpt(data.steps, data.kept),
        step_columns=_step_columns(numbers["repair"]["steps"]),
        pruned=any(layer["pruned_share"] for layer in numbers["layers"]),
        shown_examples=_shown_examples(numbers, data),
        pixelated=max(data.overlays.shape[1:3]) < 128,
        settings=list(_flat(numbers["provenance"].get("options", {}))),
        command_lines=[shlex.join(command) for command in numbers["commands"]],
    )


def _step_columns(steps: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return key and heading of what there is to say of the steps: not what was not measured, nor that none pruned."""
    columns = [("pruned_share", "weights pruned")] if any(step["pruned_share"] for step in steps) else []
    rates = ("clean_accuracy", "attack_success", "recovered_accuracy")
    return columns + [(name, name.replace("_", " ")) for name in rates if steps[0][name] is not None]


def _percent(share: float) -> str:
    return _unbroken(percent(share))


def _rate(proportion: dict[str, Any] | None) -> str:
    """Return a rate with its interval and sample size."""
    if proportion is None or proportion["rate"] is None:
        return "not measured"
    low, high = (f"{100 * proportion[end]:.1f}" for end in ("low", "high"))
    return _unbroken(f"{percent(proportion['rate'])} ({low} to {high}, n = {proportion['count']})")


def _said(text: str) -> Markup:
    """Return a text in which options are set as code, and no line breaks within them or before a percent sign."""
    return Markup(re.sub(r"(?<!\S)--[a-z-]+", r'<code class="whole">\g<0></code>', str(escape(_unbroken(text)))))  # noqa: S704


def _unbroken(text: str) -> str:
    """Keep a number and its percent sign, and a sample size, on one line."""
    return text.replace(" %", "\u00a0%").replace("n = ", "n\u00a0=\u00a0")


def _flat(values: dict[str, Any], prefix: str = "") -> Any:
    """Yield (dotted name, value) of nested dictionaries."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, "not set" if value is None else value


def _shown_examples(numbers: dict[str, Any], data: ReportData) -> list[dict[str, Any]]:
    """Return, for every example, its numbers and its pictures: the input, an overlay, and the blend of both."""
    weighted = weighted_overlays(data.overlays, data.alpha)
    shown = []
    for kind, examples in (("clean", data.clean_examples), ("trojaned", data.trojaned_examples)):
        if examples is None:
            continue
        for row, image in enumerate(examples.images):
            overlay = row % len(data.overlays)
            blend = perturb(image[None], weighted[overlay : overlay + 1], data.alpha)[0, 0]
            pictures = (
                (f"{kind} input {row + 1}", image),
                (f"overlay {overlay + 1}", data.overlays[overlay]),
                ("blend of both", blend.round().astype(np.uint8)),
            )
            shown.append(
                {
                    "name": f"{kind} input {row + 1}",
                    "kind": kind,
                    "pictures": [(text, _data_uri(picture)) for text, picture in pictures],
                    **numbers["examples"][kind][row],
                }
            )
    return shown


def _data_uri(image: NDArray[np.uint8]) -> str:
    """Return (height, width, channels) as a PNG in a data URI; what is neither grey nor colour shows one channel."""
    channels = image.shape[-1]
    drawn = Image.fromarray(np.ascontiguousarray(image if channels in (3, 4) else image[..., 0]))
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
