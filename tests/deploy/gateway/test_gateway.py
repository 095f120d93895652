"""The gateway before Triton, by the real Envoy: nobody gets past it to another model, whatever a message looks like."""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as messages

from client.api import GuardedClient, TlsOptions
from deploy.embedded.server import EmbeddedTriton
from deploy.gateway.local import local_gateway
from detector.errors import AccessDeniedError, ServerUnavailableError
from tests.certificates import OpenSsl
from tests.conftest import wait_for
from tests.deploy.embedded.certificates import unchecked, write_certificates
from tests.deploy.gateway.envoy import Gateway, gateway
from tests.networks import write_small_repository

SHAPE, CLASSES = (8, 7, 3), 5
IMAGES = np.random.default_rng(3).integers(0, 256, (40, *SHAPE), dtype=np.uint8)
SERVICE = "/inference.GRPCInferenceService"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gateway")
    write_certificates(folder)
    OpenSsl(folder).write_signed("stripwire-monitor", "subjectAltName=DNS:monitor\n")
    write_small_repository(folder / "repository", SHAPE, CLASSES)
    mount(folder, "server")
    return folder


def mount(folder: Path, certificate: str) -> None:
    """Put a certificate where the gateway looks, as the kubelet does: a link to a folder is exchanged."""
    version = folder / "tls" / f"..{certificate}"
    version.mkdir(parents=True)
    shutil.copy(folder / "ca.crt", version)
    for kind in ("crt", "key"):
        shutil.copy(folder / f"{certificate}.{kind}", version / f"tls.{kind}")
    (folder / "tls" / "..new").symlink_to(version.name)
    (folder / "tls" / "..new").replace(folder / "tls" / "..data")
    for name in ("ca.crt", "tls.crt", "tls.key"):
        if not (link := folder / "tls" / name).exists():
            link.symlink_to(f"..data/{name}")


@pytest.fixture(scope="module")
def triton(folder: Path) -> Iterator[EmbeddedTriton]:
    with EmbeddedTriton(folder / "repository") as running:
        yield running


@pytest.fixture(scope="module")
def before(folder: Path, triton: EmbeddedTriton) -> Iterator[Gateway]:
    """Yield the gateway before that server."""
    with gateway(folder / "gateway", folder / "tls", port_of(triton)) as running:
        yield running


def port_of(triton: EmbeddedTriton) -> str:
    return triton.grpc_address.rpartition(":")[2]


def known(folder: Path, certificate: str | None = "client") -> TlsOptions:
    if certificate == "expired":
        return unchecked(folder, certificate, lambda *pair: TlsOptions(folder / "ca.crt", *pair))
    pair = (None, None) if certificate is None else (folder / f"{certificate}.key", folder / f"{certificate}.crt")
    return TlsOptions(folder / "ca.crt", *pair)


def test_through_the_gateway_verdicts_are_the_same(before: Gateway, triton: EmbeddedTriton, folder: Path) -> None:
    with GuardedClient(triton.grpc_address) as direct, GuardedClient(before.address, tls=known(folder)) as through:
        assert through.metadata() == direct.metadata()
        ours, theirs = (client.classify(IMAGES, probabilities=True) for client in (through, direct))
    for name in ("labels", "entropy_bits", "p_values", "trojaned", "probabilities"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("certificate", [None, "stranger", "expired"])
def test_nobody_gets_in_without_a_certificate_of_the_authority(
    before: Gateway, folder: Path, certificate: str | None
) -> None:
    with (
        GuardedClient(before.address, tls=known(folder, certificate), retries=0, timeout_seconds=10) as client,
        pytest.raises(ServerUnavailableError),
    ):
        client.classify(IMAGES[:1])


@dataclass(frozen=True)
class Answer:
    status: str
    message: str

    @property
    def is_of_the_gateway(self) -> bool:
        return self.message.startswith("the gateway ")


def opened(folder: Path, address: str) -> grpc.Channel:
    files = (folder / name for name in ("ca.crt", "client.key", "client.crt"))
    credentials = grpc.ssl_channel_credentials(*(file.read_bytes() for file in files))
    return grpc.secure_channel(address, credentials, [("grpc.max_send_message_length", -1)])


@pytest.fixture(scope="module")
def channel(before: Gateway, folder: Path) -> Iterator[grpc.Channel]:
    with opened(folder, before.address) as one:
        yield one


def call(
    channel: grpc.Channel, method: str, *sent: bytes, compression: grpc.Compression = grpc.Compression.NoCompression
) -> Answer:
    """Call a method with messages as they are."""
    calling = channel.stream_unary(method, request_serializer=bytes, response_deserializer=bytes)
    try:
        calling(iter(sent), timeout=20, compression=compression)
    except grpc.RpcError as error:
        return Answer(error.code().name, error.details())
    return Answer("OK", "")


METHODS = {method.name for method in messages.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods}
OF_A_MODEL = {
    "ModelInfer": messages.ModelInferRequest,
    "ModelReady": messages.ModelReadyRequest,
    "ModelMetadata": messages.ModelMetadataRequest,
    "ModelConfig": messages.ModelConfigRequest,
    "ModelStatistics": messages.ModelStatisticsRequest,
}


def naming(method: str, model: str) -> bytes:
    field = "model_name" if method == "ModelInfer" else "name"
    encoded: bytes = OF_A_MODEL[method](**{field: model}).SerializeToString()
    return encoded


@pytest.mark.parametrize("method", OF_A_MODEL)
def test_no_model_but_the_guarded_one_can_be_asked(channel: grpc.Channel, method: str) -> None:
    for model in ("badnet", "repaired", "strip_perturb", "strip_verdict", "", "guarde", "guarded2", "guarded\0"):
        refused = call(channel, f"{SERVICE}/{method}", naming(method, model))
        assert (refused.status, refused.is_of_the_gateway) == ("PERMISSION_DENIED", True), model
    assert not call(channel, f"{SERVICE}/{method}", naming(method, "guarded")).is_of_the_gateway


def test_what_asks_no_model_is_known_one_by_one(channel: grpc.Channel) -> None:
    for method in ("ServerLive", "ServerReady", "ServerMetadata"):
        assert call(channel, f"{SERVICE}/{method}", b"").status == "OK"
    others = METHODS - OF_A_MODEL.keys() - {"ServerLive", "ServerReady", "ServerMetadata"}
    assert {"RepositoryModelLoad", "ModelStreamInfer", "SystemSharedMemoryRegister"} <= others
    paths = {
        f"{SERVICE}/{method}" for method in (*others, "", "ModelInfer/", "ModelInfer?", "ServerLive%20", "modelinfer")
    }
    paths |= {"/", "/grpc.health.v1.Health/Check", "//inference.GRPCInferenceService/ModelInfer"}
    for path in paths:
        for sent in (b"", naming("ModelInfer", "guarded")):
            refused = call(channel, path, sent)
            assert (refused.status, refused.is_of_the_gateway) == ("PERMISSION_DENIED", True), path


def test_what_could_be_understood_in_two_ways_is_turned_away(channel: grpc.Channel) -> None:
    ready, path = naming("ModelReady", "guarded"), f"{SERVICE}/ModelReady"
    assert call(channel, path, ready).status == "OK"
    for sent in (
        ready + naming("ModelReady", "badnet"),
        naming("ModelReady", "badnet") + ready,
        ready + ready,
        b"\x8a\x00\x07guarded",  # the tag in two bytes
        b"\x0b\x0c" + ready,  # field 1 as a group
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01" + ready,
        ready[:-1],
        ready + b"\x12",
    ):
        refused = call(channel, path, sent)
        assert (refused.status, refused.is_of_the_gateway) == ("INVALID_ARGUMENT", True), sent
    assert call(channel, path, ready, naming("ModelReady", "badnet")).status == "INVALID_ARGUMENT"  # two messages
    long = ready + messages.ModelReadyRequest(version="1" * 1000).SerializeToString()
    assert call(channel, path, long, compression=grpc.Compression.Gzip).status == "INVALID_ARGUMENT"


def test_a_message_that_would_take_long_to_read_is_not_read(channel: grpc.Channel) -> None:
    started = time.monotonic()
    refused = call(channel, f"{SERVICE}/ModelReady", naming("ModelReady", "guarded") + b"\x18\x00" * 2**23)  # 16 MiB
    assert (refused.status, refused.is_of_the_gateway) == ("INVALID_ARGUMENT", True)
    assert time.monotonic() - started < 10


def test_callers_who_hold_too_much_memory_are_cut_off_and_others_get_their_answers(
    folder: Path, triton: EmbeddedTriton, tmp_path: Path
) -> None:
    smaller = {"max_heap_size_bytes: 805306368": "max_heap_size_bytes: 134217728"}
    message = messages.ModelInferRequest(model_name="guarded", raw_input_contents=[bytes(2**24)]).SerializeToString()
    ended = threading.Event()

    def hold(address: str) -> str:
        def unfinished() -> Iterator[bytes]:
            yield message
            ended.wait(60)

        with opened(folder, address) as channel:
            calling = channel.stream_unary(f"{SERVICE}/ModelInfer", request_serializer=bytes)
            with pytest.raises(grpc.RpcError) as refused:
                calling(unfinished(), timeout=60)
        return str(refused.value.code().name)

    with (
        local_gateway(tmp_path / "gateway", folder / "tls", port_of(triton), smaller) as port,
        ThreadPoolExecutor(16) as holding,
    ):
        (envoy,) = (
            process
            for process in psutil.process_iter(["cmdline"])
            if str(tmp_path) in " ".join(process.info["cmdline"] or [])
        )
        calls = [holding.submit(hold, f"127.0.0.1:{port}") for _ in range(16)]
        wait_for(lambda: any(each.done() for each in calls))
        with GuardedClient(f"127.0.0.1:{port}", tls=known(folder)) as client:
            assert len(client.classify(IMAGES[:1]).labels) == 1
        assert envoy.memory_info().rss < 2**28  # its own and what was sent; 16 of them would be as much again
        ended.set()
        codes = {each.result() for each in calls}
    assert codes <= {"INTERNAL", "UNAVAILABLE", "INVALID_ARGUMENT"}  # cut off, not begun, or told what it lacks
    assert codes & {"INTERNAL", "UNAVAILABLE"}


def test_only_the_monitor_marks_requests_as_canaries(before: Gateway, folder: Path) -> None:
    with GuardedClient(before.address, tls=known(folder)) as client:
        with pytest.raises(AccessDeniedError, match="nobody but the monitor mark requests as canaries"):
            client.classify(IMAGES[:1], canary=True)
        assert len(client.classify(IMAGES[:1]).labels) == 1
    with GuardedClient(before.address, tls=known(folder, "stripwire-monitor")) as monitor:
        assert len(monitor.classify(IMAGES[:1], canary=True).labels) == 1


def test_a_script_that_fails_lets_nothing_through(folder: Path, triton: EmbeddedTriton, tmp_path: Path) -> None:
    broken = {"local path = handle:headers()": "local path = handle:noSuchThing()"}
    with (
        local_gateway(tmp_path / "gateway", folder / "tls", port_of(triton), broken) as port,
        opened(folder, f"127.0.0.1:{port}") as channel,
    ):
        refused = call(channel, f"{SERVICE}/ModelReady", naming("ModelReady", "guarded"))
    assert (refused.status, refused.message) == ("INTERNAL", "the gateway failed")
    assert "noSuchThing" in (tmp_path / "gateway" / "log").read_text()


VARINTS = st.integers(0, 2**64 - 1) | st.integers(0, 300)


def varint(number: int, padding: int = 0) -> bytes:
    """Return a number as protobuf writes it, or with more bytes than it needs."""
    groups = []
    while True:
        groups.append(number & 127)
        number >>= 7
        if not number:
            break
    groups += [0] * padding
    return bytes([group | 128 for group in groups[:-1]] + groups[-1:])


@st.composite
def fields(draw: st.DrawFn) -> bytes:
    """Return a field, of any number and kind, now and then malformed."""
    number, kind = draw(st.sampled_from([1, 1, 1, 2, 3, 5, 7, 15, 16, 17, 0])), draw(st.integers(0, 7))
    tag = varint(number << 3 | kind, draw(st.sampled_from([0, 0, 0, 1])))
    names = st.sampled_from([b"guarded", b"badnet", b"", b"\x0a\x06badnet"])
    content = draw(names | st.binary(max_size=20))
    if kind == 2:
        return tag + varint(len(content) + draw(st.sampled_from([0, 0, 0, 1, 200])), draw(st.integers(0, 1))) + content
    return tag + (varint(draw(VARINTS)) if kind == 0 else content)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(OF_A_MODEL)), st.lists(fields(), max_size=4).map(b"".join))
@example("ModelInfer", b"\x12\x04\x0a\x02ab\x0a\x07guarded\x0a\x06badnet")
@example("ModelInfer", b"\x0a\x87\x00guarded")
def test_whatever_a_message_is_made_of_triton_is_asked_for_the_guarded_model_alone(
    channel: grpc.Channel, method: str, message: bytes
) -> None:
    answer = call(channel, f"{SERVICE}/{method}", message)
    if answer.is_of_the_gateway:
        return
    try:
        asked = OF_A_MODEL[method].FromString(message)
    except DecodeError:
        return  # Triton's to refuse
    assert getattr(asked, "model_name" if method == "ModelInfer" else "name") == "guarded"


def test_whom_it_turned_away_is_written_down(before: Gateway, channel: grpc.Channel, folder: Path) -> None:
    with (
        GuardedClient(before.address, model="badnet", tls=known(folder)) as client,
        pytest.raises(AccessDeniedError, match="lets nobody ask another model than guarded"),
    ):
        client.metadata()
    call(channel, f"{SERVICE}/RepositoryIndex", b"")

    def written() -> bool:
        found = {(one["caller"], one["path"], one["by"]) for one in before.refusals()}
        mine = {("CN=client", f"{SERVICE}/{method}", "lua_response") for method in ("ModelMetadata", "RepositoryIndex")}
        return mine <= found

    wait_for(written)


def test_a_large_message_comes_through_and_one_that_is_too_large_is_told(channel: grpc.Channel) -> None:
    def sent(size: int) -> Answer:
        request = messages.ModelInferRequest(model_name="guarded", raw_input_contents=[bytes(size)])
        return call(channel, f"{SERVICE}/ModelInfer", request.SerializeToString())

    fits = sent(2**24)
    assert (fits.status, fits.is_of_the_gateway) == ("INVALID_ARGUMENT", False), fits  # Triton misses the input's shape
    refused = sent(2**25)
    assert (refused.status, refused.is_of_the_gateway) == ("RESOURCE_EXHAUSTED", True), refused


def test_a_renewed_certificate_is_shown_without_a_restart(before: Gateway, folder: Path) -> None:
    def shown() -> bytes | None:
        context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        context.load_cert_chain(folder / "client.crt", folder / "client.key")
        host, _, port = before.address.partition(":")
        with (
            socket.create_connection((host, int(port))) as plain,
            context.wrap_socket(plain, server_hostname=host) as encrypted,
        ):
            return encrypted.getpeercert(binary_form=True)

    def written(name: str) -> bytes:
        return ssl.PEM_cert_to_DER_cert((folder / f"{name}.crt").read_text())

    assert shown() == written("server")
    OpenSsl(folder).write_signed("renewed", "subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    mount(folder, "renewed")
    wait_for(lambda: shown() == written("renewed"))


def test_connections_end_after_a_while_and_no_request_with_them(
    folder: Path, triton: EmbeddedTriton, tmp_path: Path
) -> None:
    faster = {"max_connection_duration: 30s": "max_connection_duration: 1s", "drain_timeout: 3s": "drain_timeout: 0.2s"}
    troubles: list[BaseException] = []
    answered = [0] * 4

    def ask(which: int, address: str, ended: threading.Event) -> None:
        try:
            with GuardedClient(address, tls=known(folder), retries=0) as client:
                while not ended.is_set():
                    client.classify(IMAGES[:3])
                    answered[which] += 1
        except BaseException as error:  # noqa: BLE001  the test tells of it
            troubles.append(error)

    with gateway(tmp_path / "gateway", folder / "tls", port_of(triton), faster) as running:
        ended = threading.Event()
        threads = [threading.Thread(target=ask, args=(which, running.address, ended)) for which in range(len(answered))]
        for thread in threads:
            thread.start()
        ended.wait(8)
        ended.set()
        for thread in threads:
            thread.join()
    assert troubles == []
    assert min(answered) > 10
