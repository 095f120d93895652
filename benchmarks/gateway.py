"""What the gateway costs: one server asked directly, over TLS of its own, and through Envoy, in turns.

Envoy has no cores of its own here: it shares those of the server and of the load. Certificates are by openssl.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import tritonclient.grpc as triton_grpc
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.files import write_whole
from benchmarks.scaling import ask, export_faces, turn
from benchmarks.speed.__main__ import RESULTS, hardware
from deploy.background import find_program
from deploy.embedded.server import EmbeddedTriton
from deploy.embedded.tls import ServerTls
from deploy.gateway.local import local_gateway
from exporter.entropies import OnProgress
from stripwire.terminal import progress

DIRECT, TLS, GATEWAY = "directly", "TLS by Triton", "TLS by the gateway"
LOADS = ((1, 1), (8, 8), (32, 4))
"""Images in a request, and how many callers ask at once."""

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def run(
    rounds: Annotated[int, typer.Option(min=1, help="How often each has its turn.")] = 7,
    seconds: Annotated[float, typer.Option(min=0.5, help="How long a turn is.")] = 2.0,
    output: Annotated[Path, typer.Option(help="Folder for gateway.json.")] = RESULTS,
) -> None:
    """Measure, print a table, and write gateway.json."""
    found: dict[str, Any] = {"hardware": hardware(), "load_average": os.getloadavg()[0], "seconds": seconds}
    with progress() as report, tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        found["loads"] = compare(repository, export_faces(repository), LOADS, rounds, seconds, report)
    write_whole(output / "gateway.json", (json.dumps(found, indent=1) + "\n").encode())
    show(found)


def compare(
    repository: Path,
    pool: NDArray[np.uint8],
    loads: Sequence[tuple[int, int]],
    rounds: int,
    seconds: float,
    report: OnProgress,
) -> list[dict[str, Any]]:
    """Return what each way did, in each round of each load.

    Args:
        repository: that is served.
        pool: (count, height, width, channels), uint8: images to send.
        loads: images in a request, and how many callers ask at once.
        rounds: how often each way has its turn.
        seconds: how long a turn is.
        report: told how far it is.
    """
    found = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as running:
        folder = Path(name)
        tls = write_certificate(folder / "tls")
        own = ServerTls(tls / "tls.crt", tls / "tls.key", tls / "ca.crt")
        servers = [running.enter_context(EmbeddedTriton(repository, tls=each)) for each in (None, own)]
        triton = servers[0].grpc_address.rpartition(":")[2]
        lasting = {"max_connection_duration: 30s": "max_connection_duration: 3600s"}
        port = running.enter_context(local_gateway(folder / "gateway", tls, triton, lasting))
        files = ((tls / file).read_bytes() for file in ("ca.crt", "tls.key", "tls.crt"))
        trusted: dict[str, Any] = {"creds": grpc.ssl_channel_credentials(*files)}
        clients = {
            DIRECT: triton_grpc.InferenceServerClient(servers[0].grpc_address),
            TLS: triton_grpc.InferenceServerClient(servers[1].grpc_address, **trusted),
            GATEWAY: triton_grpc.InferenceServerClient(f"127.0.0.1:{port}", **trusted),
        }
        for number, (batch, callers) in enumerate(loads):
            requests = [pool[start : start + batch] for start in range(0, len(pool) - batch + 1, batch)]
            for client in clients.values():
                ask(client, requests[0])
            measured = []
            for at in range(rounds):
                order = sorted(clients, reverse=at % 2 == 1)
                measured.append({way: turn(clients[way], servers, requests, callers, seconds) for way in order})
                report("Directly, and through the gateway", number * rounds + at + 1, rounds * len(loads))
            found.append({"batch": batch, "callers": callers, "rounds": measured})
        for client in clients.values():
            client.close()
    return found


def write_certificate(folder: Path) -> Path:
    """Write a certificate that is its own authority, for both sides, into a new folder, and return that."""
    openssl = find_program("openssl", "Debian's package: apt-get install openssl")
    folder.mkdir()
    kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    name = ("-subj", "/CN=benchmark", "-addext", "subjectAltName=IP:127.0.0.1")
    command = [openssl, "req", "-x509", *kind, *name, "-keyout", "tls.key", "-out", "tls.crt"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)  # noqa: S603  no shell
    shutil.copy(folder / "tls.crt", folder / "ca.crt")
    return folder


def show(found: dict[str, Any]) -> None:
    """Print what was measured."""
    console = Console(width=120)
    console.print(f"{found['hardware']}; load average before: {found['load_average']:.1f}", highlight=False)
    table = Table("batch", "callers", "asked", "images/s", "times directly", "p50 (ms)", "p99 (ms)")
    for load in found["loads"]:
        for way in (DIRECT, TLS, GATEWAY):
            figures = [each[way] for each in load["rounds"]]
            rates = [figure["images_per_second"] for figure in figures]
            pairs = zip(rates, load["rounds"], strict=True)
            ratio = statistics.median(rate / each[DIRECT]["images_per_second"] for rate, each in pairs)
            p50, p99 = (statistics.median(figure[name] for figure in figures) for name in ("p50_ms", "p99_ms"))
            row = [f"{statistics.median(rates):.0f}", f"{ratio:.2f}", f"{p50:.1f}", f"{p99:.1f}"]
            table.add_row(str(load["batch"]), str(load["callers"]), way, *row)
    console.print(table)


if __name__ == "__main__":
    app()
