"""Whether the monitor may load models again, found out before one is broken."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from client.api import GuardedClient
from client.control import ModelControl
from client.monitor.logs import log
from detector.errors import AccessDeniedError, StripwireError

_AGAIN_SECONDS = 3600.0


class ControlToken:
    """The server's control token: one that was given, or one that a server on this machine leaves to be found.

    Args:
        given: the first kind; None where there is none.
        find: returns the second kind, if it is there.
    """

    def __init__(self, given: str | None, find: Callable[[], str | None]) -> None:
        self._given = given
        self._find = find
        self._was_there = False

    def now(self) -> str | None:
        """Return the token; a server that was started anew may have another one."""
        token = self._given or self._find()
        self._was_there |= token is not None
        return token

    def is_gone(self) -> bool:
        """Say whether it was there and no longer is: `stripwire serve` takes it away before it stops."""
        try:
            return self._was_there and self.now() is None
        except StripwireError:  # it cannot be read, and so is there
            return False


class ControlCheck(Collector):
    """Tries the control token when the server answers, once an hour at most, and tells whether it was taken.

    Args:
        connect: opens a client that has the token; None where there is no token.
        clock: seconds that never jump.
    """

    def __init__(
        self, connect: Callable[[], GuardedClient | None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._connect = connect
        self._clock = clock
        self._tried_at: float | None = None
        self._taken: bool | None = None

    def try_now_and_then(self) -> None:
        """Try the token, if it was not tried within the last hour."""
        now = self._clock()
        if self._tried_at is None or now - self._tried_at >= _AGAIN_SECONDS:
            self._tried_at = now
            self._taken = self._try()

    def collect(self) -> Iterator[Metric]:
        """Yield `stripwire_model_control`; nothing where there is no token, or none was tried."""
        if self._taken is not None:
            yield GaugeMetricFamily(
                "stripwire_model_control", "Whether the server takes the monitor's control token.", value=self._taken
            )

    def _try(self) -> bool | None:
        """Return whether the token is taken; None where nobody can say."""
        try:
            client = self._connect()
            if client is None:
                return None
            with client:
                ModelControl(client).check_access()
        except AccessDeniedError as error:
            log(
                logging.WARNING,
                "a model that breaks could not be loaded again: the server refuses the control token",
                why=str(error),
            )
            return False
        except StripwireError as error:
            log(logging.WARNING, "the control token could not be tried", why=str(error))
            return None
        return True
