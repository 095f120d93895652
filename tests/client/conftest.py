"""What tests of the clients share: either client, to be asked alike."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from client.api import AsyncGuardedClient, GuardedClient
from tests.certificates import OpenSsl

Connect: TypeAlias = Callable[..., Any]
"""Opens a client with the options of `GuardedClient`."""


class Awaited:
    """An `AsyncGuardedClient` whose methods wait, in a thread that has no event loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *arguments: Any,
        sleep: Callable[[float], None] | None = None,
        **options: Any,
    ) -> None:
        async def pause(seconds: float) -> None:
            assert sleep is not None
            sleep(seconds)

        self._loop = loop
        self._client = AsyncGuardedClient(*arguments, sleep=None if sleep is None else pause, **options)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        return lambda *given, **options: asyncio.run_coroutine_threadsafe(
            method(*given, **options), self._loop
        ).result()

    def __enter__(self) -> Awaited:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture(scope="session")
def event_loop_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """Return an event loop that runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(params=["sync", "asyncio"])
def connect(request: pytest.FixtureRequest) -> Connect:
    """Return what opens a client, of either kind: `GuardedClient`, or what asks `AsyncGuardedClient` and waits."""
    if request.param == "sync":
        return GuardedClient
    return partial(Awaited, request.getfixturevalue("event_loop_thread"))


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a server certificate for `stripwire.test` and 127.0.0.1, and a client certificate."""
    folder = tmp_path_factory.mktemp("certificates")
    openssl = OpenSsl(folder)
    openssl.write_authority("ca")
    for name in ("server", "client"):
        openssl.write_signed(name, "subjectAltName=DNS:stripwire.test,IP:127.0.0.1\n")
    openssl.write_locked("client")
    return folder
