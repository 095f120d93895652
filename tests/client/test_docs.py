"""The examples of docs/client.md run as they stand, but for addresses: against the real server and the real monitor."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from client.api import GuardedClient
from deploy.embedded.server import EmbeddedTriton
from samples.canaries import Canaries, write_canaries
from samples.hdf5 import read_hdf5
from tests.client.monitor.conftest import TOKEN, monitoring

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
EXAMPLES = {
    heading: code
    for heading, section in re.findall(r"^##? (.+?)$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    for code in re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
}


@contextmanager
def forwarding(address: str, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Yield the address of what hands every connection on to `address`, decrypted."""
    host, _, port = address.rpartition(":")

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # one side is gone, so the other is to go
        finally:
            writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    listening: Future[tuple[str, Callable[[], object]]] = Future()

    async def serve() -> None:
        ended = asyncio.Event()
        server = await asyncio.start_server(forward, "127.0.0.1", 0, ssl=tls)
        end = partial(asyncio.get_running_loop().call_soon_threadsafe, ended.set)
        listening.set_result((f"127.0.0.1:{server.sockets[0].getsockname()[1]}", end))
        await ended.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    ours, end = listening.result(timeout=30)
    try:
        yield ours
    finally:
        end()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path, badnet: Path) -> Path:
    """Return a folder with what the examples read."""
    np.save(tmp_path / "faces.npy", read_hdf5(badnet / "clean_test_data.h5").images[:5])
    return tmp_path


def run(heading: str, folder: Path, **addresses: str) -> str:
    """Run an example in a process of its own, with addresses in place of those in it, and return what it prints."""
    code = EXAMPLES[heading]
    for address, instead in addresses.items():
        written = {"triton": "127.0.0.1:8001", "second": "127.0.0.1:8101", "remote": "triton.example:8001"}
        written |= {"monitor": "http://127.0.0.1:8003"}
        assert written[address] in code
        code = code.replace(written[address], instead)
    secrets = {"STRIPWIRE_TOKEN": "secret", "STRIPWIRE_FEEDBACK_TOKEN": TOKEN}
    environment = os.environ | secrets | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", code]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_every_example_is_run() -> None:
    ours = Path(__file__).read_text(encoding="utf-8")
    assert len(re.findall("^```python$", PAGE, re.MULTILINE)) == len(EXAMPLES)
    for heading in EXAMPLES:
        assert f'run("{heading}"' in ours


def test_the_first_one_prints_a_line_for_each_image(server: EmbeddedTriton, folder: Path) -> None:
    lines = run("Client library", folder, triton=server.grpc_address).splitlines()
    assert len(lines) == 5
    assert all(re.fullmatch(rf"\d+ (True|False) \S+ [0-9a-f]{{32}}\.{row}", line) for row, line in enumerate(lines))


def test_asyncio(server: EmbeddedTriton, folder: Path) -> None:
    assert run("asyncio", folder, triton=server.grpc_address).endswith(" of 5 rejected\n")


def test_errors(folder: Path) -> None:
    assert run("Errors and retries", folder).startswith("later: 127.0.0.1:9: the server is unavailable")


def test_tls(server: EmbeddedTriton, folder: Path, certificates: Path) -> None:
    for name in ("ca.crt", "client.key", "client.crt"):
        shutil.copy(certificates / name, folder)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(certificates / "ca.crt"))
    context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])
    with forwarding(server.grpc_address, context) as remote:
        assert len(run("TLS and secrets", folder, remote=remote).split()) >= 5


def test_feedback(server: EmbeddedTriton, folder: Path) -> None:
    images = np.load(folder / "faces.npy")
    with GuardedClient(server.grpc_address) as client:
        classes = client.metadata().classes
    write_canaries(folder / "canaries.npz", Canaries(images, np.zeros(5, np.bool_), classes))
    with monitoring(folder / "canaries.npz", server.grpc_address) as monitor:
        url = str(monitor.http.base_url).rstrip("/")
        assert run("Request ids and feedback", folder, triton=server.grpc_address, monitor=url) == "201\n"
        given = sum(
            monitor.metric("stripwire_feedback_total", truth="clean", verdict=verdict)
            for verdict in ("accepted", "rejected")
        )
        assert given == 1


def test_traces(server: EmbeddedTriton, folder: Path) -> None:
    assert run("Traces", folder, triton=server.grpc_address) in ("True\n", "False\n")


def test_metrics(server: EmbeddedTriton, folder: Path) -> None:
    page = run("Metrics", folder, triton=server.grpc_address)
    assert 'stripwire_client_requests_total{outcome="answered"} 3.0' in page  # two about the model
    assert "stripwire_client_request_seconds_count 1.0" in page


def test_several_servers(server: EmbeddedTriton, folder: Path) -> None:
    with forwarding(server.grpc_address) as second:
        addresses = {"triton": server.grpc_address, "second": second}
        assert len(run("Several servers", folder, **addresses).split()) >= 5
