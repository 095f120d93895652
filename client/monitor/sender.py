"""Sends one canary after another, and counts what came of each."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from client.api import GuardedClient
from client.control import ENSEMBLE
from client.metrics import outcome_of
from client.monitor.metrics import MonitorMetrics
from detector.errors import DataError, InputError, ServerError, StripwireError
from samples.canaries import Canaries

_LOOK_SECONDS = 2.0
_WAITED_TOO_LONG = "Request timeout expired"  # in Triton's words, in a queue


@dataclass(frozen=True)
class Outcome:
    """What came of one canary.

    Attributes:
        kind: why it got no verdict, one of `client.monitor.metrics.ERROR_KINDS`; None where it got one.
        why: the error's own words.
    """

    kind: str | None = None
    why: str = ""


class CanarySender:
    """Sends canaries, clean and trojaned in turns, each kind over and over.

    Args:
        canaries: what to send.
        connect: opens a client; called again after every error, since the server may be another one then.
        metrics: where outcomes are counted.
        clock: seconds that never jump.
    """

    def __init__(
        self,
        canaries: Canaries,
        connect: Callable[[], GuardedClient],
        metrics: MonitorMetrics,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._canaries = canaries
        self._connect = connect
        self._metrics = metrics
        self._clock = clock
        self._turns = _turns(canaries.trojaned)
        self._answered: int | None = None
        self._client: GuardedClient | None = None

    @property
    def image(self) -> NDArray[np.uint8]:
        """One canary: (1, height, width, channels), uint8."""
        return self._canaries.images[:1]

    def close(self) -> None:
        """Close the connection."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def send(self) -> Outcome:
        """Send the next canary and count what comes of it."""
        index = next(self._turns)
        try:
            client = self._client = self._client or self._connect()
        except InputError as error:  # a file of TLS is gone, or our certificate has expired meanwhile
            return self._unanswered("denied", error)
        try:
            self._check_fit(client)
            started = self._clock()
            verdict = client.classify(self._canaries.images[index], canary=True)[0]
        except (ServerError, InputError) as error:
            kind = "mismatch" if isinstance(error, InputError) else outcome_of(error)
            if (kind == "deadline" or _WAITED_TOO_LONG in str(error)) and self._answers_others():
                kind = "overloaded"
            self.close()
            return self._unanswered(kind, error)
        self._answered = None
        self._metrics.canary_seconds.observe(self._clock() - started)
        truth = "trojaned" if self._canaries.trojaned[index] else "clean"
        self._metrics.canaries.labels(truth, "rejected" if verdict.trojaned else "accepted").inc()
        return Outcome()

    def _unanswered(self, kind: str, error: StripwireError) -> Outcome:
        self._metrics.canary_errors.labels(kind).inc()
        return Outcome(kind, str(error))

    def _answers_others(self) -> bool:
        """Say whether the server has answered others since we last asked, or else within two seconds from now."""
        before = self._answered
        if before is None and (before := self._count_answered()) is not None:
            time.sleep(_LOOK_SECONDS)
        self._answered = self._count_answered()
        # One of them may be the canary that took too long.
        return before is not None and self._answered is not None and self._answered > before + 1

    def _count_answered(self) -> int | None:
        """Return how many requests have got their verdict from the server; None where it does not say."""
        client = self._client
        if client is None:
            return None
        try:
            told = client.ask(ENSEMBLE, lambda triton, **options: triton.get_inference_statistics(ENSEMBLE, **options))
        except (ServerError, InputError):
            return None
        return sum(int(version.inference_stats.success.count) for version in told.model_stats)

    def _check_fit(self, client: GuardedClient) -> None:
        about = client.metadata()
        if about.classes != self._canaries.classes:
            raise DataError(
                f"canaries: got a file for {self._canaries.classes} classes, but the server has {about.classes}; write "
                "one for what it serves (`stripwire canaries`)"
            )


def _turns(trojaned: NDArray[np.bool_]) -> Iterator[int]:
    """Yield indices for ever: of the clean images and the trojaned ones in turns, where there are both."""
    kinds = [np.flatnonzero(trojaned == kind).tolist() for kind in (False, True)]
    for turn in zip(*(itertools.cycle(kind) for kind in kinds if kind), strict=True):
        yield from turn
