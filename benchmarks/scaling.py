"""Two embedded servers behind client-side balancing, against one: throughput, and what a server's end costs.

One gRPC channel holds the addresses of both servers and asks them in turns (`round_robin`); its retry policy sends what
came back as unavailable to the other. No proxy, and nothing of ours, is in between.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import tritonclient.grpc as triton_grpc
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tritonclient.utils import InferenceServerException

from benchmarks.files import write_whole
from benchmarks.speed.__main__ import RESULTS, hardware
from deploy.embedded.server import EmbeddedTriton
from detector.calibration import ThresholdRule
from exporter.badnet import MODEL_FILE, TEST_FILE, VALIDATION_FILE, BadNetOptions, cached_badnet
from exporter.entropies import OnProgress
from exporter.export import Data, ExportOptions, export
from exporter.repair import RepairOptions
from samples.hdf5 import read_hdf5
from stripwire.terminal import progress

FREE, PINNED = "all cores for everybody", "one core each"
_RETRIES = {
    "maxAttempts": 5,
    "initialBackoff": "0.2s",
    "maxBackoff": "5s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "NOT_FOUND"],  # of a Triton that stops: it unloads its models first
}

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def run(
    rounds: Annotated[int, typer.Option(min=1, help="How often one server and two have their turn.")] = 7,
    seconds: Annotated[float, typer.Option(min=0.5, help="How long a turn is.")] = 3.0,
    callers: Annotated[int, typer.Option(min=1, help="How many ask at once, each one request after the other.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Images in a request.")] = 8,
    output: Annotated[Path, typer.Option(help="Folder for scaling.json.")] = RESULTS,
) -> None:
    """Measure, print a table, and write scaling.json."""
    found: dict[str, Any] = {"hardware": hardware(), "load_average": os.getloadavg()[0]}
    found |= {"seconds": seconds, "callers": callers, "batch": batch}
    with progress() as report, tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        pool = export_faces(repository)
        requests = [pool[start : start + batch] for start in range(0, len(pool) - batch + 1, batch)]
        found["throughput"] = {
            setting: throughput(repository, requests, callers, rounds, seconds, setting == PINNED, report)
            for setting in (FREE, PINNED)
        }
        found["ends"] = []
        for number, (stop, retries) in enumerate(product(("stop", "SIGTERM", "SIGKILL"), (False, True))):
            found["ends"].append(end_of_a_server(repository, requests, callers, seconds, stop, retries))
            report("A server ends", number + 1, 6)
    write_whole(output / "scaling.json", (json.dumps(found, indent=1) + "\n").encode())
    show(found)


def export_faces(repository: Path) -> NDArray[np.uint8]:
    """Export the network of 100 people for detector `strip`, layout `fused`, and return faces to ask it about.

    Args:
        repository: to write.

    Returns:
        (count, height, width, channels), uint8.
    """
    badnet = cached_badnet(BadNetOptions()).folder
    rule = ThresholdRule(detector="strip")
    options = ExportOptions(repair=RepairOptions(method="none"), rule=rule, layout="fused")
    export(badnet / MODEL_FILE, Data(badnet / VALIDATION_FILE), repository, options)
    return read_hdf5(badnet / TEST_FILE).images


def throughput(
    repository: Path,
    requests: Sequence[NDArray[np.uint8]],
    callers: int,
    rounds: int,
    seconds: float,
    pinned: bool,
    report: OnProgress,
) -> list[dict[str, dict[str, float]]]:
    """Return, for each round, what one server (`"1"`) and two (`"2"`) did.

    Args:
        repository: that both serve.
        requests: what to send, each (batch, height, width, channels), uint8.
        callers: how many ask at once.
        rounds: how often each has its turn.
        seconds: how long a turn is.
        pinned: give each server a core of its own.
        report: told how far it is.
    """
    cores = sorted(os.sched_getaffinity(0))
    found: list[dict[str, dict[str, float]]] = []
    with ExitStack() as running:
        servers = [
            running.enter_context(_serving(repository, {cores[at % len(cores)]} if pinned else None)) for at in (0, 1)
        ]
        clients = {str(count): running.enter_context(balanced(servers[:count])) for count in (1, 2)}
        for client in clients.values():
            for request in requests[:8]:
                ask(client, request)
        for number in range(rounds):
            order = sorted(clients, reverse=number % 2 == 1)
            found.append({count: turn(clients[count], servers, requests, callers, seconds) for count in order})
            report(f"One server and two, {PINNED if pinned else FREE}", number + 1, rounds)
    return found


def end_of_a_server(
    repository: Path, requests: Sequence[NDArray[np.uint8]], callers: int, seconds: float, stop: str, retries: bool
) -> dict[str, Any]:
    """Stop one of two servers under load, and return what came of the requests.

    Args:
        repository: that both serve.
        requests: what to send, each (batch, height, width, channels), uint8.
        callers: how many ask at once.
        seconds: how long they ask before, and after.
        stop: the signal that ends `tritonserver`, such as `SIGKILL`, or `stop`: as `stripwire serve` ends it.
        retries: send again what came back as unavailable.
    """
    with ExitStack() as running:
        servers = [running.enter_context(_serving(repository, None)) for _ in range(2)]
        client = running.enter_context(balanced(servers, retries))
        for request in requests[:8]:
            ask(client, request)
        over, outcomes = threading.Event(), []

        def call(number: int) -> None:
            for at in range(number, 10**9, callers):
                if over.is_set():
                    return
                started = time.perf_counter()
                try:
                    ask(client, requests[at % len(requests)])
                    failure = ""
                except InferenceServerException as error:
                    failure = str(error.status())
                outcomes.append((time.perf_counter() - started, failure))

        with ThreadPoolExecutor(callers) as asking:
            calls = [asking.submit(call, number) for number in range(callers)]
            time.sleep(seconds)
            if stop == "stop":
                servers[0].stop()
            else:
                os.kill(servers[0].process_id, signal.Signals[stop])
            time.sleep(seconds)
            over.set()
            for each in calls:
                each.result()
    failed = [failure for _, failure in outcomes if failure]
    return {
        "end": stop,
        "retries": retries,
        "requests": len(outcomes),
        "failed": len(failed),
        "statuses": sorted(set(failed)),
        "slowest_ms": 1e3 * max(spent for spent, _ in outcomes),
    }


@contextmanager
def balanced(servers: Sequence[EmbeddedTriton], retries: bool = True) -> Iterator[Any]:
    """Yield one client for several servers, which asks them in turns."""
    config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if retries:
        config["methodConfig"] = [{"name": [{}], "retryPolicy": _RETRIES}]
    options = [
        ("grpc.service_config", json.dumps(config)),
        ("grpc.enable_retries", int(retries)),
        ("grpc.per_rpc_retry_buffer_size", 2**26),  # what is larger than this is not sent again
    ]
    target = f"ipv4:{','.join(server.grpc_address for server in servers)}"
    with triton_grpc.InferenceServerClient(target, channel_args=options) as client:
        yield client


def ask(client: Any, images: NDArray[np.uint8]) -> None:
    """Send one request and wait for the answer."""
    given = triton_grpc.InferInput("image", images.shape, "UINT8").set_data_from_numpy(images)
    outputs = [triton_grpc.InferRequestedOutput(name) for name in ("label", "trojaned", "entropy")]
    client.infer("guarded", [given], outputs=outputs, client_timeout=30)


def show(found: dict[str, Any]) -> None:
    """Print what was measured."""
    console = Console(width=120)
    console.print(f"{found['hardware']}; load average before: {found['load_average']:.1f}", highlight=False)
    table = Table(
        "", "servers", "images/s", "times one", "images/s a busy core", "p50 (ms)", "p99 (ms)", title="Throughput"
    )
    for setting, rounds in found["throughput"].items():
        for count in ("1", "2"):
            figures = [each[count] for each in rounds]
            rates = [figure["images_per_second"] for figure in figures]
            ratios = [rate / each["1"]["images_per_second"] for rate, each in zip(rates, rounds, strict=True)]
            by_core = [rate / figure["busy_cores"] for rate, figure in zip(rates, figures, strict=True)]
            p50, p99 = (statistics.median(figure[name] for figure in figures) for name in ("p50_ms", "p99_ms"))
            row = [
                f"{statistics.median(rates):.0f}",
                f"{statistics.median(ratios):.2f}",
                f"{statistics.median(by_core):.0f}",
            ]
            table.add_row(setting if count == "1" else "", count, *row, f"{p50:.0f}", f"{p99:.0f}")
    console.print(table)
    table = Table("one of two servers gets", "retries", "requests", "failed", "with", "slowest (ms)")
    for end in found["ends"]:
        statuses = ", ".join(end["statuses"])
        row = [end["end"], str(end["retries"]), str(end["requests"]), str(end["failed"]), statuses]
        table.add_row(*row, f"{end['slowest_ms']:.0f}")
    console.print(table)


@contextmanager
def _serving(repository: Path, cores: set[int] | None) -> Iterator[EmbeddedTriton]:
    """Serve a repository, on some cores alone if there are any given."""
    server = EmbeddedTriton(repository)
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cores or before)  # which the server inherits
        server.start()
    finally:
        os.sched_setaffinity(0, before)
    try:
        yield server
    finally:
        server.stop()


def turn(
    client: Any, servers: Sequence[EmbeddedTriton], requests: Sequence[NDArray[np.uint8]], callers: int, seconds: float
) -> dict[str, float]:
    """Ask for so long, and return what came of it."""
    busy = _cpu_seconds(servers)
    begun = time.perf_counter()

    def call(number: int) -> list[float]:
        times = []
        at = number
        while (started := time.perf_counter()) < begun + seconds:
            ask(client, requests[at % len(requests)])
            times.append(time.perf_counter() - started)
            at += callers
        return times

    with ThreadPoolExecutor(callers) as asking:
        spent = np.concatenate([*asking.map(call, range(callers))])
    lasted = time.perf_counter() - begun
    p50, p99 = np.quantile(spent, [0.5, 0.99])
    return {
        "images_per_second": len(spent) * len(requests[0]) / lasted,
        "p50_ms": 1e3 * float(p50),
        "p99_ms": 1e3 * float(p99),
        "busy_cores": (_cpu_seconds(servers) - busy) / lasted,
    }


def _cpu_seconds(servers: Sequence[EmbeddedTriton]) -> float:
    processes = [psutil.Process(server.process_id) for server in servers]
    family = [member for process in processes for member in (process, *process.children(recursive=True))]
    return float(sum(sum(member.cpu_times()[:2]) for member in family))


if __name__ == "__main__":
    app()
