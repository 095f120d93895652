"""The record of feedback: an SQLite database on disk, which is the truth; what is counted is counted from it.

Feedback is acknowledged only after it is on the disk (write-ahead log, synchronous = FULL), so that neither a killed
monitor nor a power failure loses what was acknowledged.
"""

from __future__ import annotations

import json
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any

from detector.errors import InputError, RecordError
from detector.live_metrics import VERDICTS

TRUTHS = ("clean", "trojaned")

_FIELDS = ("request_id", "truth", "verdict")
_APPLICATION_ID = 0x53545257  # "STRW", in the header of the file
_SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE feedback (
    number INTEGER PRIMARY KEY,
    request_id TEXT UNIQUE NOT NULL,
    truth TEXT NOT NULL CHECK (truth IN ('clean', 'trojaned')),
    verdict TEXT NOT NULL CHECK (verdict IN ('accepted', 'rejected')),
    recorded_at REAL NOT NULL
)
"""
_FROM_VERSION_1 = (  # which kept no order but that of the clock
    "ALTER TABLE feedback RENAME TO before",
    _SCHEMA,
    "INSERT INTO feedback (request_id, truth, verdict, recorded_at) "
    "SELECT request_id, truth, verdict, recorded_at FROM before ORDER BY recorded_at, request_id",
    "DROP TABLE before",
)


@dataclass(frozen=True)
class Feedback:
    """What somebody found out about one request.

    Attributes:
        request_id: of the request, as its caller names it.
        truth: one of `TRUTHS`: what the image really was.
        verdict: one of `VERDICTS`: what the guard said of it.
    """

    request_id: str
    truth: str
    verdict: str


@dataclass(frozen=True)
class Recorded:
    """Feedback in the record.

    Attributes:
        number: of the feedback; what came later has a higher one.
        feedback: what was said.
        recorded_at: when, in seconds since 1970 (UTC), by the clock of the monitor.
    """

    number: int
    feedback: Feedback
    recorded_at: float


class Added(Enum):
    """What came of feedback that was handed in."""

    NEW = "new"
    KNOWN = "known"
    """The very same feedback is in the record: nothing was counted."""
    CONFLICT = "conflict"
    """Other feedback on the same request is in the record, and stays: nothing was counted."""


class FeedbackRecord:
    """The record in one file, which is made if there is none. Safe to share between threads.

    One process at a time holds it: two would not know of each other's counts.

    Args:
        path: the database; its folder must exist.
        wait_seconds: how long another process may take to let go of it.
        now: seconds since 1970 (UTC), which are noted down and decide nothing.

    Raises:
        InputError: the file cannot be opened, is in use, is damaged, or is something else.
    """

    def __init__(self, path: Path, *, wait_seconds: float = 5.0, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._now = now
        self._lock = threading.Lock()
        self._connection = _opened(path, wait_seconds)
        try:
            self._counts = self._counted()
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> FeedbackRecord:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._connection.close()

    def add(self, feedback: Feedback) -> Added:
        """Put feedback into the record; what is returned is on the disk.

        Raises:
            RecordError: the record cannot be written or read; nothing was counted, and the same may be tried again.
        """
        row = (feedback.request_id, feedback.truth, feedback.verdict, self._now())
        with self._lock:
            try:
                # One statement is one transaction: it is on the disk as a whole when this returns, or not at all.
                added = self._connection.execute(
                    "INSERT INTO feedback (request_id, truth, verdict, recorded_at) VALUES (?, ?, ?, ?) "
                    "ON CONFLICT (request_id) DO NOTHING",
                    row,
                )
                if added.rowcount == 1:
                    self._counts[feedback.truth, feedback.verdict] += 1
                    return Added.NEW
                known = self._get(feedback.request_id)
            except sqlite3.Error as error:
                raise RecordError(
                    f"{self._path}: the feedback was not recorded ({error}); nothing was counted: make sure that the "
                    "disk has room and can be written, then send it again"
                ) from error
        return Added.KNOWN if known == feedback else Added.CONFLICT

    def get(self, request_id: str) -> Feedback | None:
        """Return the feedback on a request; None where there is none.

        Raises:
            RecordError: the record cannot be read.
        """
        with self._lock:
            try:
                return self._get(request_id)
            except sqlite3.Error as error:
                raise RecordError(f"{self._path}: the record cannot be read ({error})") from error

    def after(self, number: int, limit: int) -> list[Recorded]:
        """Return the feedback that came after the one of that number, in order, up to `limit`; 0 is before the first.

        So whoever reads it all does not hold it all, and those who write wait for one piece at the most.

        Raises:
            RecordError: the record cannot be read.
        """
        with self._lock:
            try:
                found = self._connection.execute(
                    "SELECT number, request_id, truth, verdict, recorded_at FROM feedback WHERE number > ? "
                    "ORDER BY number LIMIT ?",
                    (number, limit),
                ).fetchall()
            except sqlite3.Error as error:
                raise RecordError(f"{self._path}: the record cannot be read ({error})") from error
        return [
            Recorded(number, Feedback(request_id, truth, verdict), recorded_at)
            for number, request_id, truth, verdict, recorded_at in found
        ]

    def counts(self) -> Mapping[tuple[str, str], int]:
        """Return how often each truth and verdict is in the record: all of them, also those that never came."""
        with self._lock:
            return dict(self._counts)

    def _get(self, request_id: str) -> Feedback | None:
        found = self._connection.execute(
            "SELECT request_id, truth, verdict FROM feedback WHERE request_id = ?", (request_id,)
        ).fetchone()
        return None if found is None else Feedback(*found)

    def _counted(self) -> dict[tuple[str, str], int]:
        try:
            found = self._connection.execute("SELECT truth, verdict, COUNT(*) FROM feedback GROUP BY truth, verdict")
            counts = {(truth, verdict): count for truth, verdict, count in found}
        except sqlite3.Error as error:
            raise _unusable(self._path, error) from error
        return {(truth, verdict): counts.get((truth, verdict), 0) for truth in TRUTHS for verdict in VERDICTS}


def read_feedback(body: bytes) -> Feedback:
    """Return the feedback in the body of a request: JSON of exactly `request_id`, `truth` and `verdict`.

    Raises:
        InputError: it is none; the message says which field, what came, and what was expected.
    """
    try:
        fields = json.loads(body.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise InputError(f"body: got no JSON ({error}), expected an object of {', '.join(_FIELDS)}") from None
    if not isinstance(fields, dict) or fields.keys() != set(_FIELDS):
        got = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise InputError(f"body: got {got}, expected an object of exactly {', '.join(_FIELDS)}")
    request_id = fields["request_id"]
    if not (isinstance(request_id, str) and re.fullmatch(r"[!-.0-~]{1,128}", request_id)):
        raise InputError(
            f"request_id: got {request_id!r}, expected 1 to 128 printable ASCII characters without blanks and slashes"
        )
    for name, known in (("truth", TRUTHS), ("verdict", VERDICTS)):
        if not (isinstance(fields[name], str) and fields[name] in known):
            raise InputError(f"{name}: got {fields[name]!r}, expected one of {', '.join(known)}")
    return Feedback(**fields)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a field is given twice")
    return fields


def _opened(path: Path, wait_seconds: float) -> sqlite3.Connection:
    """Open the database, hold it alone, check it, and make its table if it is new."""
    if not path.parent.is_dir():
        raise InputError(f"record: {path.parent} is no folder, expected one that the monitor may write")
    try:
        # Each statement is a transaction of its own; our lock keeps threads apart.
        connection = sqlite3.connect(path, timeout=wait_seconds, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise _unusable(path, error) from error
    try:
        _prepare(path, connection)
    except sqlite3.Error as error:
        connection.close()
        raise _unusable(path, error) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(path: Path, connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    (journal,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if journal != "wal":
        raise InputError(f"record: {path} cannot have a write-ahead log, expected a file on a local disk")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("BEGIN IMMEDIATE")  # from here on the file is ours alone, until we end
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    (said,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if said != "ok":
        raise sqlite3.DatabaseError(said)
    if (application, version, tables) == (0, 0, 0):
        connection.execute(_SCHEMA)
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
    elif (application, version) == (_APPLICATION_ID, 1):
        for statement in _FROM_VERSION_1:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
    elif (application, version) != (_APPLICATION_ID, _SCHEMA_VERSION):
        raise InputError(
            f"record: {path} is a database of something else (application {application}, version {version}), "
            "expected a record that a monitor of this Stripwire has made, or no file"
        )
    connection.execute("COMMIT")


def _unusable(path: Path, error: sqlite3.Error) -> InputError:
    said = str(error)
    if "locked" in said:
        return InputError(
            f"record: {path} is in use by another process, expected one that this monitor holds alone; stop the other "
            "monitor, or give each a record of its own"
        )
    if any(word in said for word in ("unable to open", "readonly", "I/O", "full")):
        return InputError(
            f"record: {path} cannot be written ({said}), expected a file in a folder that the monitor may write, on a "
            "local disk with room"
        )
    return InputError(
        f"record: {path} is damaged or no record ({said}); put a backup in its place, or move it and its -wal file "
        "away, with which the counts begin anew"
    )
