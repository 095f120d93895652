"""The monitor's HTTP side: metrics, health, and feedback."""

from __future__ import annotations

import hmac
import json
import logging
import re
from typing import Any

import anyio
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from client.monitor.health import Health
from client.monitor.logs import log
from client.monitor.metrics import MonitorMetrics
from client.monitor.record import TRUTHS, VERDICTS, Added, Feedback, FeedbackRecord
from detector.errors import InputError, RecordError

_MOST_BODY_BYTES = 4096
_BODY_SECONDS = 10.0
_FIELDS = ("request_id", "truth", "verdict")


class MonitorApp:
    """Answers requests.

    Args:
        health: what `/livez` and `/readyz` tell.
        record: where feedback goes.
        metrics: where refusals are counted.
        registry: what `/metrics` shows.
        feedback_token: what a caller must know to give feedback; None lets nobody.
    """

    def __init__(
        self,
        health: Health,
        record: FeedbackRecord,
        metrics: MonitorMetrics,
        registry: CollectorRegistry,
        feedback_token: str | None,
    ) -> None:
        self._health = health
        self._record = record
        self._metrics = metrics
        self._registry = registry
        self._token = feedback_token
        self.asgi = Starlette(
            routes=[
                Route("/metrics", self._show_metrics),
                Route("/livez", self._live),
                Route("/readyz", self._ready),
                Route("/v1/feedback", self._take_feedback, methods=["POST"]),
                Route("/v1/feedback/{request_id}", self._show_feedback),
            ]
        )

    def _show_metrics(self, _: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def _live(self, _: Request) -> Response:
        status = self._health.status()
        return _answer(200 if status.live else 503, live=status.live, why="" if status.live else status.why)

    async def _ready(self, _: Request) -> Response:
        status = self._health.status()
        return _answer(200 if status.ready else 503, ready=status.ready, why=status.why)

    async def _take_feedback(self, request: Request) -> Response:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        try:
            with anyio.fail_after(_BODY_SECONDS):
                body = await _read_body(request)
        except TimeoutError:
            return self._refused("too_slow", 408, f"the body did not come within {_BODY_SECONDS:g} seconds")
        except ClientDisconnect:
            return self._refused("malformed", 400, "the caller left before the body was whole")
        if body is None:
            return self._refused("too_large", 413, f"body: expected at most {_MOST_BODY_BYTES} bytes")
        try:
            feedback = read_feedback(body)
        except InputError as error:
            return self._refused("malformed", 422, str(error))
        try:
            added = await run_in_threadpool(self._record.add, feedback)
        except RecordError as error:
            log(logging.ERROR, "feedback was not recorded", request_id=feedback.request_id, why=str(error))
            return self._refused("unrecorded", 503, str(error), {"Retry-After": "10"})
        if added is Added.CONFLICT:
            return self._refused(
                "conflict",
                409,
                f"request_id: other feedback on {feedback.request_id!r} is in the record, which stays as it is; see "
                f"GET /v1/feedback/{feedback.request_id}",
            )
        return _answer(201 if added is Added.NEW else 200, **vars(feedback), counted=added is Added.NEW)

    async def _show_feedback(self, request: Request) -> Response:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        request_id = request.path_params["request_id"]
        try:
            feedback = await run_in_threadpool(self._record.get, request_id)
        except RecordError as error:
            log(logging.ERROR, "feedback could not be read", request_id=request_id, why=str(error))
            return _answer(503, error=str(error))
        if feedback is None:
            return _answer(404, error=f"request_id: there is no feedback on {request_id!r}")
        return _answer(200, **vars(feedback))

    def _refusal(self, request: Request) -> Response | None:
        """Return the answer to a caller who may not give feedback; None to one who may."""
        if self._token is None:
            return self._refused("disabled", 403, "feedback: the monitor has no token for it, so nobody may give any")
        given = request.headers.get("authorization", "").encode("latin-1")
        # Digests of equal length, compared in constant time: how long it takes tells nothing of the token.
        if not _same(given, f"Bearer {self._token}".encode()):
            return self._refused(
                "unauthorized",
                401,
                "authorization: expected Bearer and the feedback token",
                {"WWW-Authenticate": "Bearer"},
            )
        return None

    def _refused(self, reason: str, status: int, error: str, headers: dict[str, str] | None = None) -> Response:
        self._metrics.refusals.labels(reason).inc()
        # Whatever is left of the body is not read: it may have no end.
        hang_up = {"Connection": "close"} if status in (401, 403, 408, 413) else {}
        return JSONResponse({"error": error}, status, hang_up | (headers or {}))


def read_feedback(body: bytes) -> Feedback:
    """Return the feedback in the body of a request: JSON of exactly `request_id`, `truth` and `verdict`.

    Raises:
        InputError: it is none; the message says which field, what came, and what was expected.
    """
    try:
        fields = json.loads(body.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise InputError(f"body: got no JSON ({error}), expected an object of {', '.join(_FIELDS)}") from None
    if not isinstance(fields, dict) or fields.keys() != set(_FIELDS):
        got = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise InputError(f"body: got {got}, expected an object of exactly {', '.join(_FIELDS)}")
    request_id = fields["request_id"]
    if not (isinstance(request_id, str) and re.fullmatch(r"[!-.0-~]{1,128}", request_id)):
        raise InputError(
            f"request_id: got {request_id!r}, expected 1 to 128 printable ASCII characters without blanks and slashes"
        )
    for name, known in (("truth", TRUTHS), ("verdict", VERDICTS)):
        if not (isinstance(fields[name], str) and fields[name] in known):
            raise InputError(f"{name}: got {fields[name]!r}, expected one of {', '.join(known)}")
    return Feedback(**fields)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a field is given twice")
    return fields


async def _read_body(request: Request) -> bytes | None:
    """Return the body; None, without reading on, where it is too long."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > _MOST_BODY_BYTES:
            return None
    return body


def _same(given: bytes, expected: bytes) -> bool:
    return hmac.compare_digest(hmac.digest(b"feedback", given, "sha256"), hmac.digest(b"feedback", expected, "sha256"))


def _answer(status: int, **fields: Any) -> Response:
    return JSONResponse(fields, status)
