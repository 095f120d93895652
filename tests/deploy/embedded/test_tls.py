"""TLS and mutual TLS of the embedded Triton, with throw-away certificates: who gets through, and who does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from client.api import GuardedClient, TlsOptions
from client.control import ModelControl, control_headers
from deploy.embedded.server import EmbeddedTriton
from deploy.embedded.tls import ServerTls, server_tls
from detector.errors import AccessDeniedError, InputError, ServerUnavailableError
from samples.canaries import Canaries, write_canaries
from tests.deploy.embedded.certificates import unchecked, write_certificates
from tests.networks import write_small_repository

SHAPE, CLASSES = (8, 7, 3), 5
IMAGE = np.zeros(SHAPE, np.uint8)
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    write_certificates(folder)
    write_small_repository(folder / "repository", SHAPE, CLASSES)
    return folder


def presented(folder: Path, name: str, client_authority: str | None = None) -> ServerTls:
    authorities = None if client_authority is None else folder / f"{client_authority}.crt"
    if name == "expired":
        return unchecked(folder, name, lambda key, certificate: ServerTls(certificate, key, authorities))
    return ServerTls(folder / f"{name}.crt", folder / f"{name}.key", authorities)


@pytest.fixture(scope="module")
def mutual(folder: Path) -> Iterator[EmbeddedTriton]:
    tls = presented(folder, "server", client_authority="ca")
    with EmbeddedTriton(folder / "repository", host="0.0.0.0", tls=tls) as running:  # noqa: S104
        yield running


def known(folder: Path, certificate: str | None = "client", authority: str = "ca") -> TlsOptions:
    if certificate == "expired":
        return unchecked(folder, certificate, lambda *pair: TlsOptions(folder / f"{authority}.crt", *pair))
    pair = (None, None) if certificate is None else (folder / f"{certificate}.key", folder / f"{certificate}.crt")
    return TlsOptions(folder / f"{authority}.crt", *pair)


def labels(server: EmbeddedTriton, tls: TlsOptions | None) -> list[int]:
    with GuardedClient(server.grpc_address, tls=tls, retries=0, timeout_seconds=10) as client:
        found: list[int] = client.classify(IMAGE).labels.tolist()
    return found


def test_a_caller_with_a_certificate_gets_its_verdict(mutual: EmbeddedTriton, folder: Path) -> None:
    assert labels(mutual, known(folder)) == [CLASSES]


@pytest.mark.parametrize(
    ("certificate", "authority", "why"),
    [
        ("client", "foreign", "CERTIFICATE_VERIFY_FAILED"),
        (None, "ca", None),
        ("stranger", "ca", None),
        ("expired", "ca", None),
    ],
    ids=["trusts another authority", "has no certificate", "has one of a stranger", "has an expired one"],
)
def test_a_caller_does_not_get_through_who(
    mutual: EmbeddedTriton, folder: Path, certificate: str | None, authority: str, why: str | None
) -> None:
    with pytest.raises(ServerUnavailableError, match="does it ask for TLS") as caught:
        labels(mutual, known(folder, certificate, authority))
    assert why is None or why in str(caught.value)


def test_plaintext_does_not_get_through(mutual: EmbeddedTriton) -> None:
    with pytest.raises(ServerUnavailableError, match="does it ask for TLS"):
        labels(mutual, None)


@pytest.mark.parametrize("name", ["expired", "elsewhere", "stranger"])
def test_a_server_is_not_trusted_whose_certificate_is(folder: Path, name: str) -> None:
    with (
        EmbeddedTriton(folder / "repository", tls=presented(folder, name)) as server,
        pytest.raises(ServerUnavailableError, match=r"CERTIFICATE_VERIFY_FAILED|[Hh]ostname"),
    ):
        labels(server, known(folder, certificate=None))


def test_without_client_authorities_nobody_needs_a_certificate(folder: Path) -> None:
    with EmbeddedTriton(folder / "repository", tls=presented(folder, "server")) as server:
        assert labels(server, known(folder, certificate=None)) == [CLASSES]
        with pytest.raises(ServerUnavailableError):
            labels(server, None)


@pytest.mark.parametrize("token", [None, "a-wrong-token-of-some-length"])
def test_over_tls_too_nobody_controls_models_without_the_token(
    mutual: EmbeddedTriton, folder: Path, token: str | None
) -> None:
    address, tls = mutual.grpc_address, known(folder)
    with (
        GuardedClient(address, tls=tls, retries=0, headers=control_headers(token)) as client,
        pytest.raises(AccessDeniedError, match="control token is missing or wrong"),
    ):
        ModelControl(client).check_access()
    with GuardedClient(address, tls=tls, headers=control_headers(mutual.control_token)) as client:
        assert ModelControl(client).states()[("guarded", "1")] == "READY"


def test_unencrypted_http_stays_on_this_machine(mutual: EmbeddedTriton) -> None:
    ports = {
        connection.laddr.port: connection.laddr.ip.removeprefix("::ffff:")
        for connection in psutil.Process(mutual.process_id).net_connections("tcp")
        if connection.status == "LISTEN"
    }
    assert ports[int(mutual.http_address.rpartition(":")[2])] == "127.0.0.1"
    assert ports[int(mutual.grpc_address.rpartition(":")[2])] != "127.0.0.1"
    with urllib.request.urlopen(f"http://{mutual.http_address}/v2/health/ready") as answer:
        assert answer.status == 200


def test_the_monitor_watches_over_mutual_tls(mutual: EmbeddedTriton, folder: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(7).integers(0, 256, (2, *SHAPE), dtype=np.uint8)
    write_canaries(tmp_path / "canaries.npz", Canaries(images, np.array([False, True]), CLASSES))
    settings = {
        "CANARIES": tmp_path / "canaries.npz",
        "RECORD": tmp_path / "feedback.sqlite",
        "LISTEN": "127.0.0.1:0",
        "URL": mutual.grpc_address,
        "CANARIES_PER_MINUTE": 600,
        "TLS_CA": folder / "ca.crt",
        "TLS_KEY": folder / "client.key",
        "TLS_CERT": folder / "client.crt",
    }
    environment = os.environ | {f"STRIPWIRE_{name}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "stripwire", "monitor"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        told = (json.loads(line) for line in process.stderr)
        events = (line["event"] for line in told)
        assert "canaries get verdicts" in events
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors


def test_the_command_line_serves_and_classifies_over_mutual_tls(folder: Path, tmp_path: Path) -> None:
    Image.fromarray(IMAGE).save(tmp_path / "image.png")
    command = [sys.executable, "-m", "stripwire", "serve", str(folder / "repository")]
    command += ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    command += ["--tls-cert", str(folder / "server.crt"), "--tls-key", str(folder / "server.key")]
    command += ["--tls-client-ca", str(folder / "ca.crt")]
    environment = os.environ | {"COLUMNS": "200"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        told = next(line.split() for line in process.stdout if "classify" in line)
        ask = [sys.executable, "-m", "stripwire", "classify", "--json", "--url", told[told.index("--url") + 1]]
        ask.append(str(tmp_path / "image.png"))
        proof = ["--tls-key", str(folder / "client.key"), "--tls-cert", str(folder / "client.crt")]
        trust = ["--tls-ca", str(folder / "ca.crt")]
        answer = subprocess.run([*ask, *trust, *proof], cwd=ROOT, capture_output=True, text=True, check=True)
        assert json.loads(answer.stdout)[0]["label"] == CLASSES
        refused = subprocess.run([*ask, *trust], cwd=ROOT, capture_output=True, text=True, check=False)
        assert refused.returncode == 1
        assert "error: " in refused.stderr
        assert "Traceback" not in refused.stderr
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("expired", "expired on 2024-01-02 00:00 UTC"), ("early", "is not valid before 2099-01-01 00:00 UTC")],
)
def test_a_caller_is_told_at_once_that_its_own_certificate(folder: Path, name: str, complaint: str) -> None:
    with pytest.raises(InputError, match=rf"certificate chain .*{name}\.crt {complaint}"):
        TlsOptions(folder / "ca.crt", folder / f"{name}.key", folder / f"{name}.crt")


def test_a_monitor_whose_own_certificate_has_expired_ends_at_once_with_the_reason(
    mutual: EmbeddedTriton, folder: Path, tmp_path: Path
) -> None:
    write_canaries(tmp_path / "canaries.npz", Canaries(np.zeros((1, *SHAPE), np.uint8), np.array([False]), CLASSES))
    command = [sys.executable, "-m", "stripwire", "monitor", "--canaries", str(tmp_path / "canaries.npz")]
    command += ["--record", str(tmp_path / "feedback.sqlite"), "--listen", "127.0.0.1:0", "--url", mutual.grpc_address]
    command += ["--tls-ca", "ca.crt", "--tls-key", "expired.key", "--tls-cert", "expired.crt"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "400"}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "expired.crt expired on 2024-01-02 00:00 UTC, expected one that is valid: have it renewed" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("certificate", "key", "authorities", "complaint"),
    [
        ("absent.crt", "server.key", None, r"TLS certificate .*: cannot read .*absent\.crt"),
        ("server.crt", "client.key", None, "cannot be used: KEY_VALUES_MISMATCH"),
        ("expired.crt", "expired.key", None, r"TLS certificate .*expired\.crt expired on 2024-01-02 00:00 UTC"),
        ("early.crt", "early.key", None, r"TLS certificate .*early\.crt is not valid before 2099-01-01 00:00 UTC"),
        ("server.crt", "locked.key", None, "the private key is encrypted"),
        ("server.crt", "index.txt.attr", None, r"TLS key: .* is not in PEM format"),
        ("server.crt", "server.key", "ca.key", "TLS client authorities: .* cannot be used"),
        ("server.crt", None, None, "expected the server's certificate and its key"),
        (None, None, "ca.crt", "expected the server's certificate and its key"),
    ],
)
def test_files_that_would_leave_triton_mute_are_named_before_it_starts(
    folder: Path, certificate: str | None, key: str | None, authorities: str | None, complaint: str
) -> None:
    paths = (None if name is None else folder / name for name in (certificate, key, authorities))
    with pytest.raises(InputError, match=complaint):
        server_tls(*paths)
