"""What the fused layout saves: its graph against those of the ensemble and the bare network, in one process.

`python -m benchmarks.layouts REPOSITORY IMAGES` prints a table; the repository comes from `stripwire export --layout
fused`, the images are HDF5. All have their turn in every round, so that a noisy machine disturbs them alike; a ratio of
medians is what counts. The server's own work is left out; `benchmarks.served` has it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from detector.serving import read_overlays
from detector.strip import entropy_bits, perturb, weighted_overlays
from exporter.entropies import open_graph
from model_repository.manifest import verify_repository
from samples.hdf5 import read_hdf5

BATCHES = (1, 8, 32)


def main(
    repository: Path,
    images: Path,
    rounds: Annotated[int, typer.Option(min=3, help="How often each has its turn.")] = 21,
) -> None:
    """Measure and print."""
    manifest = verify_repository(repository)
    version = manifest["versions"][manifest["active"]]
    folders = {name: repository / name / str(number) for name, number in version["models"].items()}
    badnet, repaired, fused = (open_graph(folders[name] / "model.onnx") for name in ("badnet", "repaired", "fused"))
    overlays, alpha = read_overlays(folders["strip_perturb"])
    weighted = weighted_overlays(overlays, alpha)

    def ensemble(batch: NDArray[np.uint8]) -> None:
        (probabilities,) = badnet.run(None, {"perturbations": perturb(batch, weighted, alpha)})
        entropy_bits(probabilities)
        repaired.run(None, {"image": batch})

    ways: dict[str, Callable[[NDArray[np.uint8]], Any]] = {
        "bare": lambda batch: repaired.run(None, {"image": batch}),
        "ensemble": ensemble,
        "fused": lambda batch: fused.run(None, {"image": batch}),
    }
    pool = read_hdf5(images).images
    title = f"N = {len(overlays)} overlays, stages {version['fused']['stages']}, median of {rounds} interleaved rounds"
    table = Table("batch", "bare (ms)", "ensemble / bare", "fused / bare", "blends in fused", title=title)
    for size in BATCHES:
        chosen = pool[np.random.default_rng(0).choice(len(pool), (rounds, size))]
        blends = np.mean([fused.run(["sentinel_perturbations"], {"image": batch})[0].mean() for batch in chosen])
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for batch in chosen:
            for name, way in ways.items():
                started = time.perf_counter()
                way(batch)
                seconds[name].append(time.perf_counter() - started)
        bare, by_ensemble, by_fused = (statistics.median(seconds[name]) for name in ways)
        ratios = (f"{by_ensemble / bare:.1f}", f"{by_fused / bare:.1f}", f"{blends:.1f}")
        table.add_row(str(size), f"{bare * 1e3:.1f}", *ratios)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
