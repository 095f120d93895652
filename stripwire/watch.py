"""The guard under watch: a server, a monitor, a Prometheus and traffic on one machine, until it is told to stop.

The traffic is clean faces and some that carry the trigger. After a while an attacker comes who has another trigger, and
sends far more of them: the rates, and then the alerts, follow.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import httpx
import numpy as np
from numpy.typing import NDArray

from client.api import GuardedClient
from deploy.background import find_program, running
from deploy.embedded.server import EmbeddedTriton, choose_ports
from deploy.prometheus.local import PACKAGE, RULES, LocalPrometheus, hasty, local_prometheus
from detector.errors import ServerError
from exporter.badnet import TEST_FILE, BadNetOptions, cached_badnet, trojaned_file
from exporter.canaries import canaries_for
from exporter.export import Data, ExportOptions, export
from exporter.training import Progress
from model_repository.manifest import read_manifest
from samples.canaries import choose_canaries, write_canaries
from samples.hdf5 import read_hdf5

FIRST, SECOND = "sunglasses", "patch"
"""Trigger that is there from the start, and that of the attacker who comes later."""

FIRST_SHARE, SECOND_SHARE = 0.05, 0.5
"""What part of the traffic carries a trigger, before and after the switch."""

_CANARIES = 50  # of each kind; the other images are traffic
_BATCH = 8
_PAUSE_SECONDS = 0.25


@dataclass(frozen=True)
class Rates:
    """What Prometheus says at a moment; None where it knows nothing yet.

    Attributes:
        inputs_per_second: of live traffic.
        rejected: share of it that was rejected.
        far: of canaries.
        frr: of canaries.
        drift: Kolmogorov-Smirnov distance of live entropies to those of calibration.
        alerts: that fire.
    """

    inputs_per_second: float | None
    rejected: float | None
    far: float | None
    frr: float | None
    drift: float | None
    alerts: tuple[str, ...]

    def told(self) -> str:
        """Return a line of them."""
        shares = {"rejected": self.rejected, "FAR": self.far, "FRR": self.frr}
        parts = [f"{name} {'    -' if share is None else f'{share:5.1%}'}" for name, share in shares.items()]
        parts.insert(0, f"{self.inputs_per_second or 0:4.0f} inputs/s")
        parts.append(f"drift {'-' if self.drift is None else f'{self.drift:.2f}'}")
        return ", ".join(parts) + (f"; firing: {', '.join(self.alerts)}" if self.alerts else "")


class Traffic(threading.Thread):
    """Sends images until it is told to stop.

    Args:
        address: of the server's gRPC.
        clean: images, (images, height, width, channels), uint8.
        trojaned: likewise, by trigger.
    """

    def __init__(self, address: str, clean: NDArray[np.uint8], trojaned: dict[str, NDArray[np.uint8]]) -> None:
        super().__init__(name="traffic", daemon=True)
        self.trigger, self.share = FIRST, FIRST_SHARE
        self._address = address
        self._clean, self._trojaned = clean, trojaned
        self._generator = np.random.default_rng(0)
        self._ended = threading.Event()

    def switch(self) -> None:
        """Let the other attacker come."""
        self.trigger, self.share = SECOND, SECOND_SHARE

    def stop(self) -> None:
        """Send no more."""
        self._ended.set()
        self.join()

    def run(self) -> None:
        """Send a batch, wait, and so on; a server that is away for a moment is asked again."""
        with GuardedClient(self._address) as client:
            while not self._ended.wait(_PAUSE_SECONDS):
                pool, carries = self._trojaned[self.trigger], self._generator.random(_BATCH) < self.share
                images = [self._generator.choice(pool if each else self._clean) for each in carries]
                try:
                    client.classify(np.stack(images))
                except ServerError:
                    continue  # the monitor tells


@dataclass(frozen=True)
class Watched:
    """What is running.

    Attributes:
        server: the guard.
        monitor: URL of the monitor.
        prometheus: which scrapes both.
        feedback_token: opens the quarantine.
        traffic: what is sent.
    """

    server: EmbeddedTriton
    monitor: str
    prometheus: LocalPrometheus
    feedback_token: str
    traffic: Traffic

    def pages(self) -> dict[str, str]:
        """Return what there is to look at, by what it is."""
        rate = urlencode({"g0.expr": "stripwire:rejection:ratio5m", "g0.tab": 0, "g0.range_input": "15m"})
        alerts = urlencode({"g0.expr": "ALERTS", "g0.tab": 1})
        return {
            "rejection rate": f"{self.prometheus.url}/graph?{rate}",
            "alerts": f"{self.prometheus.url}/graph?{alerts}",
            "quarantine": f"{self.monitor}/quarantine",
            "  its token": self.feedback_token,
            "metrics of the monitor": f"{self.monitor}/metrics",
            "metrics of the server": f"http://{self.server.metrics_address}/metrics",
            "gRPC": self.server.grpc_address,
        }

    def rates(self) -> Rates:
        """Return what Prometheus says now.

        Raises:
            ServerError: Prometheus, the server or the monitor runs no more.
        """
        for job in ("stripwire-triton", "stripwire-monitor"):
            if self._value(f'sum_over_time(up{{job="{job}"}}[10s])') == 0:
                raise ServerError(
                    f"{job.removeprefix('stripwire-')} does not answer any more; see {self.prometheus.url}"
                )
        alerts = self.prometheus.now('ALERTS{alertstate="firing"}')
        return Rates(
            self._value('sum(rate(stripwire_inputs_total{traffic="live"}[30s]))'),
            self._value("stripwire:rejection:ratio5m"),
            self._value('stripwire:far:ratio5m{source="canary"}'),
            self._value('stripwire:frr:ratio5m{source="canary"}'),
            self._value("stripwire:entropy_drift:ks1h"),
            tuple(sorted({alert["metric"]["alertname"] for alert in alerts})),
        )

    def _value(self, expression: str) -> float | None:
        found = self.prometheus.now(expression)
        return float(found[0]["value"][1]) if found else None


@contextmanager
def watch(ports: dict[str, int], *, identities: int, seed: int, on_progress: Progress) -> Iterator[Watched]:
    """Train a BadNet with two triggers (or take it from the cache), export it, and yield all of it running.

    Args:
        ports: of `monitor` and `Prometheus`, 0 for a free one.
        identities: how many people the network knows.
        seed: of everything random.
        on_progress: told what is going on, steps done and steps in all.

    Raises:
        StripwireError: a part could not be had or started.
    """
    find_program("prometheus", PACKAGE)  # before the long work
    ports = choose_ports("127.0.0.1", ports)
    options = BadNetOptions.sized(identities, attacks=((FIRST, 0), (SECOND, 1)), seed=seed)
    badnet = cached_badnet(options, on_progress=on_progress).folder
    clean = read_hdf5(badnet / TEST_FILE).images
    trojaned = {trigger: read_hdf5(badnet / trojaned_file(trigger)).images for trigger in (FIRST, SECOND)}
    shuffled = np.random.default_rng(seed).permutation(len(clean))
    sent, kept = clean[shuffled[_CANARIES:]], clean[shuffled[:_CANARIES]]
    with tempfile.TemporaryDirectory(prefix="stripwire-watch-") as name:
        folder = Path(name)
        data = Data(badnet / "clean_validation_data.h5")
        export(badnet / "bd_net.keras", data, folder / "repository", ExportOptions(seed=seed), on_progress=on_progress)
        manifest = read_manifest(folder / "repository")
        active = manifest["active"]
        chosen = choose_canaries(kept, trojaned[FIRST], _CANARIES, seed)
        write_canaries(folder / "canaries.npz", canaries_for(active, manifest["versions"][active], *chosen))
        quarantine = folder / "quarantine"
        (folder / "prometheus").mkdir()
        with (
            EmbeddedTriton(folder / "repository", quarantine=quarantine) as server,
            _monitor(server, folder, ports["monitor"]) as (monitor, token),
            local_prometheus(
                folder / "prometheus",
                {"stripwire-triton": server.metrics_address, "stripwire-monitor": monitor.removeprefix("http://")},
                port=ports["Prometheus"],
                rules=hasty(RULES.read_text(encoding="utf-8")),
            ) as prometheus,
        ):
            traffic = Traffic(server.grpc_address, sent, trojaned)
            traffic.start()
            try:
                yield Watched(server, monitor, prometheus, token, traffic)
            finally:
                traffic.stop()


@contextmanager
def _monitor(server: EmbeddedTriton, folder: Path, port: int) -> Iterator[tuple[str, str]]:
    """Run the monitor as an operator does; yield its URL and its feedback token."""
    token, url = secrets.token_urlsafe(24), f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "stripwire", "monitor", "--canaries", str(folder / "canaries.npz")]
    command += ["--record", str(folder / "feedback.sqlite"), "--quarantine", str(folder / "quarantine")]
    command += ["--url", server.grpc_address, "--listen", url.removeprefix("http://"), "--canaries-per-minute", "240"]
    command += ["--metrics-url", f"http://{server.metrics_address}/metrics"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STRIPWIRE_")}
    environment["STRIPWIRE_FEEDBACK_TOKEN"] = token

    def is_ready() -> bool:
        try:
            return httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    with running("the monitor", command, folder / "monitor.log", is_ready, environment=environment):
        yield url, token
