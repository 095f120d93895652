"""Takes all feedback out of a monitor, as lines of JSON, and gives it to one again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from client.monitor.record import Added, Feedback, read_feedback
from client.monitor_client import MonitorClient
from detector.errors import DataError, InputError

_ADDED = {201: Added.NEW, 200: Added.KNOWN, 409: Added.CONFLICT}


class FeedbackClient(MonitorClient):
    """The record of feedback of one monitor; see `MonitorClient`."""

    def saved(self) -> Iterator[str]:
        """Yield all feedback in the order in which it came, a line of JSON each, as it comes.

        Raises:
            ServerError: no usable answer, or one that breaks off.
        """
        return self.lines("/v1/feedback")

    def give(self, feedback: Feedback) -> Added:
        """Give feedback, and return what came of it.

        Raises:
            ServerError: it was not recorded; the same may be given again.
        """
        return _ADDED[self.ask("POST", "/v1/feedback", json=vars(feedback), fine=(409,)).status_code]


def read_saved(path: Path) -> Iterator[Feedback]:
    """Yield the feedback in a file that `stripwire feedback save` wrote.

    Raises:
        DataError: a line is none; the message says which, and what was expected.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield _feedback(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}), expected what `stripwire feedback save` wrote") from error


def _feedback(path: Path, number: int, line: str) -> Feedback:
    try:
        fields = json.loads(line)
        if isinstance(fields, dict):
            fields.pop("recorded_at", None)  # the monitor notes down its own time
        return read_feedback(json.dumps(fields).encode())
    except (ValueError, RecursionError) as error:
        said = error if isinstance(error, InputError) else f"got no JSON ({error}), expected a line for each feedback"
        raise DataError(f"{path}: line {number}: {said}") from None
