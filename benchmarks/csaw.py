"""STRIP alone on the real CSAW HackML 2020 BadNets and faces, through the served path.

`python -m benchmarks.csaw DATA` prints a table; DATA is a folder with `csaw/` in it. The 170 clean faces are split:
what overlays, calibration and validation use is never evaluated on. They are too few to repair 1283 classes with, so
the networks are served as they came.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from client.api import GuardedClient
from client.evaluation import Evaluation, evaluate
from deploy.embedded.server import EmbeddedTriton
from exporter.export import ExportOptions, export
from exporter.preprocessing import Preprocessing
from exporter.repair import RepairOptions
from samples.hdf5 import read_hdf5, write_hdf5

NETWORKS = {"sunglasses": ("sunglasses_bd_weights.h5", "unit"), "lab 3": ("lab3_bd_weights.h5", "raw")}
ALPHAS = (0.5, 0.7)
EXPORT_FACES = 100


def main(
    data: Annotated[Path, typer.Argument(help="Folder with csaw/ in it.")],
    seed: Annotated[int, typer.Option(help="Of the splits.")] = 0,
) -> None:
    """Measure and print."""
    table = Table("network", "alpha", "clean accuracy", "attack success", "AUROC", "FAR", "FRR")
    cases = [(name, alpha) for name in NETWORKS for alpha in ALPHAS]
    for name, alpha in track(cases, "Exporting and asking", transient=True):
        result = _measure(data / "csaw", *NETWORKS[name], alpha, seed)
        rates = (result.original.clean_accuracy, result.original.attack_success)
        errors = (result.guarded.false_acceptance, result.guarded.false_rejection)
        table.add_row(name, f"{alpha:g}", *map(str, rates), f"{result.auroc:.3f}", *map(str, errors))
    Console(width=200).print(table)


def _measure(faces: Path, weights: str, scale: str, alpha: float, seed: int) -> Evaluation:
    clean, trojaned = read_hdf5(faces / "clean.h5"), read_hdf5(faces / "sunglasses_poisoned.h5")
    order = np.random.default_rng(seed).permutation(len(clean))
    with tempfile.TemporaryDirectory() as folder:
        seen, repository = Path(folder) / "seen.h5", Path(folder) / "repository"
        write_hdf5(seen, clean.take(order[:EXPORT_FACES]))
        options = ExportOptions(
            preprocessing=Preprocessing(scale),
            architecture="deepid",
            alpha=alpha,
            repair=RepairOptions(method="none"),
            seed=seed,
        )
        export(faces / weights, seen, repository, options)
        with EmbeddedTriton(repository) as server, GuardedClient(server.grpc_address) as client:
            return evaluate(client, clean.take(order[EXPORT_FACES:]), trojaned)


if __name__ == "__main__":
    typer.run(main)
