"""What only the asyncio client can do wrong; what both do is tested in `test_api.py`."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from client.api import AsyncGuardedClient
from deploy.embedded.server import EmbeddedTriton
from detector.errors import InputError, ServerError
from samples.hdf5 import read_hdf5
from tests.client.double import Server, images_of
from tests.conftest import wait_for


@pytest.fixture
def double() -> Iterator[Server]:
    server = Server(max_batch_size=1)
    running = server.start()
    yield server
    running.stop(grace=None).wait()


def test_cancelling_a_caller_cancels_its_requests(double: Server) -> None:
    registry = CollectorRegistry()

    async def cancel() -> None:
        async with AsyncGuardedClient(double.url, window=3, registry=registry) as client:
            await client.metadata()
            double.delays_seconds = dict.fromkeys(range(20), 0.5)
            calling = asyncio.create_task(client.classify(images_of(range(20))))
            while double.running < 3:
                await asyncio.sleep(0.01)
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling
            double.delays_seconds = {}
            assert (await client.classify(images_of([7]))).labels.tolist() == [2]  # it can still be used

    asyncio.run(cancel())
    wait_for(lambda: double.running == 0)
    assert double.abandoned == 3
    assert len(double.inferences) == 3 + 1
    assert registry.get_sample_value("stripwire_client_requests_total", {"outcome": "cancelled"}) == 3


def test_a_caller_that_waits_between_attempts_is_cancelled_at_once(double: Server) -> None:
    async def cancel() -> None:
        double.failures.extend([(grpc.StatusCode.UNAVAILABLE, "busy")] * 99)
        async with AsyncGuardedClient(double.url, sleep=lambda _: asyncio.sleep(60)) as client:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.classify(images_of([1])), 0.3)

    started = time.monotonic()
    asyncio.run(cancel())
    assert time.monotonic() - started < 20
    assert len(double.inferences) == 1


def test_callers_of_one_loop_wait_together(double: Server) -> None:
    async def call() -> list[list[int]]:
        async with AsyncGuardedClient(double.url) as client:
            await client.metadata()
            answers = await asyncio.gather(*(client.classify(images_of([number, number + 1])) for number in range(4)))
        return [verdicts.labels.tolist() for verdicts in answers]

    double.delays_seconds = dict.fromkeys(range(5), 0.2)
    assert asyncio.run(call()) == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert double.most_running > 4  # the window is that of one call


def test_failures_that_nobody_waits_for_any_more_leave_no_trace(double: Server) -> None:
    told: list[dict[str, Any]] = []

    async def fail() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, about: told.append(about))
        async with AsyncGuardedClient(double.url) as client:
            await client.metadata()
            double.failures.extend([(grpc.StatusCode.INTERNAL, "stub is not healthy")] * 9)
            double.delays_seconds = {0: 0.2}  # the others have failed before it does
            with pytest.raises(ServerError, match="stub is not healthy"):
                await client.classify(images_of(range(9)))

    asyncio.run(fail())
    assert told == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 cannot tell who cancelled a task")
def test_a_client_that_is_closed_under_its_callers_tells_them(double: Server) -> None:
    async def close() -> None:
        double.delays_seconds = dict.fromkeys(range(9), 0.5)
        client = AsyncGuardedClient(double.url)
        calling = asyncio.create_task(client.classify(images_of(range(9))))
        while double.running < 4:
            await asyncio.sleep(0.01)
        await client.close()
        with pytest.raises(ServerError, match="failed with CANCELLED: the client was closed"):
            await calling

    asyncio.run(close())


def test_a_client_belongs_to_the_event_loop_that_first_used_it(double: Server) -> None:
    client = AsyncGuardedClient(double.url)  # outside of any
    assert asyncio.run(client.is_ready())
    with pytest.raises(InputError, match="it belongs to another event loop; open one in each"):
        asyncio.run(client.is_ready())


def test_it_can_be_closed_without_having_been_used() -> None:
    asyncio.run(AsyncGuardedClient("127.0.0.1:1").close())


def test_images_in_shared_memory_stay_with_the_server_if_their_caller_is_cancelled(
    repository: Any, badnet: Any
) -> None:
    images = np.concatenate([read_hdf5(badnet / "clean_test_data.h5").images] * 20)

    async def cancel(address: str) -> int:
        async with AsyncGuardedClient(address) as client:
            begun = asyncio.Event()
            calling = asyncio.create_task(
                client.classify(images, shared_memory=True, on_progress=lambda *_: begun.set())
            )
            await begun.wait()
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling
            assert len(await client.classify(images[:3], shared_memory=True)) == 3
            told = await client.ask(
                "guarded", lambda triton, **options: triton.get_system_shared_memory_status(**options)
            )
            return len(told.regions)

    with EmbeddedTriton(repository) as server:
        assert asyncio.run(cancel(server.grpc_address)) == 1
