"""A pod that goes, as a rollout has it, with times ten times as short: who calls through a Service loses no request."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from client.api import GuardedClient
from deploy.embedded import server as embedded
from detector.errors import ServerError
from tests.conftest import wait_for
from tests.deploy.kubernetes.manifests import server
from tests.deploy.kubernetes.processes import Place, serving

FASTER = 10


class VirtualAddress:
    """What a ClusterIP does: a connection is made to one of the pods that are in the Service then, and stays there.

    Attributes:
        pods: ports of those that are in the Service.
        last: of them, where the last connection went.
        port: where callers connect.
    """

    def __init__(self, pods: list[int]) -> None:
        self.pods = pods
        self.last = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def close(self) -> None:
        """Take no more connections, and wait until those that there are have ended."""
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _start(self, target: Callable[..., None], *arguments: socket.socket) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments)
        self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                self.last = next((pod for pod in self.pods if pod != self.last), self.pods[0])
                self._start(self._connect, caller, socket.create_connection(("127.0.0.1", self.last)))

    def _connect(self, caller: socket.socket, pod: socket.socket) -> None:
        with caller, pod:
            back = self._start(self._carry, pod, caller)
            self._carry(caller, pod)
            back.join()

    @staticmethod
    def _carry(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while piece := one.recv(1 << 16):
                other.sendall(piece)
        with suppress(OSError):
            other.shutdown(socket.SHUT_WR)


@contextmanager
def calling(port: int) -> Iterator[list[str]]:
    """Send one request after the other, none of them twice; yield what became of each so far, empty if all was well."""
    ended = threading.Event()
    outcomes: list[str] = []

    def ask(client: GuardedClient, images: NDArray[np.uint8]) -> str:
        try:
            client.classify(images)
        except ServerError as error:
            return str(error)
        return ""

    def call() -> None:
        with GuardedClient(f"127.0.0.1:{port}", retries=0, timeout_seconds=10) as client:
            images = np.zeros((1, *client.metadata().image_shape), np.uint8)
            while not ended.is_set():
                outcomes.append(ask(client, images))

    caller = threading.Thread(target=call)
    caller.start()
    try:
        yield outcomes
    finally:
        ended.set()
        caller.join()


@pytest.fixture
def triton_pods(repository: Path, tmp_path: Path) -> Iterator[dict[int, int]]:
    """Return two pods' servers: process id by gRPC port."""
    shutil.copytree(repository, tmp_path / "releases" / "1" / "repository")
    age = "--grpc-max-connection-age="
    shorter = {f"{age}30000": f"{age}{30000 // FASTER}"}
    started = {}
    with ExitStack() as stack:
        for name in ("a", "b"):
            place = Place(tmp_path, embedded.choose_ports("127.0.0.1", {"8001": 0, "8002": 0}))
            process = stack.enter_context(serving(place, "cpu", tmp_path / f"{name}.log", shorter))
            started[place.ports["8001"]] = process.pid
        for port in started:
            wait_for(partial(answers_at, port), 120)
        yield started


def answers_at(port: int) -> bool:
    with GuardedClient(f"127.0.0.1:{port}", retries=0) as client, suppress(ServerError):
        client.classify(np.zeros((1, *client.metadata().image_shape), np.uint8))
        return True
    return False


@pytest.mark.parametrize("kept", [0, 30], ids=["by the ClusterIP", "by DNS answers that are kept for 30 seconds"])
def test_callers_leave_a_pod_before_it_stops_and_lose_nothing(triton_pods: dict[int, int], kept: int) -> None:
    preparing = server("cpu").triton["lifecycle"]["preStop"]["sleep"]["seconds"] / FASTER
    with closing(VirtualAddress(list(triton_pods))) as service, calling(service.port) as outcomes:
        wait_for(lambda: len(outcomes) > 20)
        leaving = service.last
        going = time.monotonic()
        service.pods = [leaving]  # callers who were told its address connect to it for so long
        time.sleep(kept / FASTER)
        service.pods = [port for port in triton_pods if port != leaving]
        time.sleep(going + preparing - time.monotonic())
        before = len(outcomes)
        os.kill(triton_pods[leaving], signal.SIGTERM)
        wait_for(lambda: len(outcomes) > before + 100)
    assert service.last != leaving
    assert [outcome for outcome in outcomes if outcome] == []
