"""A server that is stopped under load loses no request: callers were sent elsewhere before, or try again elsewhere."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from client.api import GuardedClient
from client.control import control_headers
from deploy.embedded.server import EmbeddedTriton
from detector.errors import ServerError, ServerUnavailableError
from tests.networks import write_small_repository

SHAPE, CLASSES = (48, 48, 3), 5
IMAGES = np.random.default_rng(1).integers(0, 256, (64, *SHAPE), dtype=np.uint8)
CALLERS = 6


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drained") / "repository"
    write_small_repository(folder, SHAPE, CLASSES, overlays=10)
    return folder


@dataclass
class Load:
    """What came of the requests of callers that each send one after the other."""

    answers: list[tuple[float, float, Any]] = field(default_factory=list)
    """When each was sent, when it ended, and its labels or its error."""

    def errors(self) -> list[Exception]:
        return [answer for _, _, answer in self.answers if isinstance(answer, Exception)]

    def answered(self) -> int:
        return len(self.answers) - len(self.errors())


@contextmanager
def loaded(ask: Callable[[], list[int]]) -> Iterator[Load]:
    """Have callers ask until the block ends; every one of them comes back."""
    load, over = Load(), threading.Event()

    def call() -> None:
        while not over.is_set():
            sent = time.monotonic()
            try:
                answer: Any = ask()
            except Exception as error:  # noqa: BLE001  what it is, the test says
                answer = error
            load.answers.append((sent, time.monotonic(), answer))
            if isinstance(answer, Exception):
                time.sleep(0.05)

    callers = [threading.Thread(target=call) for _ in range(CALLERS)]
    for caller in callers:
        caller.start()
    try:
        yield load
    finally:
        over.set()
        for caller in callers:
            caller.join(timeout=60)
    assert not any(caller.is_alive() for caller in callers)


def labels(client: GuardedClient) -> list[int]:
    found: list[int] = client.classify(IMAGES).labels.tolist()
    return found


def test_what_sigterm_cuts_off_is_told_that_it_may_be_sent_again(repository: Path) -> None:
    """Triton turns a request to an ensemble away at its next step, a new one when it ends: so drain, or try again."""
    with EmbeddedTriton(repository) as server, GuardedClient(server.grpc_address, retries=0) as client:
        labels(client)
        with loaded(lambda: labels(client)) as load:
            time.sleep(1.5)
            told_to_stop = time.monotonic()
            os.kill(server.process_id, signal.SIGTERM)
            psutil.Process(server.process_id).wait(timeout=30)
            time.sleep(0.3)
    in_flight = [answer for sent, ended, answer in load.answers if sent < told_to_stop < ended]
    assert len(in_flight) == CALLERS, "the load is too light to tell"
    for error in load.errors():
        assert isinstance(error, ServerUnavailableError) or "no available versions" in str(error)
    assert all(isinstance(answer, Exception) or answer == [CLASSES] * len(IMAGES) for _, _, answer in load.answers)
    assert not any(isinstance(answer, Exception) for _, ended, answer in load.answers if ended < told_to_stop)


@pytest.mark.parametrize("end", ["stop", "SIGTERM", "SIGKILL"])
def test_with_retries_another_server_takes_over_and_no_request_is_lost(repository: Path, end: str) -> None:
    with ExitStack() as running:
        servers = [running.enter_context(EmbeddedTriton(repository)) for _ in range(2)]
        both = f"ipv4:{','.join(server.grpc_address for server in servers)}"
        client = running.enter_context(GuardedClient(both))
        for _ in range(4):  # until both are connected
            labels(client)
        with loaded(lambda: labels(client)) as load:
            time.sleep(1.0)
            before = load.answered()
            process = psutil.Process(servers[0].process_id)
            if end == "stop":
                servers[0].stop()
            else:
                process.send_signal(signal.Signals[end])
            process.wait(timeout=30)
            time.sleep(1.0)
        assert load.answered() > before + CALLERS
    assert load.errors() == []
    assert all(answer == [CLASSES] * len(IMAGES) for _, _, answer in load.answers)


def test_where_nobody_is_sent_there_any_more_a_stop_needs_no_retry(repository: Path) -> None:
    """The order in Kubernetes: endpoints are removed, a pause until the slowest request is answered, SIGTERM."""
    with ExitStack() as running:
        servers = [running.enter_context(EmbeddedTriton(repository)) for _ in range(2)]
        clients = [running.enter_context(GuardedClient(server.grpc_address, retries=0)) for server in servers]
        endpoints, lock = [*clients], threading.Lock()
        under_way, sent = dict.fromkeys(clients, 0), dict.fromkeys(clients, 0)

        def ask() -> list[int]:
            with lock:
                client = min(endpoints, key=lambda each: sent[each])
                under_way[client] += 1
                sent[client] += 1
            try:
                return labels(client)
            finally:
                with lock:
                    under_way[client] -= 1

        with loaded(ask) as load:
            time.sleep(2.0)
            with lock:
                endpoints.remove(clients[0])
            gives_up_at = time.monotonic() + 30
            while under_way[clients[0]] and time.monotonic() < gives_up_at:
                time.sleep(0.02)
            before = load.answered()
            os.kill(servers[0].process_id, signal.SIGTERM)
            psutil.Process(servers[0].process_id).wait(timeout=30)
            time.sleep(1.0)
    assert min(sent.values()) > 0
    assert load.answered() > before
    assert load.errors() == []


def test_a_server_that_is_stopped_answers_what_it_has(repository: Path) -> None:
    with EmbeddedTriton(repository) as server, GuardedClient(server.grpc_address, retries=0) as client:
        labels(client)
        with loaded(lambda: labels(client)) as load:
            time.sleep(1.5)
            told_to_stop = time.monotonic()
            server.stop()
            took = time.monotonic() - told_to_stop
    # A request is on its way for a moment: one that was sent just before may arrive just after.
    before = [(ended, answer) for sent, ended, answer in load.answers if sent < told_to_stop - 0.1]
    assert any(ended > told_to_stop for ended, _ in before), "the load is too light to tell"
    assert [answer for _, answer in before] == [[CLASSES] * len(IMAGES)] * len(before)
    assert any("no available versions" in str(error) for error in load.errors())
    assert took < 15


def test_a_request_that_finds_no_version_is_sent_again(repository: Path) -> None:
    with EmbeddedTriton(repository) as server:
        headers = control_headers(server.control_token)
        with (
            GuardedClient(server.grpc_address) as client,
            GuardedClient(server.grpc_address, headers=headers) as control,
        ):
            labels(client)
            control.ask("guarded", lambda triton, **options: triton.unload_model("guarded", **options))
            with GuardedClient(server.grpc_address, retries=0) as hasty, pytest.raises(ServerError, match="not loaded"):
                labels(hasty)
            loads = threading.Timer(
                0.5, lambda: control.ask("guarded", lambda triton, **options: triton.load_model("guarded", **options))
            )
            loads.start()
            assert labels(client) == [CLASSES] * len(IMAGES)
            loads.join()
