"""How far the entropies of live traffic have drifted from those of the clean images that calibrated."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import httpx
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from client.monitor.logs import log

WINDOW_SECONDS = 3600.0
LEAST_INPUTS = 100
"""Of fewer, chance alone makes the distance more than a tenth."""

_TIMEOUT_SECONDS = 2.0
_LEAST_SECONDS_APART = 5.0


@dataclass(frozen=True)
class Snapshot:
    """What a server has counted so far.

    Attributes:
        counts: how many live inputs had an entropy at or under each bound; the last bound is infinity.
        shares: what share of clean calibration images has one at or under each; none at infinity.
    """

    counts: Mapping[float, float]
    shares: Mapping[float, float]

    @classmethod
    def of(cls, text: str) -> Snapshot:
        """Return what a page of Triton's metrics says; what is not a number is of a version that is served no more.

        Raises:
            ValueError: it is no such page.
        """
        counts, shares = {}, {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name.removesuffix("_total")  # to Triton each bucket is a counter
                if name == "stripwire_entropy_bits_bucket" and sample.labels["traffic"] == "live":
                    counts[float(sample.labels["le"])] = sample.value
                elif name == "stripwire_calibration_entropy_share" and math.isfinite(sample.value):
                    shares[float(sample.labels["le"])] = sample.value
        return cls(counts, shares)

    def distance(self, before: Snapshot) -> tuple[float, int]:
        """Return the Kolmogorov-Smirnov distance to calibration of the inputs since, and how many they are."""
        inputs = self._since(before, math.inf)
        if inputs <= 0:
            return math.nan, 0
        gaps = (abs(self._since(before, bound) / inputs - share) for bound, share in self.shares.items())
        return max(gaps, default=math.nan), int(inputs)

    def goes_on_from(self, before: Snapshot) -> bool:
        """Say whether the same server has counted on, by the same calibration."""
        return self.shares == before.shares and all(self._since(before, bound) >= 0 for bound in before.counts)

    def _since(self, before: Snapshot, bound: float) -> float:
        return self.counts.get(bound, 0.0) - before.counts.get(bound, 0.0)


class DriftCollector(Collector):
    """Asks the server whenever it is asked itself, and compares with an hour ago, or with the first time.

    Args:
        url: of Triton's metrics.
        clock: seconds that never jump.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._clock = clock
        self._lock = threading.Lock()
        self._past: deque[tuple[float, Snapshot]] = deque()
        self._trouble = ""

    def collect(self) -> Iterator[Metric]:
        """Yield `stripwire_entropy_drift` and of how many inputs; absent where there are too few, or no answer."""
        with self._lock:
            try:
                # The server is beside the monitor, or as near: a proxy that the environment names is not asked.
                answer = httpx.get(self._url, timeout=_TIMEOUT_SECONDS, trust_env=False)
                answer.raise_for_status()
                distance, inputs = self._look(Snapshot.of(answer.text))
            except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError) as error:
                self._say(f"{error or type(error).__name__}")
                return
        self._say("" if self._past[-1][1].shares else "the page tells nothing of a guard")
        if inputs >= LEAST_INPUTS and math.isfinite(distance):
            yield GaugeMetricFamily(
                "stripwire_entropy_drift",
                "Kolmogorov-Smirnov distance of the last hour's live entropies to those of calibration, 0..1.",
                value=distance,
            )
        yield GaugeMetricFamily(
            "stripwire_entropy_drift_inputs", "Live inputs of the last hour that the drift is of.", value=inputs
        )

    def _say(self, trouble: str) -> None:
        """Log why the metrics cannot be used, once for each reason."""
        if trouble not in ("", self._trouble):
            log(logging.WARNING, "the server's metrics tell no drift", url=self._url, why=trouble)
        self._trouble = trouble

    def _look(self, now: Snapshot) -> tuple[float, int]:
        if self._past and not now.goes_on_from(self._past[-1][1]):
            if now.shares and self._past[-1][1].shares not in ({}, now.shares):
                log(logging.WARNING, "another calibration is served than before: start the monitor with its canaries")
            self._past.clear()
        at = self._clock()
        if not self._past or at - self._past[-1][0] >= _LEAST_SECONDS_APART:
            self._past.append((at, now))
        while len(self._past) > 1 and at - self._past[1][0] >= WINDOW_SECONDS:
            self._past.popleft()
        return now.distance(self._past[0][1])
