"""When certificates end, told by what servers show in real handshakes, and by files."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from prometheus_client import CollectorRegistry

from client.api import GuardedClient, TlsOptions
from client.monitor.certificates import CertificateCollector
from client.monitor.metrics import MonitorMetrics
from client.monitor.sender import CanarySender
from deploy.embedded.server import EmbeddedTriton
from deploy.embedded.tls import ServerTls
from tests.client.double import Server
from tests.client.monitor.conftest import canaries, monitoring, parsed
from tests.deploy.embedded.certificates import unchecked, write_certificates

FAST = ("--canaries-per-minute", "600")
SECOND_OF_JANUARY_2024 = 1704153600.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    write_certificates(folder)
    return folder


def end_of(certificate: Path) -> float:
    """Return when a certificate ends, as openssl reads it."""
    command = ["openssl", "x509", "-noout", "-enddate", "-in", str(certificate)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(ssl.cert_time_to_seconds(said.strip().removeprefix("notAfter=")))


class Asked:
    """What the collector tells, with a clock that stands still unless it is moved."""

    def __init__(self, url: str, tls: TlsOptions) -> None:
        self.now = 100.0
        self._collector = CertificateCollector(url, tls, lambda: self.now)

    def ends(self) -> dict[str, float]:
        return {
            sample.labels["certificate"]: sample.value
            for family in self._collector.collect()
            for sample in family.samples
        }


@contextmanager
def showing(folder: Path, name: str) -> Iterator[str]:
    """Yield the address of a gRPC server that shows that certificate."""
    pair = ((folder / f"{name}.key").read_bytes(), (folder / f"{name}.crt").read_bytes())
    double = Server()
    running = double.start(credentials=grpc.ssl_server_credentials([pair]))
    yield double.url
    running.stop(grace=None).wait()


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    found = [vars(record)["fields"] for record in caplog.records if record.name == "stripwire.monitor"]
    return [(fields["certificate"], fields["why"]) for fields in found]


def test_of_a_server_with_mutual_tls_the_command_tells_both(exported: Path, folder: Path, canary_file: Path) -> None:
    files = [f"--tls-{name}={folder / file}" for name, file in (("ca", "ca.crt"), ("key", "client.key"))]
    own = canary_file.with_name("own.crt")
    shutil.copy(folder / "client.crt", own)
    with (
        EmbeddedTriton(
            exported, tls=ServerTls(folder / "server.crt", folder / "server.key", folder / "ca.crt")
        ) as server,
        monitoring(canary_file, server.grpc_address, *FAST, *files, f"--tls-cert={own}") as monitor,
    ):
        name = "stripwire_certificate_not_after_seconds"
        assert monitor.metric(name, certificate="server") == end_of(folder / "server.crt")
        assert monitor.metric(name, certificate="client") == end_of(folder / "client.crt")
        shutil.copy(folder / "early.crt", own)
        assert monitor.metric(name, certificate="client") == end_of(folder / "early.crt")
        assert monitor.stop() == 0


def test_without_tls_there_is_nothing_to_tell(canary_file: Path) -> None:
    with monitoring(canary_file, "127.0.0.1:1") as monitor:
        assert not [name for name, _ in parsed(monitor.http.get("/metrics").text) if "certificate" in name]


def test_one_that_has_expired_is_told_as_well(folder: Path) -> None:
    with showing(folder, "expired") as url:
        ends = Asked(url, unchecked(folder, "expired", lambda *pair: TlsOptions(folder / "ca.crt", *pair))).ends()
    assert ends == {"server": SECOND_OF_JANUARY_2024, "client": SECOND_OF_JANUARY_2024}


def test_of_a_chain_the_first_that_ends_counts(folder: Path, tmp_path: Path) -> None:
    chain = tmp_path / "chain.crt"
    chain.write_bytes(b"".join((folder / f"{name}.crt").read_bytes() for name in ("client", "expired", "ca")))
    asked = Asked("127.0.0.1:1", TlsOptions(private_key=folder / "client.key", certificate_chain=chain))
    assert asked.ends() == {"client": SECOND_OF_JANUARY_2024}


def test_the_server_is_asked_every_ten_minutes_and_a_minute_after_it_did_not_answer(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with showing(folder, "server") as url:
        asked = Asked(url, TlsOptions(folder / "ca.crt"))
        assert asked.ends() == {"server": end_of(folder / "server.crt")}
    asked.now += 599
    assert asked.ends() == {"server": end_of(folder / "server.crt")}
    asked.now += 2
    assert asked.ends() == {}
    double = Server()
    pair = ((folder / "early.key").read_bytes(), (folder / "early.crt").read_bytes())
    running = double.start(url, grpc.ssl_server_credentials([pair]))
    try:
        assert asked.ends() == {}
        asked.now += 61
        assert asked.ends() == {"server": end_of(folder / "early.crt")}
    finally:
        running.stop(grace=None).wait()
    ((certificate, why),) = logged(caplog)
    assert certificate == "server"
    assert "refused" in why


def test_what_cannot_be_read_is_absent_and_logged_once_for_each_reason(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "own.crt"
    shutil.copy(folder / "client.crt", own)
    plaintext = Server()
    running = plaintext.start()
    asked = Asked(plaintext.url, TlsOptions(private_key=folder / "client.key", certificate_chain=own))
    try:
        own.write_text("no certificate")
        assert [asked.ends(), asked.ends()] == [{}, {}]
        own.unlink()
        assert asked.ends() == {}
    finally:
        running.stop(grace=None).wait()
    assert [certificate for certificate, _ in logged(caplog)] == ["server", "client", "client"]
    assert "is not in PEM format" in logged(caplog)[1][1]
    assert "No such file" in logged(caplog)[2][1]


def test_an_address_without_a_port_is_not_looked_at(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Asked("unix:/run/triton.sock", TlsOptions(folder / "ca.crt")).ends() == {}
    assert "expected host:port" in logged(caplog)[0][1]


def test_a_monitor_whose_certificate_expires_while_it_runs_says_so(folder: Path, tmp_path: Path) -> None:
    for suffix in ("key", "crt"):
        shutil.copy(folder / f"client.{suffix}", tmp_path / f"own.{suffix}")

    def connect() -> GuardedClient:
        tls = TlsOptions(folder / "ca.crt", tmp_path / "own.key", tmp_path / "own.crt")
        return GuardedClient(url, tls=tls, retries=0, timeout_seconds=10)

    registry = CollectorRegistry()
    sender = CanarySender(canaries(), connect, MonitorMetrics(registry, canaries()))
    with showing(folder, "server") as url:
        assert sender.send().kind == "mismatch"  # this server has other classes, but it was reached
    for suffix in ("key", "crt"):
        shutil.copy(folder / f"expired.{suffix}", tmp_path / f"own.{suffix}")
    outcome = sender.send()
    assert outcome.kind == "denied"
    assert "own.crt expired on 2024-01-02" in outcome.why
    assert registry.get_sample_value("stripwire_canary_errors_total", {"kind": "denied"}) == 1
