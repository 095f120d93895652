"""What `strip_verdict` says of its traffic on Triton's own metrics port.

Every increment of a metric costs a message to the server, about a tenth of a millisecond. So what happened is added up
here, and a thread of its own hands the sums over a few times a second: no request waits for it, and it costs the same
whatever the traffic. For the same reason the histogram of entropies is one counter a bucket, under the names that a
histogram has; Triton's own takes a message for each observation. PromQL sees no difference.
"""

from __future__ import annotations

import itertools
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.conformal import Floats
from detector.scores import Thresholds

TRAFFIC = ("live", "canary")
VERDICTS = ("accepted", "rejected")

CANARY_KEY = "stripwire_canary"
"""Parameter of a request, true where the input was sent to watch the guard, and is to be counted by itself."""

MOST_LABELS = 1000
"""Labels are counted for at most so many classes: each is a time series."""

_FLUSH_SECONDS = 0.25
_REMINDED_EVERY = 8  # times that it flushes


class LiveMetrics:
    """Counts inputs, their entropies, blends and, if asked, labels.

    Args:
        pb_utils: Triton's `triton_python_backend_utils`, or a typed stand-in.
        mode: of the guard.
        thresholds: of the guard.
        clean: what share of clean images is at or under each upper bound of the histogram's buckets, in bits.
        calibration: labels of `stripwire_calibration_info`.
        created: when the calibration was made, in seconds since 1970.
        classes: how many classes there are, where labels are to be counted; None where not.
        tell_others: called whenever sums are handed over, to hand over what others have counted.
    """

    def __init__(
        self,
        pb_utils: Any,
        *,
        mode: str,
        thresholds: Thresholds,
        clean: Mapping[float, float],
        calibration: Mapping[str, str],
        created: float,
        classes: int | None = None,
        tell_others: Callable[[], None] = lambda: None,
    ) -> None:
        self._tell_others = tell_others
        family = pb_utils.MetricFamily
        self._families: list[Any] = []  # a metric ends with its family

        def add(name: str, kind: Any, description: str, labels: Sequence[Mapping[str, str]]) -> list[Any]:
            self._families.append(family(name=f"stripwire_{name}", description=description, kind=kind))
            return [self._families[-1].Metric(labels=dict(each)) for each in labels]

        # What never changes, each with its value. Another version's process may have set the same gauges before.
        (info,) = add(
            "calibration_info", family.GAUGE, "Where the thresholds in force are from: 1, others are 0", [calibration]
        )
        self._info = info
        self._fixed: list[tuple[Any, float]] = [(info, 1.0)]
        gauges = {
            "threshold_bits": (thresholds.bits, "At or under this entropy, in bits, an input is rejected"),
            "threshold_plain_bits": (
                thresholds.plain_bits,
                "At or under this entropy of the sentinel's answer to it as it came, in bits, an input is rejected",
            ),
            "threshold_nll": (thresholds.nll, "At or over this nll, in nats, an input is rejected"),
            "calibration_timestamp_seconds": (created, "When the thresholds were calibrated, in seconds since 1970"),
        }
        for name, (value, description) in gauges.items():
            if value is not None:
                self._fixed.append((add(name, family.GAUGE, description, [{}])[0], value))

        clean = {float(f"{bound:.6g}"): share for bound, share in clean.items()}  # as the labels say them
        self._bounds = np.array([*clean], np.float64)
        bounds = [f"{bound:.6g}" for bound in self._bounds]
        of_clean = "What share of the clean images that calibrated has an entropy at or under a bound, in bits"
        shares = add("calibration_entropy_share", family.GAUGE, of_clean, [{"le": bound} for bound in bounds])
        self._fixed += zip(shares, clean.values(), strict=True)

        # What is counted: for each kind of traffic, the metrics of one row of `self._pending`.
        self._scores, self._classes = thresholds.scores, classes
        parts: list[tuple[str, str, list[dict[str, str]]]] = [
            ("inputs_total", "Inputs, by verdict", [{"verdict": verdict, "mode": mode} for verdict in VERDICTS]),
            (
                "rejections_total",
                "Rejected inputs, by the scores at or beyond their thresholds, which may be several",
                [{"score": score} for score in self._scores],
            ),
            ("perturbations_total", "Blends that the sentinel was asked about", [{}]),
            ("entropy_bits_sum", "Sum of the entropies of inputs, as the detector takes them, in bits", [{}]),
            ("entropy_bits_count", "How many entropies there were", [{}]),
            (
                "entropy_bits_bucket",
                "How many were at or under a bound, in bits",
                [{"le": bound} for bound in (*bounds, "+Inf")],
            ),
        ]
        if classes is not None:
            labels = [{"label": str(label)} for label in range(classes + 1)]
            parts.append(("labels_total", "Labels answered; one past the last class is a rejection", labels))
        columns: list[list[Any]] = [[] for _ in TRAFFIC]
        for name, description, labels in parts:
            made = add(
                name, family.COUNTER, description, [{"traffic": kind} | each for kind in TRAFFIC for each in labels]
            )
            for row, column in enumerate(columns):
                column += made[row * len(labels) : (row + 1) * len(labels)]
        self._counters = columns
        self._pending = np.zeros((len(TRAFFIC), len(columns[0])))
        self._remind()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stripwire-metrics", daemon=True)
        self._thread.start()

    def count(
        self,
        canary: NDArray[np.bool_],
        trojaned: NDArray[np.bool_],
        rejecting: Mapping[str, NDArray[np.bool_]],
        bits: Floats,
        perturbations: NDArray[np.integer[Any]],
        labels: NDArray[np.integer[Any]],
    ) -> None:
        """Add inputs, all arguments (inputs,).

        Args:
            canary: which were sent to watch the guard.
            trojaned: the verdicts.
            rejecting: for each score, which it rejects.
            bits: scores of the entropies; what is not a number is in no bucket.
            perturbations: how many blends ran.
            labels: what was answered, 0..classes.
        """
        added = np.zeros_like(self._pending)
        for row, chosen in enumerate((~canary, canary)):
            if not chosen.any():
                continue
            known = bits[chosen & np.isfinite(bits)].astype(np.float64)
            buckets = np.searchsorted(np.sort(known), self._bounds, side="right")
            rejected = np.count_nonzero(trojaned[chosen])
            parts = [
                [np.count_nonzero(chosen) - rejected, rejected],
                [np.count_nonzero(rejecting[score][chosen]) for score in self._scores],
                [perturbations[chosen].sum(), known.sum(), len(known)],
                [*buckets, len(known)],
            ]
            if self._classes is not None:
                parts.append(np.bincount(labels[chosen], minlength=self._classes + 1).tolist())
            added[row] = np.concatenate(parts)
        with self._lock:
            self._pending += added

    def close(self) -> None:
        """Hand over what was counted, and end."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        for turn in itertools.count():
            ended = self._ended.wait(_FLUSH_SECONDS)
            try:
                self._flush()
                self._tell_others()
                if ended:
                    self._retire()
                elif turn % _REMINDED_EVERY == 0:
                    self._remind()
            except Exception as error:  # noqa: BLE001  whatever Triton raises: counting must go on, and fail no request
                print(f"stripwire: metrics could not be handed over, and are kept: {error}", file=sys.stderr)
            if ended:
                return

    def _remind(self) -> None:
        """Set what never changes: a version that is replaced ends after its successor began, and shares its gauges."""
        for metric, value in self._fixed:
            metric.set(value)

    def _retire(self) -> None:
        """Take back what is true no more: not a number, for Prometheus, is as good as absent."""
        for metric, _ in self._fixed:
            metric.set(math.nan)
        self._info.set(0.0)

    def _flush(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, np.zeros_like(self._pending)
        try:
            for row, column in zip(pending, self._counters, strict=True):
                for index in np.flatnonzero(row):
                    column[index].increment(float(row[index]))
                    row[index] = 0.0
        finally:
            with self._lock:
                self._pending += pending  # what was not handed over
