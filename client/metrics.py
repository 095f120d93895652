"""What a client counts for Prometheus, where its caller gives a registry."""

from __future__ import annotations

import threading
from types import MappingProxyType
from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry, Counter, Histogram

from detector.errors import (
    AccessDeniedError,
    DeadlineExceededError,
    RequestRejectedError,
    ServerError,
    ServerUnavailableError,
)
from detector.live_metrics import VERDICTS

OUTCOME_OF_ERROR = MappingProxyType(
    {
        ServerUnavailableError: "unavailable",
        DeadlineExceededError: "deadline",
        AccessDeniedError: "denied",
        RequestRejectedError: "rejected",
        ServerError: "failed",
    }
)
"""What a request that ended with an error is counted as."""

OUTCOMES = ("answered", *OUTCOME_OF_ERROR.values(), "cancelled")
"""What can become of a request."""

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the buckets of a time until an answer, in seconds."""


class ClientMetrics:
    """The metrics of one client, or of several that share a registry; every combination of labels is there at once.

    Args:
        registry: where they are registered; with None, nobody sees them.
    """

    def __init__(self, registry: CollectorRegistry | None) -> None:
        self.requests = Counter(
            "stripwire_client_requests",
            "Requests to the server, retries included, by what became of them.",
            ("outcome",),
            registry=registry,
        )
        self.seconds = Histogram(
            "stripwire_client_request_seconds",
            "Time from sending a batch of images until its answer, retries included, in seconds.",
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.inputs = Counter(
            "stripwire_client_inputs", "Images that got a verdict, but for canaries.", ("verdict",), registry=registry
        )
        self.retries = Counter("stripwire_client_retries", "Times that a request was sent again.", registry=registry)
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        for verdict in VERDICTS:
            self.inputs.labels(verdict)


_known: WeakKeyDictionary[CollectorRegistry, ClientMetrics] = WeakKeyDictionary()
_lock = threading.Lock()


def metrics_on(registry: CollectorRegistry | None) -> ClientMetrics:
    """Return the metrics on a registry, which clients share, and which are registered the first time."""
    if registry is None:
        return ClientMetrics(None)
    with _lock:
        if registry not in _known:
            _known[registry] = ClientMetrics(registry)
        return _known[registry]


def outcome_of(error: Exception) -> str:
    """Return what a request that ended with `error` is counted as."""
    return next((outcome for kind, outcome in OUTCOME_OF_ERROR.items() if isinstance(error, kind)), "failed")
