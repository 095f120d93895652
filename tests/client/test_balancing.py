"""One client of several servers: they take turns, and one that is lost is not missed."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from client.api import GuardedClient, TlsOptions
from client.connection import read_target, triton_options
from deploy.embedded.server import EmbeddedTriton
from detector.errors import InputError, ServerUnavailableError
from samples.hdf5 import read_hdf5
from tests.client.conftest import Connect
from tests.client.double import Server, images_of
from tests.client.names import NameServer
from tests.conftest import wait_for

# What an address means


@pytest.mark.parametrize(
    ("url", "is_local", "is_balanced"),
    [
        ("127.0.0.1:8001", True, False),
        ("triton.example:8001", False, False),
        ("unix:/run/triton.sock", True, False),
        ("dns:///localhost:8001", True, True),
        ("dns:///127.0.0.1:8001", True, True),
        ("dns:///triton.example:8001", False, True),
        ("dns://10.96.0.10/triton.example:8001", False, True),
        ("dns://10.96.0.10:53/localhost:8001", False, True),  # whatever that one says
        ("ipv4:127.0.0.1:8001", True, False),
        ("ipv4:127.0.0.1:8001,127.0.0.2:8002", True, True),
        ("ipv4:127.0.0.1:8001,192.0.2.1:8001", False, True),
        ("ipv6:[::1]:8001,[::1]:8002", True, True),
        ("ipv6:[2001:db8::1]:8001", False, False),
    ],
)
def test_an_address_is_of_this_machine_only_if_all_of_it_is(url: str, is_local: bool, is_balanced: bool) -> None:
    target = read_target(url)
    assert (target.is_local, target.is_balanced) == (is_local, is_balanced)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8001,127.0.0.1:8002",
        "dns:///a:8001,b:8001",
        "ipv4:localhost:8001",
        "ipv4:[::1]:8001",
        "ipv6:127.0.0.1:8001",
        "ipv4:127.0.0.1:8001,",
        "ipv4:127.0.0.1",
        "dns:triton:8001",
        "dns:///",
        "xds:///triton:8001",
    ],
)
def test_what_is_no_address_is_refused(connect: Connect, url: str) -> None:
    with pytest.raises(InputError, match="url: got"):
        connect(url)


@pytest.mark.parametrize(
    "url", ["dns:///triton.example:8001", "dns://127.0.0.1:53/localhost:8001", "ipv4:127.0.0.1:8001,192.0.2.1:8001"]
)
def test_a_secret_goes_in_plaintext_to_none_of_several_servers_elsewhere(connect: Connect, url: str) -> None:
    with pytest.raises(InputError, match="is another machine and the connection is not encrypted"):
        connect(url, token="secret")  # noqa: S106
    connect("ipv4:127.0.0.1:8001,127.0.0.2:8001", token="secret").close()  # noqa: S106


def test_a_proxy_may_stand_before_names_but_not_before_lists_of_addresses() -> None:
    def options(url: str) -> dict[str, Any]:
        return dict(triton_options(read_target(url), None)["channel_args"])

    assert options("dns:///triton.example:8001")["grpc.enable_http_proxy"] == 1
    for url in ("dns:///localhost:8001", "ipv4:192.0.2.1:8001,192.0.2.2:8001"):
        assert options(url)["grpc.enable_http_proxy"] == 0


def test_a_proxy_of_the_environment_is_not_asked_for_servers_on_this_machine(
    connect: Connect, servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:1")
    with connect(listed(servers), retries=0) as client:
        assert client.classify(images_of([7])).labels.tolist() == [2]


def test_shared_memory_is_for_one_server(connect: Connect) -> None:
    with (
        connect("ipv4:127.0.0.1:8001,127.0.0.1:8002") as client,
        pytest.raises(InputError, match=r"shared memory: .* may be several servers, expected one"),
    ):
        client.classify(images_of([1]), shared_memory=True)


# Taking turns

HOSTS = ("127.0.0.1", "127.0.0.2")


def start(
    host: str, port: int, credentials: grpc.ServerCredentials | None = None, **options: int
) -> tuple[Server, grpc.Server]:
    double = Server()
    return double, double.start(f"{host}:{port}", credentials, **options)


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    """Return two servers, at the same port of different addresses."""
    first, running = start(HOSTS[0], 0)
    with ExitStack() as stack:
        stack.callback(lambda: running.stop(grace=None).wait())
        second, also_running = start(HOSTS[1], int(first.url.rpartition(":")[2]))
        stack.callback(lambda: also_running.stop(grace=None).wait())
        yield [first, second]


def listed(servers: list[Server]) -> str:
    return f"ipv4:{','.join(server.url for server in servers)}"


def port_of(server: Server) -> str:
    return server.url.rpartition(":")[2]


def meet(client: Any, servers: list[Server]) -> None:
    """Send requests until each server had one: connections are made one after the other."""

    def have_met() -> bool:
        client.classify(images_of([1]))
        return all(server.inferences for server in servers)

    wait_for(have_met)
    for server in servers:
        server.inferences.clear()


def test_the_addresses_of_a_name_take_turns_over_one_connection_each(connect: Connect, servers: list[Server]) -> None:
    with (
        NameServer(*HOSTS) as names,
        connect(f"dns://{names.authority}/servers.test:{port_of(servers[0])}") as client,
    ):
        meet(client, servers)
        for _ in range(20):
            client.classify(images_of([1]))
    assert [len(server.inferences) for server in servers] == [10, 10]
    assert [len({inference.peer for inference in server.inferences}) for server in servers] == [1, 1]


def test_listed_addresses_take_turns(connect: Connect, servers: list[Server]) -> None:
    for server in servers:
        server.max_batch_size = 1
    with connect(listed(servers)) as client:
        meet(client, servers)
        client.classify(images_of(range(20)))
    assert [len(server.inferences) for server in servers] == [10, 10]


def test_the_requests_of_one_server_share_a_connection(connect: Connect, servers: list[Server]) -> None:
    server = servers[0]
    server.max_batch_size = 1
    with connect(server.url) as client, connect(server.url) as another:
        for _ in range(3):
            client.classify(images_of(range(10)))
            another.classify(images_of(range(10)))
    assert len({inference.peer for inference in server.inferences}) == 1


def test_a_server_that_comes_in_place_of_others_is_found_by_its_name(connect: Connect) -> None:
    first, running = start(HOSTS[0], 0)
    with NameServer(HOSTS[0]) as names, connect(f"dns://{names.authority}/servers.test:{port_of(first)}") as client:
        client.classify(images_of([1]))
        running.stop(grace=None).wait()
        names.addresses[:] = [HOSTS[1]]
        second, running = start(HOSTS[1], int(port_of(first)))
        assert client.classify(images_of([8])).labels.tolist() == [3]
        assert [inference.batch.flat[0] for inference in second.inferences] == [8]
        running.stop(grace=None).wait()


def test_a_server_that_is_added_is_seen_when_a_connection_has_reached_its_age(connect: Connect) -> None:
    first, running = start(HOSTS[0], 0, max_connection_age_ms=500)
    second, also_running = start(HOSTS[1], int(port_of(first)))
    with NameServer(HOSTS[0]) as names, connect(f"dns://{names.authority}/servers.test:{port_of(first)}") as client:
        client.classify(images_of([1]))
        names.addresses.append(HOSTS[1])
        meet(client, [first, second])
    for server in (running, also_running):
        server.stop(grace=None).wait()


def test_several_servers_that_are_all_away_are_said_to_be(connect: Connect) -> None:
    url = "ipv4:127.0.0.1:1,127.0.0.2:1"
    with (
        connect(url, sleep=lambda _: None) as client,
        pytest.raises(ServerUnavailableError, match=f"{url}: the server is unavailable"),
    ):
        client.classify(images_of([1]))


@pytest.fixture
def encrypted_servers(certificates: Path) -> Iterator[list[Server]]:
    """Return two servers with a certificate for `stripwire.test`."""
    pair = ((certificates / "server.key").read_bytes(), (certificates / "server.crt").read_bytes())
    credentials = grpc.ssl_server_credentials([pair])
    first, running = start(HOSTS[0], 0, credentials)
    second, also_running = start(HOSTS[1], int(port_of(first)), credentials)
    yield [first, second]
    for server in (running, also_running):
        server.stop(grace=None).wait()


def test_the_certificate_of_each_server_is_for_the_name_that_they_share(
    connect: Connect, encrypted_servers: list[Server], certificates: Path
) -> None:
    tls = TlsOptions(certificates / "ca.crt")
    with NameServer(*HOSTS) as names:
        address = f"dns://{names.authority}/%s:{port_of(encrypted_servers[0])}"
        with connect(address % "stripwire.test", tls=tls, token="secret") as client:  # noqa: S106
            meet(client, encrypted_servers)
        with connect(address % "other.test", tls=tls, retries=0) as client, pytest.raises(ServerUnavailableError):
            client.classify(images_of([1]))


def test_listed_addresses_need_the_name_in_their_certificates(
    connect: Connect, encrypted_servers: list[Server], certificates: Path
) -> None:
    with pytest.raises(InputError, match=r"tls: ipv4:.* has no name to look for"):
        connect(listed(encrypted_servers), tls=TlsOptions(certificates / "ca.crt"))
    tls = TlsOptions(certificates / "ca.crt", server_name="stripwire.test")
    with connect(listed(encrypted_servers), tls=tls) as client:
        meet(client, encrypted_servers)


# Real servers


class Load:
    """Callers that classify, each one request after another, until they are told to stop.

    Attributes:
        answers: how many requests were answered.
        failures: what was raised.
    """

    def __init__(self, client: Any, images: NDArray[np.uint8], callers: int = 4) -> None:
        self.answers = 0
        self.failures: Counter[str] = Counter()
        self._client, self._images = client, images
        self._ended = threading.Event()
        self._pool = ThreadPoolExecutor(callers)
        self._callers = [self._pool.submit(self._call) for _ in range(callers)]

    def _call(self) -> None:
        while not self._ended.is_set():
            try:
                assert len(self._client.classify(self._images)) == len(self._images)
                self.answers += 1
            except Exception as error:  # noqa: BLE001, PERF203  whatever a caller would see
                self.failures[repr(error)] += 1

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._pool.shutdown()

    def goes_on(self, answers: int = 30) -> None:
        """Wait until so many more requests are answered."""
        enough = self.answers + answers
        wait_for(lambda: self.answers >= enough)


def inferences(server: EmbeddedTriton) -> int:
    with GuardedClient(server.grpc_address) as client:
        told = client.ask("guarded", lambda triton, **options: triton.get_inference_statistics("guarded", **options))
    return sum(int(model.inference_stats.success.count) for model in told.model_stats)


def test_a_server_that_is_killed_or_stopped_under_load_costs_no_request(
    connect: Connect, server: EmbeddedTriton, repository: Path, badnet: Path
) -> None:
    images = read_hdf5(badnet / "clean_test_data.h5").images[:2]
    registry = CollectorRegistry()
    before = inferences(server)
    with ExitStack() as stack:
        second = stack.enter_context(EmbeddedTriton(repository))
        addresses = [running.grpc_address for running in (server, second)]
        client = stack.enter_context(connect(f"ipv4:{','.join(addresses)}", registry=registry))
        load = stack.enter_context(Load(client, images))
        wait_for(lambda: inferences(server) > before and inferences(second) > 0)

        psutil.Process(second.process_id).send_signal(signal.SIGKILL)
        load.goes_on()
        second.stop()  # removes what it left

        port = int(second.grpc_address.rpartition(":")[2])
        third = stack.enter_context(EmbeddedTriton(repository, grpc_port=port))
        wait_for(lambda: inferences(third) > 0)
        load.goes_on()
        third.stop()
        load.goes_on()
    assert not load.failures
    assert registry.get_sample_value("stripwire_client_requests_total", {"outcome": "unavailable"}) == 0
    assert registry.get_sample_value("stripwire_client_retries_total") != 0
