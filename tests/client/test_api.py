from __future__ import annotations

import gc
import re
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client import REGISTRY, CollectorRegistry
from tritonclient.utils import InferenceServerException

from client.api import ERROR_OF_STATUS, GuardedClient, TlsOptions
from client.metrics import OUTCOME_OF_ERROR
from detector.errors import (
    AccessDeniedError,
    DataError,
    DeadlineExceededError,
    InputError,
    RequestRejectedError,
    ServerError,
    ServerUnavailableError,
)
from tests.client.conftest import Connect
from tests.client.double import CLASSES, SHAPE, Server, images_of

FAILURES = [status for status in grpc.StatusCode if status is not grpc.StatusCode.OK]


@pytest.fixture
def server() -> Iterator[Server]:
    double = Server()
    running = double.start()
    yield double
    running.stop(grace=None).wait()


@pytest.fixture
def client(connect: Connect, server: Server) -> Iterator[GuardedClient]:
    with connect(server.url, sleep=lambda _: None) as opened:
        yield opened


# Classifying


def test_each_image_gets_its_label_verdict_and_entropy(client: GuardedClient) -> None:
    verdicts = client.classify(images_of([7, 200, 12]))
    assert verdicts.labels.tolist() == [2, 0, 2]
    assert verdicts.trojaned.tolist() == [False, True, False]
    np.testing.assert_allclose(verdicts.entropy_bits, [0.7, 20.0, 1.2], rtol=1e-6)
    np.testing.assert_allclose(verdicts.p_values, [7 / 255, 200 / 255, 12 / 255], rtol=1e-6)
    assert verdicts.perturbations.tolist() == [7, 2, 1]
    assert [array.dtype.name for array in (verdicts.labels, verdicts.trojaned, verdicts.entropy_bits)] == [
        "int32",
        "bool",
        "float32",
    ]
    assert verdicts.probabilities is None
    assert verdicts.classes == CLASSES
    assert [verdict.label for verdict in verdicts] == [2, 0, 2]
    assert verdicts[1].trojaned is True
    assert len(verdicts) == 3


def test_one_image_needs_no_batch_dimension(client: GuardedClient) -> None:
    assert client.classify(images_of([8])[0]).labels.tolist() == [3]


def test_probabilities_come_only_when_asked_for(client: GuardedClient, server: Server) -> None:
    client.classify(images_of([1]))
    verdicts = client.classify(images_of([1, 4]), probabilities=True)
    assert verdicts.probabilities is not None
    np.testing.assert_array_equal(verdicts.probabilities, [[0, 1, 0, 0, 0], [0, 0, 0, 0, 1]])
    assert server.inferences[0].outputs == ["label", "trojaned", "entropy", "p_value", "perturbations"]
    assert server.inferences[1].outputs == ["label", "trojaned", "entropy", "p_value", "perturbations", "probabilities"]


def test_more_images_than_the_server_takes_are_split_and_stay_in_order(client: GuardedClient, server: Server) -> None:
    server.max_batch_size = 4
    server.delays_seconds = {0: 0.1, 8: 0.05}  # the first answer comes last
    progress: list[tuple[int, int]] = []
    verdicts = client.classify(images_of(range(30)), on_progress=lambda done, total: progress.append((done, total)))
    assert verdicts.labels.tolist() == [pixel % CLASSES for pixel in range(30)]
    assert sorted(len(inference.batch) for inference in server.inferences) == [2, 4, 4, 4, 4, 4, 4, 4]
    assert progress == [(4, 30), (8, 30), (12, 30), (16, 30), (20, 30), (24, 30), (28, 30), (30, 30)]


def test_no_more_requests_are_in_flight_than_the_window_allows(connect: Connect, server: Server) -> None:
    server.max_batch_size = 1
    server.delays_seconds = dict.fromkeys(range(9), 0.05)
    with connect(server.url, window=3) as client:
        client.classify(images_of(range(9)))
    assert 1 < server.most_running <= 3


def test_the_server_is_asked_about_the_model_only_once(client: GuardedClient, server: Server) -> None:
    for _ in range(3):
        client.classify(images_of([1]))
    assert server.metadata_calls == 1


def test_an_empty_batch_is_refused_without_a_request(client: GuardedClient, server: Server) -> None:
    with pytest.raises(DataError, match="got an empty batch, expected at least one image"):
        client.classify(images_of([]))
    assert server.inferences == []


def test_the_original_network_is_asked_with_the_plain_images_as_float_pixels(
    client: GuardedClient, server: Server
) -> None:
    server.max_batch_size = 2
    images = images_of([3, 250, 4])
    answers = client.original_probabilities(images)
    assert answers.argmax(axis=1).tolist() == [3, 0, 4]
    assert answers.shape == (3, CLASSES)
    sent = sorted(server.inferences, key=lambda inference: -len(inference.batch))
    assert [inference.model for inference in sent] == ["badnet", "badnet"]
    assert sent[0].batch.dtype == np.float32
    np.testing.assert_array_equal(sent[0].batch, images[:2, None].astype(np.float32))


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        (np.zeros((2, *SHAPE), np.float32), "got float32"),
        (np.zeros((2, 5, 3, 3), np.uint8), r"got shape \(2, 5, 3, 3\)"),
        (np.zeros((4, 3), np.uint8), r"got shape \(4, 3\)"),
        (np.zeros((1, 1, *SHAPE), np.uint8), r"got shape \(1, 1, 4, 3, 3\)"),
        ([[1]], "got list"),
    ],
)
def test_images_that_the_model_does_not_take_are_never_sent(
    client: GuardedClient, server: Server, images: Any, complaint: str
) -> None:
    for ask in (client.classify, client.original_probabilities):
        with pytest.raises(DataError, match=rf"{complaint}.*takes uint8 of shape \(batch, 4, 3, 3\)"):
            ask(images)
    assert server.inferences == []


def test_images_need_not_be_contiguous(client: GuardedClient) -> None:
    assert client.classify(images_of([1, 2, 3])[::-1]).labels.tolist() == [3, 2, 1]


# Request ids


def test_every_verdict_has_the_id_of_its_request_and_the_row_in_it(client: GuardedClient, server: Server) -> None:
    verdicts = client.classify(images_of(range(3)))
    (sent,) = server.inferences
    assert re.fullmatch("[0-9a-f]{32}", sent.request_id)
    assert verdicts.request_ids == (f"{sent.request_id}.0", f"{sent.request_id}.1", f"{sent.request_id}.2")
    assert [verdict.request_id for verdict in verdicts] == list(verdicts.request_ids)


def test_each_request_of_a_call_has_an_id_of_its_own(client: GuardedClient, server: Server) -> None:
    server.max_batch_size = 2
    verdicts = client.classify(images_of(range(5)))
    client.original_probabilities(images_of(range(4)))
    ids = {int(sent.batch.flat[0]): sent.request_id for sent in server.inferences if sent.model == "guarded"}
    assert verdicts.request_ids == (f"{ids[0]}.0", f"{ids[0]}.1", f"{ids[2]}.0", f"{ids[2]}.1", f"{ids[4]}.0")
    assert len({sent.request_id for sent in server.inferences}) == 3 + 2


@pytest.mark.parametrize("given", ["a", "order_4711.page:2-x", "x" * 100])
def test_a_given_id_is_the_request_s(client: GuardedClient, server: Server, given: str) -> None:
    assert client.classify(images_of([1, 2]), request_id=given).request_ids == (f"{given}.0", f"{given}.1")
    assert [sent.request_id for sent in server.inferences] == [given]


def test_the_requests_under_one_given_id_are_numbered(client: GuardedClient, server: Server) -> None:
    server.max_batch_size = 2
    verdicts = client.classify(images_of(range(5)), request_id="7f3a")
    assert verdicts.request_ids == ("7f3a-0.0", "7f3a-0.1", "7f3a-1.0", "7f3a-1.1", "7f3a-2.0")
    assert {int(sent.batch.flat[0]): sent.request_id for sent in server.inferences} == {
        0: "7f3a-0",
        2: "7f3a-1",
        4: "7f3a-2",
    }


def test_a_request_that_is_sent_again_keeps_its_id(client: GuardedClient, server: Server) -> None:
    server.failures.extend([(grpc.StatusCode.UNAVAILABLE, "busy")] * 2)
    verdicts = client.classify(images_of([1]))
    assert [f"{sent.request_id}.0" for sent in server.inferences] == list(verdicts.request_ids) * 3


@pytest.mark.parametrize("given", ["", "x" * 101, "two words", "a/b", "../up", "ü", "line\n", 7])
def test_an_id_that_cannot_name_a_request_is_refused(client: GuardedClient, server: Server, given: Any) -> None:
    with pytest.raises(InputError, match=r"request_id: got .*, expected 1 to 100 letters, digits or any of"):
        client.classify(images_of([1]), request_id=given)
    assert server.inferences == []


# Metrics


def samples(registry: CollectorRegistry) -> dict[str, float]:
    """Return what is counted, by name and label, without histogram buckets and creation times."""
    return {
        " ".join([sample.name.removeprefix("stripwire_client_"), *sample.labels.values()]): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if not sample.name.endswith(("_created", "_bucket", "_sum"))
    }


def test_every_count_is_there_from_the_start(connect: Connect, server: Server) -> None:
    registry = CollectorRegistry()
    connect(server.url, registry=registry).close()
    outcomes = ("answered", "unavailable", "deadline", "denied", "rejected", "failed", "cancelled")
    assert samples(registry) == {
        **dict.fromkeys((f"requests_total {outcome}" for outcome in outcomes), 0),
        "request_seconds_count": 0,
        "inputs_total accepted": 0,
        "inputs_total rejected": 0,
        "retries_total": 0,
    }


def test_requests_verdicts_and_retries_are_counted(connect: Connect, server: Server) -> None:
    registry = CollectorRegistry()
    server.max_batch_size = 2
    server.delays_seconds = {0: 0.2}
    with connect(server.url, registry=registry, sleep=lambda _: None) as client:
        client.metadata()
        asked = samples(registry)["requests_total answered"]
        server.failures.extend([(grpc.StatusCode.UNAVAILABLE, "busy")] * 2)
        client.classify(images_of([0, 200, 255, 4, 5]))
        client.classify(images_of([255]), canary=True)
        counted = samples(registry)
        assert counted["requests_total answered"] == asked + 4
        assert counted["request_seconds_count"] == 4
        assert counted["inputs_total accepted"] == 3
        assert counted["inputs_total rejected"] == 2  # but for the canary
        assert counted["retries_total"] == 2
        seconds = registry.get_sample_value("stripwire_client_request_seconds_sum")
        assert seconds is not None
        assert 0.2 <= seconds < 20


@pytest.mark.parametrize("status", FAILURES, ids=lambda status: status.name)
def test_every_failure_is_counted_by_its_kind(connect: Connect, server: Server, status: grpc.StatusCode) -> None:
    registry = CollectorRegistry()
    with connect(server.url, registry=registry, sleep=lambda _: None) as client:
        client.metadata()
        before = samples(registry)
        server.failures.extend([(status, "no")] * 9)
        with pytest.raises(ServerError):
            client.classify(images_of([1]))
        grown = {name: count - before[name] for name, count in samples(registry).items() if count != before[name]}
    assert grown.pop("retries_total", 0) == (4 if status is grpc.StatusCode.UNAVAILABLE else 0)
    assert grown == {f"requests_total {OUTCOME_OF_ERROR[ERROR_OF_STATUS[status]]}": 1}


def test_what_is_given_up_because_another_request_failed_is_counted_too(connect: Connect, server: Server) -> None:
    registry = CollectorRegistry()
    server.max_batch_size = 1
    with connect(server.url, registry=registry) as client:
        client.metadata()
        server.failures.append((grpc.StatusCode.INTERNAL, "stub is not healthy"))
        server.delays_seconds = dict.fromkeys(range(1, 50), 0.3)
        with pytest.raises(ServerError):
            client.classify(images_of(range(50)))
    counted = samples(registry)
    assert (counted["requests_total failed"], counted["requests_total cancelled"]) == (1, 3)


def test_clients_may_share_a_registry(connect: Connect, server: Server) -> None:
    registry = CollectorRegistry()
    for _ in range(2):
        with connect(server.url, registry=registry) as client:
            client.classify(images_of([1, 2]))
    assert samples(registry)["inputs_total accepted"] == 4


def test_without_a_registry_nothing_is_registered(client: GuardedClient) -> None:
    client.classify(images_of([1]))
    assert not [metric.name for metric in REGISTRY.collect() if metric.name.startswith("stripwire_client")]


def test_the_metrics_go_with_their_registry() -> None:
    registry = CollectorRegistry()
    GuardedClient("127.0.0.1:1", registry=registry).close()
    gone = weakref.ref(registry)
    del registry
    gc.collect()
    assert gone() is None


# About the server


def test_metadata_tells_shape_classes_versions_and_batch_size(client: GuardedClient) -> None:
    about = client.metadata()
    assert (about.model, about.versions, about.image_shape, about.classes, about.max_batch_size) == (
        "guarded",
        ("1", "2"),
        SHAPE,
        CLASSES,
        64,
    )


def test_a_foreign_model_is_refused_with_what_it_offers(client: GuardedClient, server: Server) -> None:
    server.input_datatype = "FP32"
    with pytest.raises(ServerError, match=r"got inputs image FP32 \[-1, 4, 3, 3\].*expected one UINT8 input 'image'"):
        client.classify(images_of([1]))


def test_a_model_without_batching_is_refused(client: GuardedClient, server: Server) -> None:
    server.max_batch_size = 0
    with pytest.raises(ServerError, match="max_batch_size 0"):
        client.metadata()


@pytest.mark.parametrize("ready", [True, False])
def test_readiness_is_what_the_server_says(client: GuardedClient, server: Server, ready: bool) -> None:
    server.ready = ready
    assert client.is_ready() is ready


def test_an_absent_server_is_not_ready(connect: Connect) -> None:
    with connect("127.0.0.1:1") as client:
        assert client.is_ready() is False


def test_a_server_that_refuses_us_is_no_matter_of_readiness(client: GuardedClient, server: Server) -> None:
    server.metadata_failures.append((grpc.StatusCode.UNAUTHENTICATED, "who are you?"))
    with pytest.raises(AccessDeniedError, match="who are you"):
        client.is_ready()


# Failures


def test_every_grpc_status_has_an_error_of_ours() -> None:
    assert set(ERROR_OF_STATUS) == set(grpc.StatusCode)


@pytest.mark.parametrize("status", FAILURES, ids=lambda status: status.name)
def test_a_failed_inference_raises_our_error_with_address_and_details(
    client: GuardedClient, server: Server, status: grpc.StatusCode
) -> None:
    server.failures.extend([(status, "the details")] * 9)
    with pytest.raises(ServerError) as caught:
        client.classify(images_of([1]))
    assert type(caught.value) is ERROR_OF_STATUS[status]
    assert str(caught.value).startswith(f"{server.url}: ")
    if status is not grpc.StatusCode.DEADLINE_EXCEEDED:
        assert "the details" in str(caught.value)
    assert not isinstance(caught.value, InferenceServerException)


@pytest.mark.parametrize("status", FAILURES, ids=lambda status: status.name)
def test_a_failed_question_about_the_model_raises_our_error(
    client: GuardedClient, server: Server, status: grpc.StatusCode
) -> None:
    server.metadata_failures.extend([(status, "the details")] * 9)
    with pytest.raises(ServerError) as caught:
        client.metadata()
    assert type(caught.value) is ERROR_OF_STATUS[status]


def test_only_unavailability_is_tried_again(client: GuardedClient, server: Server) -> None:
    for status in FAILURES:
        server.failures = deque([(status, "no")] * 9)
        server.inferences.clear()
        with pytest.raises(ServerError):
            client.classify(images_of([1]))
        assert len(server.inferences) == (5 if status is grpc.StatusCode.UNAVAILABLE else 1), status


def test_a_passing_unavailability_goes_unnoticed_and_the_pauses_grow(connect: Connect, server: Server) -> None:
    server.metadata_failures.append((grpc.StatusCode.UNAVAILABLE, "starting"))
    server.failures.extend([(grpc.StatusCode.UNAVAILABLE, "busy")] * 4)
    pauses: list[float] = []
    with connect(server.url, sleep=pauses.append) as client:
        assert client.classify(images_of([9])).labels.tolist() == [4]
    assert len(pauses) == 5
    for pause, least in zip(pauses[1:], (0.2, 0.4, 0.8, 1.6), strict=True):
        assert least <= pause <= least + 0.2  # jitter


def test_batches_that_met_an_unavailable_server_still_come_back_in_order(client: GuardedClient, server: Server) -> None:
    server.max_batch_size = 2
    server.failures.extend([(grpc.StatusCode.UNAVAILABLE, "busy")] * 3)
    verdicts = client.classify(images_of(range(20)))
    assert verdicts.labels.tolist() == [pixel % CLASSES for pixel in range(20)]


def test_retries_stop_before_the_timeout_would_pass(connect: Connect, server: Server) -> None:
    server.failures.extend([(grpc.StatusCode.UNAVAILABLE, "busy")] * 99)
    pauses: list[float] = []
    client = connect(server.url, retries=50, timeout_seconds=1.0, sleep=pauses.append)
    with client, pytest.raises(ServerUnavailableError):
        client.classify(images_of([1]))
    assert all(pause < 1.0 for pause in pauses)
    assert len(pauses) < 4


def test_an_absent_server_is_named_along_with_the_way_to_start_one(connect: Connect) -> None:
    client = connect("127.0.0.1:1", sleep=lambda _: None)
    with client, pytest.raises(ServerUnavailableError, match=r"127\.0\.0\.1:1: .*stripwire serve"):
        client.classify(images_of([1]))


def test_a_server_that_comes_up_late_is_found(connect: Connect, server: Server) -> None:
    late = Server()
    port = server.url.rpartition(":")[2]
    late_address = f"127.0.0.2:{port}"
    started: list[grpc.Server] = []

    def start_then_wait(seconds: float) -> None:
        if not started:
            started.append(late.start(late_address))
        time.sleep(seconds)

    with connect(late_address, sleep=start_then_wait) as client:
        assert client.classify(images_of([2])).labels.tolist() == [2]
    started[0].stop(grace=None).wait()


def test_an_answer_that_takes_too_long_is_given_up(connect: Connect, server: Server) -> None:
    with connect(server.url, timeout_seconds=0.3) as client:
        client.metadata()
        server.delays_seconds[1] = 0.8
        with pytest.raises(DeadlineExceededError, match=r"'guarded' did not answer within 0\.3 s"):
            client.classify(images_of([1]))


def test_after_a_failure_the_requests_in_flight_are_cancelled(client: GuardedClient, server: Server) -> None:
    server.max_batch_size = 1
    client.metadata()
    server.failures.append((grpc.StatusCode.INTERNAL, "stub is not healthy"))
    server.delays_seconds = dict.fromkeys(range(1, 50), 0.5)
    with pytest.raises(ServerError, match="stub is not healthy"):
        client.classify(images_of(range(50)))
    while server.running:
        time.sleep(0.02)
    assert len(server.inferences) <= 4
    assert server.abandoned >= len(server.inferences) - 1


def test_a_model_that_is_not_loaded_is_said_so(client: GuardedClient, server: Server) -> None:
    server.metadata_failures.append((grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'badnet' is not found"))
    with pytest.raises(ServerError, match="has not loaded the model 'badnet'"):
        client.original_probabilities(images_of([1]))


def test_a_server_without_model_control_is_named_at_once(client: GuardedClient, server: Server) -> None:
    said = "explicit model load / unload is not allowed if polling is enabled"
    server.metadata_failures.append((grpc.StatusCode.UNAVAILABLE, said))
    with pytest.raises(ServerError, match="started without --model-control-mode=explicit") as caught:
        client.ask("guarded", lambda triton, **options: triton.get_model_metadata("guarded", **options))
    assert type(caught.value) is ServerError
    assert server.metadata_calls == 1  # trying again would not help


def test_a_restricted_protocol_is_a_matter_of_credentials(client: GuardedClient, server: Server) -> None:
    said = "This protocol is restricted, expecting header 'triton-grpc-protocol-key'"
    server.failures.append((grpc.StatusCode.UNAVAILABLE, said))
    with pytest.raises(AccessDeniedError, match="triton-grpc-protocol-key"):
        client.classify(images_of([1]))
    assert len(server.inferences) == 1


def test_a_refused_request_makes_the_client_ask_about_the_model_again(client: GuardedClient, server: Server) -> None:
    client.metadata()
    server.classes = 7
    server.failures.append((grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape"))
    with pytest.raises(RequestRejectedError):
        client.classify(images_of([1]))
    assert client.metadata().classes == 7


@pytest.mark.parametrize(
    ("output", "answer", "complaint"),
    [
        ("label", None, "lacks output 'label'"),
        ("label", np.zeros((1, 1), np.int64), r"got int64 of shape \(1, 1\), expected int32 of shape \(1, 1\)"),
        ("trojaned", np.zeros((2, 1), np.bool_), r"got bool of shape \(2, 1\), expected bool of shape \(1, 1\)"),
        ("entropy", np.zeros((0, 1), np.float32), r"got float32 of shape \(0, 1\)"),
    ],
)
def test_an_answer_that_breaks_the_contract_is_refused(
    client: GuardedClient, server: Server, output: str, answer: Any, complaint: str
) -> None:
    server.replace_outputs = {output: answer}
    with pytest.raises(ServerError, match=complaint):
        client.classify(images_of([1]))


def test_an_answer_without_its_bytes_is_refused(client: GuardedClient, server: Server) -> None:
    class Hollow(np.ndarray[Any, Any]):  # what Triton's stub sends under NumPy 2
        def tobytes(self, order: Any = "C") -> bytes:  # noqa: ARG002
            return b""

    server.replace_outputs = {"entropy": np.zeros((1, 1), np.float32).view(Hollow)}
    with pytest.raises(ServerError, match="output 'entropy' is damaged"):
        client.classify(images_of([1]))


def test_a_closed_client_says_so(client: GuardedClient) -> None:
    client.close()
    for ask in (client.is_ready, client.metadata, lambda: client.classify(images_of([1]))):
        with pytest.raises(InputError, match="it was closed"):
            ask()


# Options and secrets


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"url": "http://127.0.0.1:8001"}, "expected host:port"),
        ({"url": "127.0.0.1"}, "expected host:port"),
        ({"url": "host:99999"}, "expected host:port"),
        ({"timeout_seconds": 0}, "timeout_seconds: got 0"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds: got nan"),
        ({"retries": -1}, "retries: got -1"),
        ({"window": 0}, "window: got 0"),
        ({"token": "two words"}, "token: "),
        ({"token": ""}, "token: "),
        ({"headers": {"key": "line\nbreak"}}, "headers: got 'key'"),
    ],
)
def test_options_that_cannot_be_used_are_refused(connect: Connect, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        connect(**options)


def test_the_token_travels_as_a_bearer_header_along_with_other_headers(connect: Connect, server: Server) -> None:
    with connect(server.url, token="secret", headers={"Triton-Grpc-Protocol-Key": "k"}) as client:  # noqa: S106
        client.classify(images_of([1]))
    assert server.inferences[0].headers["authorization"] == "Bearer secret"
    assert server.inferences[0].headers["triton-grpc-protocol-key"] == "k"


@pytest.mark.parametrize("secrets", [{"token": "secret"}, {"headers": {"triton-grpc-protocol-key": "secret"}}])
def test_secrets_do_not_go_to_another_machine_in_plaintext(connect: Connect, secrets: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="not encrypted") as caught:
        connect("triton.example:8001", **secrets)
    assert "secret" not in str(caught.value).replace("secrets", "")
    connect("triton.example:8001", **secrets, allow_plaintext_secrets=True).close()
    connect("triton.example:8001", **secrets, tls=TlsOptions()).close()
    connect("triton.example:8001").close()


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8001", "127.8.0.1:8001", "[::1]:8001", "localhost:8001", "unix:/run/t.sock"]
)
def test_this_machine_may_get_the_token_in_plaintext(connect: Connect, url: str) -> None:
    connect(url, token="secret").close()  # noqa: S106


@pytest.fixture
def mutual_tls_server(certificates: Path) -> Iterator[Server]:
    double = Server()
    pair = ((certificates / "server.key").read_bytes(), (certificates / "server.crt").read_bytes())
    authority = (certificates / "ca.crt").read_bytes()
    running = double.start(credentials=grpc.ssl_server_credentials([pair], authority, require_client_auth=True))
    yield double
    running.stop(grace=None).wait()


def test_mutual_tls_carries_requests_and_the_token(
    connect: Connect, mutual_tls_server: Server, certificates: Path
) -> None:
    tls = TlsOptions(
        root_certificates=certificates / "ca.crt",
        private_key=certificates / "client.key",
        certificate_chain=certificates / "client.crt",
        server_name="stripwire.test",
    )
    with connect(mutual_tls_server.url, tls=tls, token="secret") as client:  # noqa: S106
        assert client.classify(images_of([6])).labels.tolist() == [1]
    assert mutual_tls_server.inferences[0].headers["authorization"] == "Bearer secret"


def test_without_a_certificate_a_mutual_tls_server_is_out_of_reach(
    connect: Connect, mutual_tls_server: Server, certificates: Path
) -> None:
    tls = TlsOptions(root_certificates=certificates / "ca.crt", server_name="stripwire.test")
    with connect(mutual_tls_server.url, tls=tls, retries=0) as client, pytest.raises(ServerUnavailableError):
        client.classify(images_of([6]))


def test_a_server_with_another_name_is_not_trusted(
    connect: Connect, mutual_tls_server: Server, certificates: Path
) -> None:
    tls = TlsOptions(
        certificates / "ca.crt", certificates / "client.key", certificates / "client.crt", server_name="other.test"
    )
    with connect(mutual_tls_server.url, tls=tls, retries=0) as client, pytest.raises(ServerUnavailableError):
        client.classify(images_of([6]))


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"root_certificates": "absent.crt"}, r"root certificates: cannot read .*absent\.crt: No such file"),
        ({"root_certificates": "ca.srl"}, r"root certificates: .*ca\.srl is not in PEM format"),
        ({"root_certificates": "ca.key"}, r"root certificates: .*ca\.key cannot be used"),
        ({"private_key": "client.key"}, "got one of private key and certificate chain"),
        ({"private_key": "server.key", "certificate_chain": "client.crt"}, r"client\.crt cannot be used: KEY_VALUES"),
        ({"private_key": "locked.key", "certificate_chain": "client.crt"}, "encrypted"),
        ({"private_key": "absent.key", "certificate_chain": "client.crt"}, "private key: cannot read"),
    ],
)
def test_tls_files_are_checked_beforehand(certificates: Path, files: dict[str, str], complaint: str) -> None:
    paths: dict[str, Any] = {option: certificates / name for option, name in files.items()}
    with pytest.raises(InputError, match=complaint):
        TlsOptions(**paths)


def test_another_machine_gets_no_images_in_shared_memory(connect: Connect) -> None:
    with (
        connect("192.0.2.1:8001") as client,
        pytest.raises(InputError, match=r"shared memory: 192\.0\.2\.1:8001 is another machine"),
    ):
        client.classify(np.zeros((1, 2, 2, 1), np.uint8), shared_memory=True)


def test_importing_the_client_loads_no_heavy_library() -> None:
    code = "import client.api, sys; print(*sorted({'tensorflow', 'keras', 'scipy', 'onnxruntime'} & set(sys.modules)))"
    completed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert completed.stdout.strip() == ""
