"""Health by inference: the server is ready if a canary just got its verdict, whatever the server says of itself.

A model that is broken is named and, where the monitor may, loaded again. Where that is not allowed or does not help, or
canaries fail for too long, liveness fails, and whoever asks for it starts the server anew.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from client.api import GuardedClient
from client.control import ENSEMBLE, ModelControl
from client.monitor.diagnosis import Broken, find_broken
from client.monitor.logs import log
from client.monitor.metrics import MonitorMetrics
from client.monitor.sender import CanarySender, Outcome
from detector.errors import StripwireError

_SAY_AGAIN_SECONDS = 60.0
_TREATABLE = ("failed", "deadline")
# What a server that is started anew may be cured of. Refusals and a file that does not fit stay as they are; and were
# one that is overloaded taken away, its requests would go to the others, until none is left.
_DEADLY = ("failed", "deadline", "unavailable")


# It answers: the canary, or, where it has more to do than it can, others before it.
_ANSWERS = (None, "overloaded")


@dataclass(frozen=True)
class Status:
    """How the server is.

    Attributes:
        ready: whether it can be sent requests.
        live: whether it can go on without being started anew.
        why: what is wrong; empty where nothing is.
    """

    ready: bool
    live: bool
    why: str


class Health:
    """Judges a server by canaries, and heals it. One thread calls `round`; any may ask for `status`.

    Args:
        sender: sends the canaries.
        connect: opens a client that asks single models.
        connect_control: opens a client that may load models, if anybody may.
        metrics: where reloads are counted.
        stale_after_seconds: how old the last verdict may be for the server to be ready.
        dead_after_seconds: how long canaries may fail before liveness does. A server that has answered none yet may
            still be starting, and be away as long as it likes.
        answered: called after every canary that got its verdict.
        is_stopping: says whether the server is stopping, as far as can be known: then nothing is wrong with its models.
        pause_seconds: how long nothing is tried after an attempt to heal that did not help.
        clock: seconds that never jump.
    """

    def __init__(
        self,
        sender: CanarySender,
        connect: Callable[[], GuardedClient],
        connect_control: Callable[[], GuardedClient],
        metrics: MonitorMetrics,
        *,
        stale_after_seconds: float,
        dead_after_seconds: float,
        answered: Callable[[], None] = lambda: None,
        is_stopping: Callable[[], bool] = lambda: False,
        pause_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sender = sender
        self._connect = connect
        self._connect_control = connect_control
        self._metrics = metrics
        self._stale_after_seconds = stale_after_seconds
        self._dead_after_seconds = dead_after_seconds
        self._answered = answered
        self._is_stopping = is_stopping
        self._pause_seconds = pause_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._last: Outcome | None = None
        self._answered_at: float | None = None
        self._failing_since: float | None = None
        self._unhealed = ""
        self._in_vain_at: float | None = None
        self._said_at = 0.0
        metrics.ready.set_function(lambda: float(self.status().ready))
        metrics.live.set_function(lambda: float(self.status().live))

    def status(self) -> Status:
        """Return how the server is now."""
        now = self._clock()
        with self._lock:
            whys = [self._unhealed, self._last.why if self._last else "no canary was sent yet"]
            since, answered_at = self._failing_since, self._answered_at
            ready = self._last is not None and self._last.kind in _ANSWERS
            live = not self._unhealed
        if answered_at is not None and now - answered_at > self._stale_after_seconds:
            ready = False
            whys.append(f"the last verdict came {now - answered_at:.0f} seconds ago")
        if since is not None and now - since > self._dead_after_seconds:
            live = False
        return Status(ready and live, live, "; ".join(why for why in whys if why))

    def round(self) -> None:
        """Send one canary; if it fails, find out why, and heal what can be healed."""
        outcome = self._send()
        if outcome.kind is None:
            self._answered()
        if outcome.kind not in _TREATABLE or self._is_stopping():
            return
        now = self._clock()
        if self._in_vain_at is not None and now - self._in_vain_at < self._pause_seconds:
            return
        try:
            helped = self._treat()
        except StripwireError as error:  # nothing can be said of the models
            log(logging.WARNING, "no broken model was found", why=str(error))
            helped = False
        self._in_vain_at = None if helped else now

    def _send(self) -> Outcome:
        outcome = self._sender.send()
        now = self._clock()
        with self._lock:
            before, self._last = self._last, outcome
            gone = outcome.kind == "unavailable"
            if outcome.kind in _ANSWERS:
                self._answered_at = now
            if outcome.kind in _ANSWERS or gone:
                self._unhealed = ""
            if outcome.kind not in _DEADLY or (gone and self._answered_at is None):
                self._failing_since = None
            elif self._failing_since is None or (gone and before is not None and before.kind != "unavailable"):
                self._failing_since = now  # one that is started anew has its time, whatever the one before had done
        changed = before is None or before.kind != outcome.kind
        if outcome.kind is None and changed:
            log(logging.INFO, "canaries get verdicts")
        elif outcome.kind is not None and (changed or now - self._said_at >= _SAY_AGAIN_SECONDS):
            log(logging.WARNING, "a canary got no verdict", kind=outcome.kind, why=outcome.why)
            self._said_at = now
        return outcome

    def _treat(self) -> bool:
        """Load again what is broken; return whether nothing is, in the end."""
        healed: set[str] = set()
        while (broken := self._find()) is not None:
            log(logging.ERROR, "a model is broken", model=broken.model, reason=broken.reason, why=broken.why)
            if broken.model in healed:
                return self._give_up(broken, "it fails again right after it was loaded again")
            try:
                self._reload(broken)
            except StripwireError as error:
                return self._give_up(broken, f"it could not be loaded again: {error}")
            healed.add(broken.model)
        return self.status().ready

    def _find(self) -> Broken | None:
        """Return the model that is broken; None where there is none, or where a canary gets its verdict again."""
        with self._connect() as client:
            broken = find_broken(client, self._sender.image)
        if broken is not None:
            return broken
        outcome = self._send()
        return Broken(ENSEMBLE, "failed", outcome.why) if outcome.kind == "failed" else None

    def _reload(self, broken: Broken) -> None:
        started = self._clock()
        with self._connect_control() as client:
            ModelControl(client).reload(broken.model)
        self._metrics.reloads.labels(broken.model, broken.reason).inc()
        seconds = round(self._clock() - started, 3)
        log(logging.WARNING, "the model was loaded again", model=broken.model, reason=broken.reason, seconds=seconds)

    def _give_up(self, broken: Broken, why: str) -> bool:
        with self._lock:
            self._unhealed = f"model {broken.model} is broken, and {why}"
        log(logging.ERROR, "the model stays broken", model=broken.model, reason=broken.reason, why=why)
        return False


class Watch:
    """Calls `Health.round` at a steady rate, in a thread of its own, as a context manager.

    Args:
        health: what is called.
        failed: called if the thread fails, after which nobody sends canaries any more.
        interval_seconds: from the beginning of a round to that of the next, unless a round takes longer.
        clock: seconds that never jump.
    """

    def __init__(
        self,
        health: Health,
        interval_seconds: float,
        failed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._health = health
        self._failed = failed
        self._interval_seconds = interval_seconds
        self._clock = clock
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="canaries")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()  # a model that is unloaded must be loaded again: this takes as long as it takes

    def _run(self) -> None:
        at = self._clock()
        try:
            while not self._ended.wait(max(0.0, at - self._clock())):
                self._health.round()
                at = max(at + self._interval_seconds, self._clock())  # what was missed is not sent in a burst
        except Exception:
            logging.getLogger("stripwire.monitor").critical("the monitor failed", exc_info=True)
            self._failed()
