"""What the dashboard is tried on: a real Prometheus that scrapes a real server and a real monitor under traffic."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from client.api import GuardedClient
from deploy.embedded.server import EmbeddedTriton, choose_ports
from exporter.canaries import canaries_for
from model_repository.manifest import read_manifest
from samples.canaries import choose_canaries, write_canaries
from samples.hdf5 import read_hdf5
from tests.client.monitor.conftest import Monitor, monitoring, wait_for
from tests.conftest import skip_or_fail

Images = NDArray[np.uint8]
Result = list[dict[str, Any]]

_CONFIGURATION = """
global: {{scrape_interval: 1s}}
scrape_configs:
"""
_JOB = """
  - job_name: {name}
    static_configs: [{{targets: ['{address}']}}]
"""


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus.

    Attributes:
        http: asks it.
    """

    http: httpx.Client

    def now(self, expression: str) -> Result:
        """Return what an expression is at this moment."""
        return self._ask("query", query=expression)

    def over(self, expression: str, start: float, end: float, step: float) -> Result:
        """Return what an expression was from `start` to `end`, in seconds since 1970, every `step` seconds."""
        return self._ask("query_range", query=expression, start=start, end=end, step=step)

    def _ask(self, kind: str, **question: Any) -> Result:
        answer = self.http.post(f"/api/v1/{kind}", data=question).json()
        assert answer["status"] == "success", (answer, question["query"])
        result: Result = answer["data"]["result"]
        return result


def find(program: str) -> str:
    """Return the path of a program of Debian's package `prometheus`; skip, or fail in CI, where there is none."""
    path = shutil.which(program)
    if path is None:
        skip_or_fail(f"there is no {program}: apt-get install prometheus")
    return str(path)


@contextmanager
def prometheus(folder: Path, jobs: Mapping[str, str]) -> Iterator[Prometheus]:
    """Run a Prometheus that scrapes `jobs`, addresses by name, once a second; all it writes is in `folder`."""
    program = find("prometheus")
    port = choose_ports("127.0.0.1", {"Prometheus": 0})["Prometheus"]
    scraped = "".join(_JOB.format(name=name, address=address) for name, address in jobs.items())
    (folder / "prometheus.yml").write_text(_CONFIGURATION.format() + scraped)
    command = [program, "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            wait_for(lambda: _is_ready(http) or process.poll() is not None)
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            yield Prometheus(http)
    finally:
        process.terminate()
        process.wait(timeout=60)


def _is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


class Traffic(threading.Thread):
    """Sends images, and gives feedback on some, until it is told to stop.

    Args:
        server: that images are sent to.
        monitor: that feedback is given to.
        clean: images.
        trojaned: images.
        share: of images that are trojaned; may be changed while it runs.
    """

    def __init__(
        self, server: EmbeddedTriton, monitor: Monitor, clean: Images, trojaned: Images, share: float = 0.1
    ) -> None:
        super().__init__(name="traffic")
        self.share = share
        self._server, self._monitor = server, monitor
        self._pools = {"clean": clean, "trojaned": trojaned}
        self._generator = np.random.default_rng(0)
        self._ended = threading.Event()

    def stop(self) -> None:
        """Stop sending."""
        self._ended.set()
        self.join()

    def run(self) -> None:
        """Send a batch, give feedback on one image of it, and so on."""
        with GuardedClient(self._server.grpc_address) as client:
            number = 0
            while not self._ended.wait(0.05):
                trojaned = self._generator.random(4) < self.share
                truths = ["trojaned" if each else "clean" for each in trojaned]
                verdicts = client.classify(np.stack([self._generator.choice(self._pools[truth]) for truth in truths]))
                known = int(np.argmax(trojaned))
                verdict = "rejected" if verdicts.trojaned[known] else "accepted"
                number += 1
                self._monitor.give(request_id=f"request-{number}", truth=truths[known], verdict=verdict)
                if number % 20 == 0:
                    self._monitor.give(request_id=f"request-{number}", truth="neither", verdict=verdict)


@dataclass(frozen=True)
class Scene:
    """What is running.

    Attributes:
        prometheus: has scraped it all.
        traffic: what is sent.
    """

    prometheus: Prometheus
    traffic: Traffic


@contextmanager
def scene(server: EmbeddedTriton, repository: Path, data: Path, folder: Path) -> Iterator[Scene]:
    """Run a monitor, a Prometheus and traffic beside a server.

    Args:
        server: the server.
        repository: that it serves.
        data: folder of a small BadNet's data.
        folder: an empty one, for what they write.
    """
    find("prometheus")
    clean = read_hdf5(data / "clean_test_data.h5").images
    trojaned = read_hdf5(data / "sunglasses_poisoned_data.h5").images
    manifest = read_manifest(repository)
    active = manifest["active"]
    canaries = canaries_for(active, manifest["versions"][active], *choose_canaries(clean, trojaned, 100, seed=0))
    if canaries.far_upper is None:  # an export without trojaned images knows none
        canaries = replace(canaries, far_upper=0.05)
    write_canaries(folder / "canaries.npz", canaries)
    with monitoring(folder / "canaries.npz", server.grpc_address, "--canaries-per-minute", "240") as monitor:
        jobs = {"triton": server.metrics_address, "monitor": monitor.http.base_url.netloc.decode()}
        with prometheus(folder, jobs) as running:
            traffic = Traffic(server, monitor, clean, trojaned)
            traffic.start()
            try:
                yield Scene(running, traffic)
            finally:
                traffic.stop()


def wait_until(moment: float) -> None:
    """Sleep until a moment, in seconds since 1970."""
    time.sleep(max(0.0, moment - time.time()))
