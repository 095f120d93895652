"""How commands reach a server."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from detector.errors import InputError
from stripwire.options import Access

if TYPE_CHECKING:
    from client.api import GuardedClient
    from client.control import ModelControl


@contextmanager
def connect(
    url: str,
    timeout: float,
    access: Access,
    headers: Mapping[str, str] | None = None,
) -> Iterator[GuardedClient]:
    """Yield a client with the connection options of the command line."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it would log each attempt; the error says what the last one met
    from client.api import GuardedClient, TlsOptions

    files = (access.tls_ca, access.tls_key, access.tls_cert)
    options = TlsOptions(*files) if access.tls or files != (None, None, None) else None
    with GuardedClient(url, timeout_seconds=timeout, token=access.token, tls=options, headers=headers) as client:
        yield client


@contextmanager
def controlled(
    url: str | None,
    control_token: str | None,
    timeout: float,
    access: Access,
    repository: Path,
) -> Iterator[ModelControl | None]:
    """Yield control of the server at `url`, which lets us and serves that repository; None where there is no server."""
    if url is None:
        yield None
        return
    from client.control import ModelControl, control_headers
    from deploy.embedded.control_file import read_control_token
    from model_repository.manifest import read_manifest

    is_local = is_one_local_server(url)
    if control_token is None and is_local:
        control_token = read_control_token(url.rpartition(":")[2])
    headers = control_headers(control_token)
    with connect(url, timeout, access, headers) as client:
        control = ModelControl(client)
        control.check_access()
        control.check_serves(read_manifest(repository)["versions"])
        yield control


def is_one_local_server(url: str) -> bool:
    """Say whether `url` is on this machine; InputError where it may be several servers, which would take turns."""
    from client.connection import read_target

    target = read_target(url)
    if target.is_balanced:
        raise InputError(f"url: {url} may be several servers, expected host:port of one")
    return target.is_local
