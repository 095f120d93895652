"""The monitor's HTTP side: metrics, health, feedback and the quarantine."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import anyio
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from client.monitor.access import Access, answer
from client.monitor.health import Health
from client.monitor.logs import log
from client.monitor.quarantine import QuarantineRoutes, QuarantineView
from client.monitor.record import Added, FeedbackRecord, Recorded, read_feedback
from detector.errors import InputError, RecordError

_MOST_BODY_BYTES = 4096
_BODY_SECONDS = 10.0
_PIECE = 1000  # how much feedback is read at once
_INDEX = """stripwire monitor

/metrics      for Prometheus
/readyz       200 when the last canary got a verdict, and not long ago
/livez        200 unless the server should be started anew
/v1/feedback  takes feedback, and gives it back; asks for the feedback token
"""
_QUARANTINE_INDEX = """/quarantine   rejected inputs, for people; asks for the feedback token
"""


class MonitorApp:
    """Answers requests.

    Args:
        health: what `/livez` and `/readyz` tell.
        record: where feedback goes.
        access: who may give it.
        registry: what `/metrics` shows.
        quarantine: what is shown of rejected inputs; None shows none.
    """

    def __init__(
        self,
        health: Health,
        record: FeedbackRecord,
        access: Access,
        registry: CollectorRegistry,
        quarantine: QuarantineView | None = None,
    ) -> None:
        self._health = health
        self._record = record
        self._access = access
        self._registry = registry
        self._index = _INDEX if quarantine is None else _INDEX + _QUARANTINE_INDEX
        self.asgi = Starlette(
            routes=[
                Route("/", self._show_index),
                Route("/metrics", self._show_metrics),
                Route("/livez", self._live),
                Route("/readyz", self._ready),
                Route("/v1/feedback", self._take_feedback, methods=["POST"]),
                Route("/v1/feedback", self._give_feedback),
                Route("/v1/feedback/{request_id}", self._show_feedback),
                *([] if quarantine is None else QuarantineRoutes(quarantine, access).routes),
            ]
        )

    async def _show_index(self, _: Request) -> Response:
        return PlainTextResponse(self._index)

    def _show_metrics(self, _: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def _live(self, _: Request) -> Response:
        status = self._health.status()
        return answer(200 if status.live else 503, live=status.live, why="" if status.live else status.why)

    async def _ready(self, _: Request) -> Response:
        status = self._health.status()
        return answer(200 if status.ready else 503, ready=status.ready, why=status.why)

    async def _take_feedback(self, request: Request) -> Response:
        if (refusal := self._access.refusal(request)) is not None:
            return refusal
        try:
            with anyio.fail_after(_BODY_SECONDS):
                body = await _read_body(request)
        except TimeoutError:
            return self._access.refused(
                request, "too_slow", 408, f"the body did not come within {_BODY_SECONDS:g} seconds"
            )
        except ClientDisconnect:
            return self._access.refused(request, "malformed", 400, "the caller left before the body was whole")
        if body is None:
            return self._access.refused(request, "too_large", 413, f"body: expected at most {_MOST_BODY_BYTES} bytes")
        try:
            feedback = read_feedback(body)
        except InputError as error:
            return self._access.refused(request, "malformed", 422, str(error))
        try:
            added = await run_in_threadpool(self._record.add, feedback)
        except RecordError as error:
            log(logging.ERROR, "feedback was not recorded", request_id=feedback.request_id, why=str(error))
            return self._access.refused(request, "unrecorded", 503, str(error), {"Retry-After": "10"})
        if added is Added.CONFLICT:
            return self._access.refused(
                request,
                "conflict",
                409,
                f"request_id: other feedback on {feedback.request_id!r} is in the record, which stays as it is; see "
                f"GET /v1/feedback/{feedback.request_id}",
            )
        return answer(201 if added is Added.NEW else 200, **vars(feedback), counted=added is Added.NEW)

    async def _give_feedback(self, request: Request) -> Response:
        """Stream all feedback as JSON lines, in the order in which it came."""
        if (refusal := self._access.refusal(request)) is not None:
            return refusal
        try:
            first = await run_in_threadpool(self._record.after, 0, _PIECE)
        except RecordError as error:
            log(logging.ERROR, "feedback could not be read", why=str(error))
            return answer(503, error=str(error))
        return StreamingResponse(self._lines(first), media_type="application/x-ndjson")

    def _lines(self, piece: list[Recorded]) -> Iterator[bytes]:
        while piece:
            lines = ({**vars(each.feedback), "recorded_at": each.recorded_at} for each in piece)
            yield "".join(json.dumps(line) + "\n" for line in lines).encode()
            # An error from here on breaks the connection off, by which the caller knows that it was not all.
            piece = self._record.after(piece[-1].number, _PIECE)

    async def _show_feedback(self, request: Request) -> Response:
        if (refusal := self._access.refusal(request)) is not None:
            return refusal
        request_id = request.path_params["request_id"]
        try:
            feedback = await run_in_threadpool(self._record.get, request_id)
        except RecordError as error:
            log(logging.ERROR, "feedback could not be read", request_id=request_id, why=str(error))
            return answer(503, error=str(error))
        if feedback is None:
            return answer(404, error=f"request_id: there is no feedback on {request_id!r}")
        return answer(200, **vars(feedback))


async def _read_body(request: Request) -> bytes | None:
    """Return the body; None, without reading on, where it is too long."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > _MOST_BODY_BYTES:
            return None
    return body
