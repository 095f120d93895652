"""What the dashboard is tried on: a real Prometheus that scrapes a real server and a real monitor under traffic."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.api import GuardedClient
from client.connection import TlsOptions
from deploy.embedded.server import EmbeddedTriton, choose_ports
from deploy.embedded.tls import ServerTls
from deploy.prometheus.local import LocalPrometheus, local_prometheus
from exporter.canaries import canaries_for
from model_repository.manifest import read_manifest
from samples.canaries import choose_canaries, write_canaries
from samples.hdf5 import read_hdf5
from tests.client.monitor.conftest import Monitor, monitoring
from tests.conftest import program
from tests.deploy.embedded.certificates import write_certificates

Images = NDArray[np.uint8]


@contextmanager
def prometheus(folder: Path, jobs: Mapping[str, str]) -> Iterator[LocalPrometheus]:
    """Run a Prometheus that scrapes `jobs`, addresses by name, once a second; all it writes is in `folder`."""
    program("prometheus", "apt-get install prometheus")
    port = choose_ports("127.0.0.1", {"Prometheus": 0})["Prometheus"]
    with local_prometheus(folder, jobs, port=port) as running:
        yield running


class Traffic(threading.Thread):
    """Sends images, and gives feedback on some, until it is told to stop.

    Args:
        client: that images are sent by.
        monitor: that feedback is given to.
        clean: images.
        trojaned: images.
        share: of images that are trojaned; may be changed while it runs.
    """

    def __init__(
        self, client: GuardedClient, monitor: Monitor, clean: Images, trojaned: Images, share: float = 0.1
    ) -> None:
        super().__init__(name="traffic")
        self.share = share
        self._client, self._monitor = client, monitor
        self._pools = {"clean": clean, "trojaned": trojaned}
        self._generator = np.random.default_rng(0)
        self._ended = threading.Event()

    def stop(self) -> None:
        """Stop sending."""
        self._ended.set()
        self.join()

    def run(self) -> None:
        """Send a batch, give feedback on one image of it, and so on."""
        number = 0
        while not self._ended.wait(0.05):
            trojaned = self._generator.random(4) < self.share
            truths = ["trojaned" if each else "clean" for each in trojaned]
            images = np.stack([self._generator.choice(self._pools[truth]) for truth in truths])
            verdicts = self._client.classify(images)
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

    prometheus: LocalPrometheus
    traffic: Traffic


@contextmanager
def scene(repository: Path, data: Path, folder: Path) -> Iterator[Scene]:
    """Run a server with mutual TLS, a monitor, a Prometheus and traffic.

    Args:
        repository: that is served.
        data: folder of a small BadNet's data.
        folder: for what they write.
    """
    program("prometheus", "apt-get install prometheus")
    clean = read_hdf5(data / "clean_test_data.h5").images
    trojaned = read_hdf5(data / "sunglasses_poisoned_data.h5").images
    manifest = read_manifest(repository)
    active = manifest["active"]
    canaries = canaries_for(active, manifest["versions"][active], *choose_canaries(clean, trojaned, 100, seed=0))
    if canaries.far_upper is None:  # an export without trojaned images knows none
        canaries = replace(canaries, far_upper=0.05)
    write_canaries(folder / "canaries.npz", canaries)
    write_certificates(folder)
    ours = TlsOptions(folder / "ca.crt", folder / "client.key", folder / "client.crt")
    options: list[str | Path] = ["--canaries-per-minute", "240", "--quarantine", folder / "quarantine"]
    options += ["--tls-ca", folder / "ca.crt", "--tls-key", folder / "client.key", "--tls-cert", folder / "client.crt"]
    with (
        EmbeddedTriton(
            repository,
            tls=ServerTls(folder / "server.crt", folder / "server.key", folder / "ca.crt"),
            quarantine=folder / "quarantine",
        ) as server,
        monitoring(folder / "canaries.npz", server.grpc_address, *options) as monitor,
        prometheus(
            folder, {"triton": server.metrics_address, "monitor": monitor.http.base_url.netloc.decode()}
        ) as running,
        GuardedClient(server.grpc_address, tls=ours) as client,
    ):
        traffic = Traffic(client, monitor, clean, trojaned)
        traffic.start()
        try:
            yield Scene(running, traffic)
        finally:
            traffic.stop()


def wait_until(moment: float) -> None:
    """Sleep until a moment, in seconds since 1970."""
    time.sleep(max(0.0, moment - time.time()))
