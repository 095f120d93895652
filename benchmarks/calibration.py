"""What calibration costs beside the forward passes that it cannot do without.

`python -m benchmarks.calibration` measures STRIP's entropies of 10,000 faces with 10 overlays, as an export does, and
as many bare forward passes of the same graph, in turn; it prints images per second and the ratio of the two.
"""

from __future__ import annotations

import os
import platform
import time
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from detector.strip import perturb, weighted_overlays
from exporter.badnet import MODEL_FILE, TEST_FILE, VALIDATION_FILE, BadNetOptions, cached_badnet
from exporter.convert import sentinel_graph, to_onnx
from exporter.entropies import entropy_matrix, open_graph
from exporter.keras_files import load_model
from exporter.preprocessing import Preprocessing
from samples.hdf5 import read_hdf5

_OVERLAYS = 10
_ALPHA = 0.5
_BATCH = 32
_PIECE = 500


def main(images: Annotated[int, typer.Option(min=1000, help="How many images to calibrate on.")] = 10_000) -> None:
    """Measure and print."""
    folder = cached_badnet(BadNetOptions()).folder
    faces = np.concatenate([read_hdf5(folder / name).images for name in (VALIDATION_FILE, TEST_FILE)])
    overlays, faces = faces[:_OVERLAYS], np.resize(faces[_OVERLAYS:], (images, *faces.shape[1:]))
    session = open_graph(sentinel_graph(to_onnx(load_model(folder / MODEL_FILE)), Preprocessing()).SerializeToString())
    perturbations = perturb(faces[:_BATCH], weighted_overlays(overlays, _ALPHA), _ALPHA)
    seconds = {"calibration": 0.0, "bare": 0.0}
    for start in track(range(0, images, _PIECE), "Measuring", transient=True):
        piece = faces[start : start + _PIECE]
        started = time.perf_counter()
        entropy_matrix(session, piece, overlays, _ALPHA).mean(axis=1)
        between = time.perf_counter()
        for done in range(0, len(piece), _BATCH):
            session.run(None, {"perturbations": perturbations[: len(piece) - done]})
        seconds["calibration"] += between - started
        seconds["bare"] += time.perf_counter() - between
    title = f"{images} images, N = {_OVERLAYS}, {os.cpu_count()} cores, {platform.machine()}, pieces in turn"
    table = Table("", "images per second", title=title)
    table.add_row("bare forward passes", f"{images / seconds['bare']:.0f}")
    table.add_row("calibration", f"{images / seconds['calibration']:.0f}")
    table.add_row("ratio", f"{seconds['bare'] / seconds['calibration']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
