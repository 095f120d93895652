"""What the dashboard asks Prometheus, each question once, in PromQL.

All of it is asked of the metrics as they are scraped, so no recording rule need be loaded. `$namespace`, `$pod` and
`$window` are the dashboard's variables, `$__rate_interval` is Grafana's. Where nothing was counted the answer is
absent, not 0: a whole that is divided by is kept only where it is over 0.
"""

from __future__ import annotations

from dataclasses import dataclass

CHOSEN = 'namespace=~"$namespace", pod=~"$pod"'
"""Matches series without those labels too, as long as all of them are chosen: the variables are `.*` then."""

_LIVE = 'traffic="live"'
_COMPOSING = 'model!="guarded"'
_RECENT = "$__rate_interval"
_Z = 1.96  # of 95 %


def selected(metric: str, *matchers: str) -> str:
    """Return the series of a metric that the variables and further matchers choose."""
    return f"{metric}{{{', '.join((*matchers, CHOSEN))}}}"


def per_second(metric: str, *matchers: str, by: str = "") -> str:
    """Return how fast a counter grows, summed up by labels."""
    return _summed(f"rate({selected(metric, *matchers)}[{_RECENT}])", by)


def added(metric: str, *matchers: str, by: str = "", over: str = "$window") -> str:
    """Return by how much a counter grew, summed up by labels."""
    return _summed(f"increase({selected(metric, *matchers)}[{over}])", by)


def share(part: str, whole: str) -> str:
    """Return part / whole."""
    return f"{part}\n/ ({whole} > 0)"


def wilson(part: str, whole: str, end: str) -> str:
    """Return an end, `-` or `+`, of the 95 % interval (Wilson's) of a share, from two counts.

    For k of n it is (k + z²/2 ± z sqrt(k (n - k) / n + z²/4)) / (n + z²).
    """
    return (
        f"({part} + {_Z**2 / 2:.4f}\n"
        f"{end} {_Z} * sqrt({part} * ({whole} - {part}) / ({whole} > 0) + {_Z**2 / 4:.4f}))\n"
        f"/ ({whole} + {_Z**2:.4f})"
    )


@dataclass(frozen=True)
class ErrorRate:
    """FAR or FRR, as counted over the window.

    Attributes:
        wrong: how many got the wrong verdict.
        whole: how many got one.
    """

    wrong: str
    whole: str

    @property
    def rate(self) -> str:
        """The rate."""
        return share(self.wrong, self.whole)

    @property
    def lower(self) -> str:
        """Lower end of its 95 % interval."""
        return wilson(self.wrong, self.whole, "-")

    @property
    def upper(self) -> str:
        """Upper end of its 95 % interval."""
        return wilson(self.wrong, self.whole, "+")


def frr(counter: str) -> ErrorRate:
    """Return the share of clean inputs that were rejected, from a counter with labels `truth` and `verdict`."""
    return ErrorRate(added(counter, 'truth="clean"', 'verdict="rejected"'), added(counter, 'truth="clean"'))


def far(counter: str) -> ErrorRate:
    """Return the share of trojaned inputs that were accepted, from such a counter."""
    return ErrorRate(added(counter, 'truth="trojaned"', 'verdict="accepted"'), added(counter, 'truth="trojaned"'))


def quantile(which: float, histogram: str, *matchers: str) -> str:
    """Return a quantile of a histogram."""
    return f"histogram_quantile({which}, {per_second(f'{histogram}_bucket', *matchers, by='le')})"


def _summed(vector: str, by: str) -> str:
    return f"sum by ({by}) ({vector})" if by else f"sum({vector})"


def _highest(gauge: str) -> str:
    return f"max({selected(gauge)})"


# What there is to choose from, asked by Grafana.
NAMESPACES = "label_values(stripwire_inputs_total, namespace)"
PODS = 'label_values(stripwire_inputs_total{namespace=~"$namespace"}, pod)'

# Verdicts: canaries are not among them.
INPUTS = per_second("stripwire_inputs_total", _LIVE, by="verdict, mode")
REJECTION_RATE = share(
    per_second("stripwire_inputs_total", _LIVE, 'verdict="rejected"'), per_second("stripwire_inputs_total", _LIVE)
)
BLENDS_PER_INPUT = share(
    per_second("stripwire_perturbations_total", _LIVE), per_second("stripwire_inputs_total", _LIVE)
)

# FAR and FRR.
CALIBRATED_FRR_UPPER = _highest("stripwire_calibrated_frr_upper")
CALIBRATED_FAR_UPPER = _highest("stripwire_calibrated_far_upper")

# Entropy.
ENTROPIES = added("stripwire_entropy_bits_bucket", _LIVE, by="le", over=_RECENT)
ENTROPY_QUANTILES = {
    f"{which:.0%} of inputs at or under": quantile(which, "stripwire_entropy_bits", _LIVE)
    for which in (0.9, 0.5, 0.1, 0.01)
}
THRESHOLD = _highest("stripwire_threshold_bits")
_ENTROPIES_SEEN = added("stripwire_entropy_bits_count", _LIVE)
DRIFT = (
    f"max(abs({added('stripwire_entropy_bits_bucket', _LIVE, by='le')}\n"
    f"/ on () group_left () ({_ENTROPIES_SEEN} > 0)\n"
    f"- avg by (le) ({selected('stripwire_calibration_entropy_share')})))"
)
CHANCE = f"1.36 / sqrt({_ENTROPIES_SEEN} > 0)"
"""What the distance stays under in 95 of 100 windows by chance alone, were live inputs those that calibrated."""

# Canaries.
CANARIES = per_second("stripwire_canary_total", by="truth, verdict")
CANARY_ERRORS = per_second("stripwire_canary_errors_total", by="kind")
CANARY_MEDIAN_SECONDS = quantile(0.5, "stripwire_canary_seconds")
CANARY_P99_SECONDS = quantile(0.99, "stripwire_canary_seconds")
IS_READY = f"min by (pod) ({selected('stripwire_ready')})"
IS_LIVE = f"min by (pod) ({selected('stripwire_live')})"
TAKES_CONTROL_TOKEN = f"min by (pod) ({selected('stripwire_model_control')})"
CERTIFICATE_DAYS = f"min by (certificate) ({selected('stripwire_certificate_not_after_seconds')} - time()) / 86400"
RELOADS = added("stripwire_model_reloads_total", by="model", over=_RECENT)

# Feedback.
FEEDBACK = added("stripwire_feedback_total", by="truth, verdict")
REFUSALS = added("stripwire_feedback_refused_total", by="reason")
RECORD = _summed(selected("stripwire_feedback_total"), by="truth, verdict")

# Quarantine.
REJECTIONS = per_second("stripwire_rejections_total", _LIVE, by="score")
QUARANTINE = _summed(selected("stripwire_quarantine_inputs"), by="truth")
KEPT = per_second("stripwire_quarantine_kept_total")
DROPPED = per_second("stripwire_quarantine_dropped_total", by="reason")

# Triton.
_REQUESTS = per_second("nv_inference_request_success", by="model")
_COMPOSING_REQUESTS = per_second("nv_inference_request_success", _COMPOSING, by="model")
LATENCY_MICROSECONDS = share(per_second("nv_inference_request_duration_us", by="model"), _REQUESTS)
QUEUE_MICROSECONDS = share(per_second("nv_inference_queue_duration_us", _COMPOSING, by="model"), _COMPOSING_REQUESTS)
BATCH_SIZE = share(
    per_second("nv_inference_count", _COMPOSING, by="model"),
    per_second("nv_inference_exec_count", _COMPOSING, by="model"),
)
FAILURES = per_second("nv_inference_request_failure", by="model")
GPU_UTILISATION = f"avg by (pod, gpu_uuid) ({selected('nv_gpu_utilization')})"
GPU_MEMORY_USED = f"max by (pod, gpu_uuid) ({selected('nv_gpu_memory_used_bytes')})"
GPU_MEMORY_TOTAL = f"max by (pod, gpu_uuid) ({selected('nv_gpu_memory_total_bytes')})"
