"""What the guard costs: `guarded` against the bare `repaired` network, through one server, in one run.

`python -m benchmarks.served` prints a table. The two are asked in turn, so that a noisy machine disturbs both alike;
a ratio of medians is what counts.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import tritonclient.grpc as triton_grpc
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from deploy.embedded.server import EmbeddedTriton
from exporter.badnet import MODEL_FILE, TEST_FILE, VALIDATION_FILE, BadNetOptions, cached_badnet
from exporter.export import Data, ExportOptions, export
from exporter.repair import RepairOptions
from samples.hdf5 import read_hdf5

BATCHES = (1, 8, 32)


def main(rounds: Annotated[int, typer.Option(min=3, help="How often each is asked, in turn.")] = 40) -> None:
    """Measure and print."""
    badnet = cached_badnet(BadNetOptions()).folder
    images = read_hdf5(badnet / TEST_FILE).images
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        options = ExportOptions(repair=RepairOptions(method="none"))
        export(badnet / MODEL_FILE, Data(badnet / VALIDATION_FILE), repository, options)
        with EmbeddedTriton(repository) as server, triton_grpc.InferenceServerClient(server.grpc_address) as client:
            table = Table("batch", "bare (ms)", "guarded (ms)", "guarded / bare", title=_title(rounds))
            for batch in BATCHES:
                bare, guarded = _measure(client, images[:batch], rounds)
                table.add_row(str(batch), f"{bare * 1e3:.1f}", f"{guarded * 1e3:.1f}", f"{guarded / bare:.1f}")
    Console().print(table)


def _title(rounds: int) -> str:
    return f"N = 10 overlays, median of {rounds} interleaved requests, {platform.machine()}, one caller"


def _measure(client: triton_grpc.InferenceServerClient, images: np.ndarray, rounds: int) -> tuple[float, float]:  # type: ignore[type-arg]
    """Return the median seconds of a request to `repaired` and to `guarded`."""
    tensor = triton_grpc.InferInput("image", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images)
    outputs = [triton_grpc.InferRequestedOutput(name) for name in ("label", "trojaned", "entropy")]
    asked: dict[str, Callable[[], object]] = {
        "repaired": lambda: client.infer("repaired", [tensor]),
        "guarded": lambda: client.infer("guarded", [tensor], outputs=outputs),
    }
    seconds: dict[str, list[float]] = {name: [] for name in asked}
    for ask in asked.values():
        ask()
    for _ in track(range(rounds), f"Batch {len(images)}", transient=True):
        for name, ask in asked.items():
            started = time.perf_counter()
            ask()
            seconds[name].append(time.perf_counter() - started)
    return statistics.median(seconds["repaired"]), statistics.median(seconds["guarded"])


if __name__ == "__main__":
    typer.run(main)
