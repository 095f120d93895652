"""The command; see the package."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from numpy.typing import NDArray
from rich.console import Console

import benchmarks.speed
from benchmarks.files import write_whole
from benchmarks.speed.contenders import ENSEMBLE, FUSED, export_all, serve_all
from benchmarks.speed.gpu_options import compare_options, options_table
from benchmarks.speed.results import draw, offline_table, served_table, targets, varied_table
from benchmarks.speed.served import Load, blends, check_where, graphics_card, measure
from benchmarks.speed.served import soak as soak_server
from exporter.entropies import OnProgress
from stripwire.terminal import progress

RESULTS = Path(__file__).parents[1] / "results"
LOADS = (*(Load(batch, callers) for batch in (1, 8, 32) for callers in (1, 4, 16)), Load(32, 1, "1 % trojaned"))
_TROJANED_SHARE = 0.01
_IMAGES = "images.npz"

app = typer.Typer(add_completion=False, help=benchmarks.speed.__doc__)


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    rounds: Annotated[int, typer.Option(min=1, help="How often each has its turn.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long a turn is.")] = 1.5,
    output: Annotated[Path, typer.Option(help="Folder for speed.json and speed.png.")] = RESULTS,
    prepared: Annotated[
        Path | None, typer.Option(help="Folder of `prepare`: measure the servers alone, without TensorFlow.")
    ] = None,
) -> None:
    """Measure everything but the soak, and print it."""
    if context.invoked_subcommand is not None:
        return
    found = _read(output)
    if prepared is not None and "offline" in found:
        raise typer.BadParameter(f"{output} has figures of another machine, expected a folder of its own: --output")
    found |= {"hardware": hardware(), "rounds": rounds, "seconds": seconds}
    with progress() as report:
        if prepared is None:
            from benchmarks.speed.offline import compare, vary

            found["offline"], found["varied"] = compare(_badnet(report), rounds, report), vary(rounds, report)
        with _ready(prepared, report) as folder:
            found["served"] = _served(folder, rounds, seconds, report)
    _write(output, found)
    draw(output / "speed.png", found)
    show(found)


@app.command()
def prepare(folder: Annotated[Path, typer.Argument(help="Folder to write, for a machine without TensorFlow.")]) -> None:
    """Train and export what the servers are measured with."""
    with progress() as report:
        _prepare(folder, report)


@app.command()
def soak(
    requests: Annotated[int, typer.Option(min=1000, help="Of one image, of each layout.")] = 100_000,
    callers: Annotated[int, typer.Option(min=1, help="How many ask at once.")] = 4,
    output: Annotated[Path, typer.Option(help="Folder with speed.json.")] = RESULTS,
) -> None:
    """Watch the server's memory over many requests."""
    with progress() as report, _ready(None, report) as folder, serve_all(folder) as running:
        pool = _images(folder)["clean"]
        memory = {
            each.name: soak_server(each, pool, requests, callers, report)
            for each in running
            if each.name in (ENSEMBLE, FUSED)
        }
    found = _read(output) | {"soak": {"requests": requests, "callers": callers, "memory_mib": memory}}
    _write(output, found)
    show(found)


@app.command()
def instances(
    rounds: Annotated[int, typer.Option(min=1, help="How often each has its turn.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long a turn is.")] = 1.0,
    output: Annotated[Path, typer.Option(help="Folder with speed.json.")] = RESULTS,
) -> None:
    """Compare one instance of each network with two."""
    from benchmarks.speed.instances import compare_instances, instances_table

    with progress() as report:
        found = _read(output) | {"instances": compare_instances(_badnet(report), rounds, seconds, report)}
    _write(output, found)
    Console().print(instances_table(found["instances"]))


@app.command()
def gpu_options(
    prepared: Annotated[Path | None, typer.Option(help="Folder of `prepare`, on a machine without TensorFlow.")] = None,
    output: Annotated[Path, typer.Option(help="Folder with speed.json.")] = RESULTS,
) -> None:
    """Compare onnxruntime's options on a GPU."""
    if graphics_card() is None:
        raise SystemExit("error: no GPU that CuPy and onnxruntime can use; pip install 'stripwire[gpu]'")
    with progress() as report, _ready(prepared, report) as folder:
        found = _read(output) | {"gpu_options": compare_options(folder, _images(folder)["clean"], report)}
    _write(output, found)
    Console(width=140).print(options_table(found["gpu_options"]))


def show(found: dict[str, Any]) -> None:
    """Print the tables of what was measured."""
    console = Console(width=140)
    if "served" in found:
        console.print(found["hardware"], highlight=False)
        console.print(served_table(found["served"]))
        if "offline" in found:
            console.print(offline_table(found["offline"]))
            console.print(varied_table(found["varied"]))
        console.print(targets(found))


def hardware() -> str:
    """Return on what this runs."""
    memory = psutil.virtual_memory().total / 2**30
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.machine())
    return f"{len(os.sched_getaffinity(0))} cores of {name}, {memory:.0f} GiB, {graphics_card() or 'no GPU'}"


def _badnet(report: OnProgress) -> Path:
    from exporter.badnet import BadNetOptions, cached_badnet

    return cached_badnet(BadNetOptions(), on_progress=report).folder


@contextmanager
def _ready(prepared: Path | None, report: OnProgress) -> Iterator[Path]:
    """Yield a folder that was prepared, or is prepared now, for as long as it is used."""
    if prepared is not None:
        yield prepared
        return
    with tempfile.TemporaryDirectory() as name:
        _prepare(Path(name), report)
        yield Path(name)


def _prepare(folder: Path, report: OnProgress) -> None:
    """Write the repositories, and the images to ask them with."""
    from exporter.badnet import TEST_FILE, trojaned_file
    from samples.hdf5 import read_hdf5

    badnet = _badnet(report)
    folder.mkdir(parents=True, exist_ok=True)
    clean, trojaned = (read_hdf5(badnet / name).images for name in (TEST_FILE, trojaned_file("sunglasses")))
    np.savez(folder / _IMAGES, clean=clean, trojaned=trojaned)
    export_all(badnet, folder)


def _images(folder: Path) -> dict[str, NDArray[np.uint8]]:
    with np.load(folder / _IMAGES) as stored:
        return dict(stored)


def _served(folder: Path, rounds: int, seconds: float, report: OnProgress) -> list[dict[str, Any]]:
    images = _images(folder)
    clean, trojaned = images["clean"], images["trojaned"]
    some = trojaned[: max(1, round(len(clean) * _TROJANED_SHARE / (1 - _TROJANED_SHARE)))]
    pools = {"clean": clean, "1 % trojaned": np.concatenate([clean, some])}
    found: list[dict[str, Any]] = [asdict(load) | {"rounds": []} for load in LOADS]
    with serve_all(folder) as running:
        check_where(running)
        for load, into in zip(LOADS, found, strict=True):
            into["blends"] = blends(running, pools[load.traffic])
        for turn in range(rounds):
            for number, (load, into) in enumerate(zip(LOADS, found, strict=True)):
                # Nobody is always the one who is asked after the same other one.
                order = np.random.default_rng([turn, number]).permutation(len(running))
                samples = {running[at].name: measure(running[at], load, pools[load.traffic], seconds) for at in order}
                into["rounds"].append({name: asdict(sample) for name, sample in samples.items()})
                report("Through the server", turn * len(LOADS) + number + 1, rounds * len(LOADS))
    return found


def _read(output: Path) -> dict[str, Any]:
    file = output / "speed.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _write(output: Path, found: dict[str, Any]) -> None:
    write_whole(output / "speed.json", (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    app()
