"""One instance of each network with all cores, or two that share them: which answers sooner."""

from __future__ import annotations

import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from rich.table import Table
from tritonclient.grpc.model_config_pb2 import ModelConfig

from benchmarks.speed.contenders import ENSEMBLE, FUSED, Contender
from benchmarks.speed.served import Load, measure
from deploy.embedded.server import EmbeddedTriton
from exporter.badnet import MODEL_FILE, TEST_FILE, VALIDATION_FILE
from exporter.entropies import OnProgress
from exporter.export import Data, ExportOptions, export
from exporter.repair import RepairOptions
from exporter.repository import render
from model_repository.manifest import read_manifest, write_manifest
from samples.hdf5 import read_hdf5

LOADS = (Load(1, 1), Load(1, 16), Load(8, 4), Load(32, 1), Load(32, 4))


def compare_instances(badnet: Path, rounds: int, seconds: float, report: OnProgress) -> list[dict[str, Any]]:
    """Return, by layout and load, throughput and p99 with two instances in units of one, a number for each round.

    Args:
        badnet: folder of a trained BadNet, see `exporter.badnet`.
        rounds: how often each has its turn.
        seconds: how long a turn is.
        report: told how far it is.
    """
    pool = read_hdf5(badnet / TEST_FILE).images
    found: list[dict[str, Any]] = []
    for layout in (ENSEMBLE, FUSED):
        with tempfile.TemporaryDirectory() as name:
            one, two = Path(name) / "one", Path(name) / "two"
            options = ExportOptions(repair=RepairOptions(epochs=1), layout=layout)
            export(badnet / MODEL_FILE, Data(badnet / VALIDATION_FILE), one, options)
            _write_doubled(one, two)
            with EmbeddedTriton(one) as first, EmbeddedTriton(two) as second:
                servers = {"one": first, "two": second}
                both = [Contender(each, servers[each], "guarded", ("label", "trojaned")) for each in servers]
                for load in LOADS:
                    ratios: dict[str, list[float]] = {"throughput": [], "p99": []}
                    for turn in range(rounds):
                        order = both if turn % 2 else both[::-1]
                        samples = {each.name: measure(each, load, pool, seconds) for each in order}
                        ratios["throughput"].append(samples["two"].images_per_second / samples["one"].images_per_second)
                        ratios["p99"].append(samples["two"].p99_ms / samples["one"].p99_ms)
                    found.append({"layout": layout, "batch": load.batch, "callers": load.callers, **ratios})
                    report("Comparing instance counts", len(found), 2 * len(LOADS))
    return found


def instances_table(found: list[dict[str, Any]]) -> Table:
    """Return the medians."""
    table = Table(
        "layout", "batch", "callers", "throughput", "p99", title="Two instances of each network, in units of one"
    )
    for row in found:
        middle = (f"{statistics.median(row[name]):.2f}" for name in ("throughput", "p99"))
        table.add_row(row["layout"], str(row["batch"]), str(row["callers"]), *middle)
    return table


def _write_doubled(repository: Path, folder: Path) -> None:
    """Write a copy of a repository with two instances of each network."""
    shutil.copytree(repository, folder)
    manifest = read_manifest(folder)
    for path in folder.glob("*/config.pbtxt"):
        config = text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
        if config.platform == "onnxruntime_onnx":
            config.instance_group[0].count = 2
            path.write_text(render(config), encoding="utf-8")
    write_manifest(folder, manifest["versions"], manifest["active"])
