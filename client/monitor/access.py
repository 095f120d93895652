"""Who may give feedback and look into the quarantine, and what the others are told."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from client.monitor.metrics import MonitorMetrics

_READING = ("GET", "HEAD")


class Access:
    """Lets in who knows the token.

    Args:
        token: what a caller must know; None lets nobody in.
        metrics: where feedback that is refused is counted.
    """

    def __init__(self, token: str | None, metrics: MonitorMetrics) -> None:
        self._token = token
        self._metrics = metrics

    def refusal(self, request: Request) -> Response | None:
        """Return the answer to a caller who may not; None to one who may."""
        if self._token is None:
            return self.refused(request, "disabled", 403, "feedback: the monitor has no token for it, so nobody may")
        if request.method not in _READING and not _is_same_origin(request):
            return self.refused(
                request, "cross_site", 403, "origin: a page of another site sent this, expected one of the monitor"
            )
        given = request.headers.get("authorization", "").encode("latin-1")
        # Digests of equal length, compared in constant time: how long it takes tells nothing of the token.
        if not hmac.compare_digest(_digest(given), _digest(f"Bearer {self._token}".encode())):
            return self.refused(
                request,
                "unauthorized",
                401,
                "authorization: expected Bearer and the feedback token",
                {"WWW-Authenticate": "Bearer"},
            )
        return None

    def refused(
        self, request: Request, reason: str, status: int, error: str, headers: Mapping[str, str] | None = None
    ) -> Response:
        """Return the answer to a request that is refused; of feedback, it is counted by `reason`."""
        if request.method == "POST":
            self._metrics.refusals.labels(reason).inc()
        # Whatever is left of the body is not read: it may have no end.
        hang_up = {"Connection": "close"} if status in (401, 403, 408, 413) else {}
        return JSONResponse({"error": error}, status, {**hang_up, **(headers or {})})


def answer(status: int, **fields: Any) -> Response:
    """Return an answer of JSON."""
    return JSONResponse(fields, status)


def _is_same_origin(request: Request) -> bool:
    """Say whether no page of another site has sent a request, as far as browsers tell; other callers say nothing."""
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return False
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")


def _digest(text: bytes) -> bytes:
    return hmac.digest(b"feedback", text, "sha256")
