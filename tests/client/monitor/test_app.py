"""The monitor over real HTTP: feedback is taken once, refused with a reason, and everything is counted."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client import CollectorRegistry

from client.api import GuardedClient
from client.feedback import FeedbackClient
from client.monitor import app as app_module
from client.monitor.access import Access
from client.monitor.app import MonitorApp
from client.monitor.health import Health
from client.monitor.metrics import ERROR_KINDS, MODELS, REFUSALS, RELOAD_REASONS, FeedbackCollector, MonitorMetrics
from client.monitor.quarantine import QuarantineView
from client.monitor.record import TRUTHS, Added, Feedback, FeedbackRecord, read_feedback
from client.monitor.sender import CanarySender
from detector.errors import AccessDeniedError, InputError, ServerUnavailableError
from detector.live_metrics import VERDICTS
from tests.client.monitor.conftest import TOKEN, canaries, given, parsed
from tests.conftest import wait_for

WHOLE = {"request_id": "one", "truth": "clean", "verdict": "rejected"}
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def record(tmp_path: Path) -> Iterator[FeedbackRecord]:
    with FeedbackRecord(tmp_path / "record.sqlite") as opened:
        yield opened


def listening(record: FeedbackRecord, token: str | None, view: QuarantineView | None = None) -> Iterator[httpx.Client]:
    """Yield what asks a monitor without a server behind it."""
    registry, sent = CollectorRegistry(), canaries(frr_upper=0.08)
    metrics = MonitorMetrics(registry, sent)
    registry.register(FeedbackCollector(record))

    def connect() -> GuardedClient:
        return GuardedClient("127.0.0.1:1")

    sender = CanarySender(sent, connect, metrics)
    health = Health(sender, connect, connect, metrics, stale_after_seconds=10, dead_after_seconds=120)
    served = MonitorApp(health, record, Access(token, metrics), registry, view).asgi
    server = uvicorn.Server(uvicorn.Config(served, log_config=None, lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            wait_for(lambda: server.started)
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as http:
                yield http
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def http(record: FeedbackRecord) -> Iterator[httpx.Client]:
    yield from listening(record, TOKEN)


@pytest.fixture
def http_without_token(record: FeedbackRecord) -> Iterator[httpx.Client]:
    yield from listening(record, None)


UNFINISHED = (
    f"POST /v1/feedback HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 60\r\n\r\n{{".encode()
)


def give(http: httpx.Client, feedback: dict[str, Any]) -> httpx.Response:
    return http.post("/v1/feedback", json=feedback, headers=BEARER)


def samples(http: httpx.Client) -> dict[Any, float]:
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return parsed(answer.text)


def refused(http: httpx.Client) -> dict[str, int]:
    counts = {
        dict(labels)["reason"]: int(value)
        for (name, labels), value in samples(http).items()
        if name == "stripwire_feedback_refused_total"
    }
    assert set(counts) == set(REFUSALS)
    return {reason: count for reason, count in counts.items() if count}


def recorded(http: httpx.Client) -> int:
    return sum(int(value) for (name, _), value in samples(http).items() if name == "stripwire_feedback_total")


def test_every_combination_of_labels_is_there_from_the_start(http: httpx.Client) -> None:
    found = samples(http)
    combinations = [
        *((name, ("truth", t), ("verdict", v)) for name in ("canary", "feedback") for t in TRUTHS for v in VERDICTS),
        *(("canary_errors", ("kind", kind)) for kind in ERROR_KINDS),
        *(("model_reloads", ("model", model), ("reason", why)) for model in MODELS for why in RELOAD_REASONS),
        *(("feedback_refused", ("reason", reason)) for reason in REFUSALS),
    ]
    for name, *labels in combinations:
        assert found[f"stripwire_{name}_total", tuple(labels)] == 0.0
    assert found["stripwire_canary_seconds_count", ()] == 0.0
    assert found["stripwire_canary_images", (("truth", "clean"),)] == 4.0
    assert found["stripwire_canary_images", (("truth", "trojaned"),)] == 2.0


def test_what_the_calibration_promised_is_shown_and_absent_where_it_promised_nothing(http: httpx.Client) -> None:
    found = samples(http)
    assert found["stripwire_calibrated_frr_upper", ()] == 0.08
    assert ("stripwire_calibrated_far_upper", ()) not in found
    assert ("stripwire_canaries_calibrated_timestamp_seconds", ()) not in found


def test_the_first_page_tells_what_there_is(http: httpx.Client, record: FeedbackRecord, tmp_path: Path) -> None:
    answer = http.get("/")
    assert answer.headers["content-type"].startswith("text/plain")
    paths = [line.split()[0] for line in answer.text.splitlines() if line.startswith("/")]
    assert paths == ["/metrics", "/readyz", "/livez", "/v1/feedback"]
    for with_quarantine in listening(record, TOKEN, QuarantineView(tmp_path, record)):
        assert "\n/quarantine " in with_quarantine.get("/").text


def test_without_a_canarys_verdict_it_is_live_and_not_ready(http: httpx.Client) -> None:
    ready, live = http.get("/readyz"), http.get("/livez")
    assert (ready.status_code, live.status_code) == (503, 200)
    assert ready.json() == {"ready": False, "why": "no canary was sent yet"}
    assert live.json() == {"live": True, "why": ""}


def test_feedback_is_taken_counted_and_shown(http: httpx.Client) -> None:
    answer = give(http, WHOLE)
    assert (answer.status_code, answer.json()) == (201, {**WHOLE, "counted": True})
    assert samples(http)["stripwire_feedback_total", (("truth", "clean"), ("verdict", "rejected"))] == 1.0
    assert http.get("/v1/feedback/one", headers=BEARER).json() == WHOLE


def test_a_replayed_request_counts_once(http: httpx.Client) -> None:
    give(http, WHOLE)
    answer = give(http, WHOLE)
    assert (answer.status_code, answer.json()) == (200, {**WHOLE, "counted": False})
    assert recorded(http) == 1


def test_other_feedback_on_a_known_request_is_a_conflict(http: httpx.Client) -> None:
    give(http, WHOLE)
    answer = give(http, {**WHOLE, "truth": "trojaned"})
    assert answer.status_code == 409
    assert "other feedback on 'one' is in the record" in answer.json()["error"]
    assert recorded(http) == 1
    assert http.get("/v1/feedback/one", headers=BEARER).json() == WHOLE
    assert refused(http) == {"conflict": 1}


def test_an_unknown_id_is_not_found(http: httpx.Client) -> None:
    answer = http.get("/v1/feedback/two", headers=BEARER)
    assert (answer.status_code, answer.json()) == (404, {"error": "request_id: there is no feedback on 'two'"})


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", f"bearer {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xe9", TOKEN]
)
def test_without_the_token_nothing_is_taken_or_shown(http: httpx.Client, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
    for answer in (
        http.post("/v1/feedback", json=WHOLE, headers=headers),  # type: ignore[arg-type]
        http.get("/v1/feedback/one", headers=headers),  # type: ignore[arg-type]
    ):
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert TOKEN not in answer.text
    assert recorded(http) == 0
    assert refused(http) == {"unauthorized": 1}  # of feedback, not of looking


def test_a_monitor_without_a_token_takes_feedback_from_nobody(http_without_token: httpx.Client) -> None:
    for headers in ({}, {"Authorization": "Bearer None"}, {"Authorization": "Bearer"}):
        answer = http_without_token.post("/v1/feedback", json=WHOLE, headers=headers)
        assert answer.status_code == 403
    assert recorded(http_without_token) == 0


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "got no JSON"),
        (b"{", "got no JSON"),
        (b"\xff\xfe{}", "got no JSON"),
        (b"[" * 4000, "got no JSON"),
        (b'{"request_id":"a","truth":"clean","truth":"trojaned","verdict":"accepted"}', "a field is given twice"),
        (b"[]", "body: got list, expected an object"),
        (b"null", "body: got NoneType"),
        (b"{}", r"got \[\], expected an object of exactly request_id, truth, verdict"),
        (json.dumps({**WHOLE, "more": 1}).encode(), "more"),
        (json.dumps({**WHOLE, "request_id": 1}).encode(), "request_id: got 1, expected 1 to 128"),
        (json.dumps({**WHOLE, "request_id": ""}).encode(), "request_id: got ''"),
        (json.dumps({**WHOLE, "request_id": "a b"}).encode(), "request_id: got 'a b'"),
        (json.dumps({**WHOLE, "request_id": "a/b"}).encode(), "request_id: got 'a/b'"),
        (json.dumps({**WHOLE, "request_id": "a\n"}).encode(), "request_id: got"),
        (json.dumps({**WHOLE, "request_id": "a" * 129}).encode(), "request_id: got"),
        (json.dumps({**WHOLE, "truth": "Clean"}).encode(), "truth: got 'Clean', expected one of clean, trojaned"),
        (json.dumps({**WHOLE, "truth": ["clean"]}).encode(), r"truth: got \['clean'\]"),
        (json.dumps({**WHOLE, "verdict": True}).encode(), "verdict: got True, expected one of accepted, rejected"),
    ],
)
def test_malformed_feedback_is_refused_by_field(body: bytes, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read_feedback(body)


def test_malformed_feedback_is_answered_and_counted(http: httpx.Client) -> None:
    answer = give(http, {**WHOLE, "truth": "dirty"})
    assert answer.status_code == 422
    assert answer.json() == {"error": "truth: got 'dirty', expected one of clean, trojaned"}
    assert refused(http) == {"malformed": 1}


def test_an_overlong_body_is_not_read_to_its_end(http: httpx.Client) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(10_000):
            sent += 1
            yield b" " * 65536

    try:
        answer = http.post("/v1/feedback", content=endless(), headers=BEARER)
        assert answer.status_code == 413
    except httpx.WriteError:
        pass  # it hung up on us before we read its answer
    assert sent < 10_000
    assert give(http, {**WHOLE, "request_id": "x" * 5000}).status_code == 413
    assert refused(http) == {"too_large": 2}
    assert recorded(http) == 0


def test_a_body_that_does_not_come_is_not_waited_for(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "_BODY_SECONDS", 0.3)
    address = (http.base_url.host, http.base_url.port)
    with socket.create_connection(address, timeout=30) as slow:
        slow.sendall(UNFINISHED)
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")
    assert refused(http) == {"too_slow": 1}


def test_a_caller_that_hangs_up_harms_nobody(http: httpx.Client) -> None:
    address = (http.base_url.host, http.base_url.port)
    with socket.create_connection(address, timeout=30) as leaving:
        leaving.sendall(UNFINISHED)
    wait_for(lambda: refused(http) == {"malformed": 1})
    assert give(http, WHOLE).status_code == 201


def test_what_cannot_be_recorded_is_not_acknowledged(http: httpx.Client, record: FeedbackRecord) -> None:
    give(http, WHOLE)
    record.close()  # as if the disk were gone
    answer = give(http, {**WHOLE, "request_id": "two"})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "10"
    assert "nothing was counted" in answer.json()["error"]
    assert http.get("/v1/feedback/one", headers=BEARER).status_code == 503
    assert recorded(http) == 1
    assert refused(http) == {"unrecorded": 1}


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1", 404), ("PUT", "/v1/feedback", 405), ("POST", "/livez", 405)]
)
def test_nothing_else_is_answered(http: httpx.Client, method: str, path: str, status: int) -> None:
    assert http.request(method, path).status_code == status


def test_feedback_is_what_was_sent() -> None:
    assert read_feedback(json.dumps(WHOLE).encode()) == Feedback("one", "clean", "rejected")


def test_all_feedback_is_streamed_in_the_order_in_which_it_came(
    http: httpx.Client, record: FeedbackRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "_PIECE", 3)
    assert http.get("/v1/feedback", headers=BEARER).text == ""
    for feedback in given(10):
        record.add(feedback)
    answer = http.get("/v1/feedback", headers=BEARER)
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [Feedback(line["request_id"], line["truth"], line["verdict"]) for line in lines] == given(10)
    assert all(line.keys() == {"request_id", "truth", "verdict", "recorded_at"} for line in lines)


def test_only_who_knows_the_token_gets_feedback(http: httpx.Client, http_without_token: httpx.Client) -> None:
    assert http.get("/v1/feedback").status_code == 401
    assert http_without_token.get("/v1/feedback", headers=BEARER).status_code == 403
    with pytest.raises(AccessDeniedError), FeedbackClient(str(http.base_url), "wrong") as client:
        list(client.saved())


def test_feedback_is_taken_while_somebody_reads_slowly(http: httpx.Client, record: FeedbackRecord) -> None:
    rows = ((f"{number}-{'x' * 100}",) for number in range(60_000))  # more than fits into what is between us
    insert = "INSERT INTO feedback (request_id, truth, verdict, recorded_at) VALUES (?, 'clean', 'accepted', 0)"
    record._connection.execute("BEGIN")
    record._connection.executemany(insert, rows)
    record._connection.execute("COMMIT")
    with http.stream("GET", "/v1/feedback", headers=BEARER) as answer:
        read = answer.iter_lines()
        assert json.loads(next(read))["request_id"].startswith("0-")
        late = {"request_id": "late.0", "truth": "trojaned", "verdict": "accepted"}
        assert http.post("/v1/feedback", json=late, headers=BEARER, timeout=5).status_code == 201
        rest = [json.loads(line)["request_id"] for line in read]
    assert (len(rest), rest[-1]) == (60_000, "late.0")


def test_what_breaks_off_is_not_taken_for_all(
    http: httpx.Client, record: FeedbackRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    for feedback in given(10):
        record.add(feedback)
    monkeypatch.setattr(app_module, "_PIECE", 3)
    pieces = FeedbackRecord.after

    def broken(of: FeedbackRecord, number: int, limit: int) -> Any:
        if number >= 6:
            record.close()  # as if the disk were gone
        return pieces(of, number, limit)

    monkeypatch.setattr(FeedbackRecord, "after", broken)
    with FeedbackClient(str(http.base_url), TOKEN) as client:
        saved = client.saved()
        assert [json.loads(next(saved))["request_id"] for _ in range(6)] == [each.request_id for each in given(6)]
        with pytest.raises(ServerUnavailableError):
            next(saved)
    assert http.get("/v1/feedback", headers=BEARER).status_code == 503


def test_feedback_can_be_given_by_several_at_once(http: httpx.Client) -> None:
    found: list[Added] = []

    def give() -> None:
        with FeedbackClient(str(http.base_url), TOKEN) as client:
            found.extend(client.give(feedback) for feedback in given(20))

    threads = [threading.Thread(target=give) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found.count(Added.NEW), found.count(Added.KNOWN)) == (20, 40)
