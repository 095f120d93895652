"""What the tests of the monitor share: repositories in both layouts, canaries for them, and the running command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from client.monitor.record import Feedback
from deploy.embedded.server import EmbeddedTriton
from samples.canaries import Canaries, write_canaries
from tests.conftest import wait_for

ROOT = Path(__file__).parents[3]
SHAPE, CLASSES = (8, 7, 3), 5
TOKEN = "a feedback token".replace(" ", "-")


def canaries(classes: int = CLASSES, **promises: Any) -> Canaries:
    """Return four clean canaries and two trojaned ones, which the small server rejects all."""
    images = np.random.default_rng(7).integers(0, 256, (6, *SHAPE), dtype=np.uint8)
    return Canaries(images, np.arange(6) >= 4, classes, **promises)


@pytest.fixture
def canary_file(tmp_path: Path) -> Path:
    path = tmp_path / "canaries.npz"
    write_canaries(path, canaries(version="1", calibrated_at=1.7e9, frr_upper=0.08, far_upper=0.2))
    return path


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository that rejects everything: version 1 is an ensemble, 2 is fused."""
    from detector.calibration import fixed_threshold
    from exporter.convert import repaired_graph, sentinel_graph, to_onnx
    from exporter.fused import fuse
    from exporter.preprocessing import Preprocessing
    from exporter.repository import ServedModel, write_repository
    from tests.networks import small_network

    network = to_onnx(small_network(SHAPE, CLASSES))
    graphs = (sentinel_graph(network, Preprocessing()), repaired_graph(network, Preprocessing()))
    overlays = np.random.default_rng(0).integers(0, 256, (4, *SHAPE), dtype=np.uint8)
    calibration = fixed_threshold(np.array([1.0, 2.0]), 10.0)  # above log2(5)
    folder = tmp_path_factory.mktemp("small") / "repository"
    write_repository(folder, ServedModel(*graphs, overlays, 0.5, calibration, CLASSES, {}))
    fused = fuse(*graphs, overlays, 0.5, calibration, np.ones((2, 4)))
    write_repository(folder, ServedModel(*graphs, overlays, 0.5, calibration, CLASSES, {}, fused))
    return folder


@contextmanager
def serving(exported: Path, folder: Path, version: str) -> Iterator[EmbeddedTriton]:
    """Serve a version of a copy of the repository, which lies in `folder`."""
    from exporter.repository import activate

    shutil.copytree(exported, folder / "repository")
    activate(folder / "repository", version)
    with EmbeddedTriton(folder / "repository") as running:
        yield running


@pytest.fixture(scope="module")
def ensemble(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedTriton]:
    with serving(exported, tmp_path_factory.mktemp("ensemble"), "1") as running:
        yield running


def given(count: int) -> list[Feedback]:
    """Return feedback whose ids are in no order."""
    truths, verdicts = ("clean", "trojaned"), ("rejected", "accepted", "accepted")
    return [
        Feedback(f"{number * 7 % 10:x}-{number}.0", truths[number % 2], verdicts[number % 3]) for number in range(count)
    ]


def stub_of(server: EmbeddedTriton, model: str) -> psutil.Process:
    """Return the process of a Python-backed model."""
    (stub,) = [
        process
        for process in psutil.Process(server.process_id).children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE and f"/{model}/" in " ".join(process.cmdline())
    ]
    return stub


def kill(server: EmbeddedTriton, model: str) -> None:
    stub = stub_of(server, model)
    stub.send_signal(signal.SIGKILL)
    wait_for(lambda: stub.status() == psutil.STATUS_ZOMBIE)


def parsed(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return every sample of a page of metrics, by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@dataclass
class Monitor:
    """A monitor that runs as a command.

    Attributes:
        process: the command.
        log: where its stderr goes.
        http: asks it.
    """

    process: subprocess.Popen[bytes]
    log: Path
    http: httpx.Client = field(default_factory=httpx.Client)

    def lines(self) -> list[dict[str, Any]]:
        """Return what it has logged so far; that each line is JSON is part of the test."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.endswith("}")]

    def events(self) -> list[str]:
        return [line["event"] for line in self.lines()]

    def metric(self, name: str, **labels: str) -> float:
        return parsed(self.http.get("/metrics").text)[name, tuple(sorted(labels.items()))]

    def give(self, **feedback: Any) -> httpx.Response:
        return self.http.post("/v1/feedback", json=feedback, headers={"Authorization": f"Bearer {TOKEN}"})

    def stop(self) -> int:
        """Stop it as Kubernetes does, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@contextmanager
def monitoring(canary_file: Path, url: str, *options: str | Path, record: Path | None = None) -> Iterator[Monitor]:
    """Run the command until the block ends, with its record beside the canary file unless told otherwise."""
    folder = canary_file.parent
    log = folder / f"monitor-{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "stripwire", "monitor", "--canaries", canary_file, "--url", url]
    command += ["--listen", "127.0.0.1:0", "--record", record or folder / "record.sqlite", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STRIPWIRE_")}
    environment["STRIPWIRE_FEEDBACK_TOKEN"] = TOKEN
    with log.open("wb") as stderr:
        process = subprocess.Popen(list(map(str, command)), stderr=stderr, cwd=ROOT, env=environment)
    monitor = Monitor(process, log)
    try:
        wait_for(lambda: "listening" in log.read_text() or process.poll() is not None)
        listening = [line for line in monitor.lines() if line["event"] == "listening"]
        assert listening, log.read_text()
        monitor.http = httpx.Client(base_url=listening[0]["url"], timeout=30)
        yield monitor
    finally:
        monitor.http.close()
        if process.poll() is None:
            process.kill()
            process.wait()


def stripwire(monitor: Monitor, *arguments: str, columns: int = 160) -> subprocess.CompletedProcess[str]:
    """Run a command that asks a monitor, on a terminal so wide."""
    told = {"STRIPWIRE_MONITOR": str(monitor.http.base_url), "STRIPWIRE_FEEDBACK_TOKEN": TOKEN, "COLUMNS": str(columns)}
    command = [sys.executable, "-m", "stripwire", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | told, check=False)


class TextPage:
    """A server that answers every question with the same text.

    Attributes:
        text: the answer.
        status: of it.
        url: that is asked.
    """

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self.text, self.status = "", 200
        self.url = f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def page_of_text() -> Iterator[TextPage]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(page.status)
            self.end_headers()
            self.wfile.write(page.text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        page = TextPage(server)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield page
        server.shutdown()
        thread.join()
