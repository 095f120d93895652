"""The monitor's own metrics, on a registry of its own; every combination of labels is there from the start."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from client.metrics import LATENCY_BUCKETS
from client.monitor.record import TRUTHS, FeedbackRecord
from detector.live_metrics import VERDICTS
from detector.serving import BEHIND
from samples.canaries import Canaries

ERROR_KINDS = ("overloaded", "unavailable", "deadline", "denied", "rejected", "mismatch", "failed")
"""Why a canary got no verdict, see `client.monitor.sender`."""

RELOAD_REASONS = ("died", "failed", "absent")
"""What was wrong with a model that was loaded again, see `client.monitor.diagnosis`."""

REFUSALS = ("unauthorized", "disabled", "cross_site", "too_large", "too_slow", "malformed", "conflict", "unrecorded")
"""Why feedback was not taken."""

MODELS = ("guarded", *dict.fromkeys(model for models in BEHIND.values() for model in models))
"""Every model that may have to be loaded again."""


class MonitorMetrics:
    """The metrics of one monitor.

    Args:
        registry: where they are registered.
        canaries: what is sent, and what was promised.
    """

    def __init__(self, registry: CollectorRegistry, canaries: Canaries) -> None:
        self.canaries = Counter(
            "stripwire_canary", "Canaries that got a verdict.", ("truth", "verdict"), registry=registry
        )
        self.canary_errors = Counter(
            "stripwire_canary_errors", "Canaries that got no verdict, by why.", ("kind",), registry=registry
        )
        self.canary_seconds = Histogram(
            "stripwire_canary_seconds",
            "Time until a canary had its verdict, in seconds.",
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.reloads = Counter(
            "stripwire_model_reloads",
            "Times that a broken model was unloaded and loaded again, by what was wrong with it.",
            ("model", "reason"),
            registry=registry,
        )
        self.refusals = Counter(
            "stripwire_feedback_refused", "Feedback that was not taken, by why.", ("reason",), registry=registry
        )
        self.ready = Gauge("stripwire_ready", "Whether the last canary got a verdict.", registry=registry)
        self.live = Gauge("stripwire_live", "Whether the server can go on without a restart.", registry=registry)
        for truth in TRUTHS:
            for verdict in VERDICTS:
                self.canaries.labels(truth, verdict)
        for kind in ERROR_KINDS:
            self.canary_errors.labels(kind)
        for model in MODELS:
            for reason in RELOAD_REASONS:
                self.reloads.labels(model, reason)
        for reason in REFUSALS:
            self.refusals.labels(reason)

        images = Gauge("stripwire_canary_images", "Different canaries that are sent.", ("truth",), registry=registry)
        images.labels("clean").set(canaries.different(trojaned=False))
        images.labels("trojaned").set(canaries.different(trojaned=True))
        for name, meaning, value in (
            (
                "stripwire_calibrated_frr_upper",
                "Upper end of the calibrated FRR's 95 % interval, 0..1.",
                canaries.frr_upper,
            ),
            ("stripwire_calibrated_far_upper", "Upper end of the measured FAR's 95 % interval.", canaries.far_upper),
            (
                "stripwire_canaries_calibrated_timestamp_seconds",
                "When the version that the canaries are for was calibrated, seconds since 1970.",
                canaries.calibrated_at,
            ),
        ):
            if value is not None:  # absent, not 0, where nobody knows
                Gauge(name, meaning, registry=registry).set(value)


class FeedbackCollector(Collector):
    """Counts feedback from the record, whenever it is asked: the counters go on where they were after a restart."""

    def __init__(self, record: FeedbackRecord) -> None:
        self._record = record

    def collect(self) -> Iterator[Metric]:
        """Yield `stripwire_feedback_total`."""
        family = CounterMetricFamily("stripwire_feedback", "Feedback in the record.", labels=("truth", "verdict"))
        for (truth, verdict), count in self._record.counts().items():
            family.add_metric((truth, verdict), count)
        yield family
