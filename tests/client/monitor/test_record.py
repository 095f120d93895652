"""The record of feedback on a real disk: counted once, never lost, refused with a reason."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.monitor.record import Added, Feedback, FeedbackRecord
from detector.errors import InputError, RecordError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "record.sqlite"


def total(record: FeedbackRecord) -> int:
    return sum(record.counts().values())


def test_every_truth_and_verdict_is_counted_from_nought(path: Path) -> None:
    with FeedbackRecord(path) as record:
        assert record.counts() == {
            ("clean", "accepted"): 0,
            ("clean", "rejected"): 0,
            ("trojaned", "accepted"): 0,
            ("trojaned", "rejected"): 0,
        }
        assert record.add(Feedback("one", "clean", "rejected")) is Added.NEW
        assert record.counts()["clean", "rejected"] == 1
        assert total(record) == 1


def test_the_same_feedback_again_counts_nothing(path: Path) -> None:
    with FeedbackRecord(path) as record:
        record.add(Feedback("one", "clean", "rejected"))
        assert record.add(Feedback("one", "clean", "rejected")) is Added.KNOWN
        assert total(record) == 1


@pytest.mark.parametrize("other", [("trojaned", "rejected"), ("clean", "accepted")])
def test_other_feedback_on_the_same_request_leaves_the_first(path: Path, other: tuple[str, str]) -> None:
    with FeedbackRecord(path) as record:
        record.add(Feedback("one", "clean", "rejected"))
        assert record.add(Feedback("one", *other)) is Added.CONFLICT
        assert record.get("one") == Feedback("one", "clean", "rejected")
        assert total(record) == 1


def test_nobody_knows_of_a_request_without_feedback(path: Path) -> None:
    with FeedbackRecord(path) as record:
        assert record.get("one") is None


def test_counts_resume_where_they_were(path: Path) -> None:
    with FeedbackRecord(path) as record:
        for number in range(5):
            record.add(Feedback(str(number), "trojaned", "accepted"))
    with FeedbackRecord(path) as record:
        assert record.counts()["trojaned", "accepted"] == 5
        assert record.add(Feedback("3", "trojaned", "accepted")) is Added.KNOWN
        assert total(record) == 5


def test_many_threads_count_each_request_once(path: Path) -> None:
    with FeedbackRecord(path) as record:

        def add_all() -> None:
            for number in range(50):
                record.add(Feedback(str(number), "clean", "accepted"))

        threads = [threading.Thread(target=add_all) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert total(record) == 50


def test_a_clock_that_jumps_back_changes_no_count(path: Path) -> None:
    times = iter([2e9, -5.0, 0.0])
    with FeedbackRecord(path, now=lambda: next(times)) as record:
        assert record.add(Feedback("one", "clean", "accepted")) is Added.NEW
        assert record.add(Feedback("two", "clean", "accepted")) is Added.NEW
        assert record.add(Feedback("one", "clean", "accepted")) is Added.KNOWN
        assert total(record) == 2


_ADDING = """
import sys
from pathlib import Path
from client.monitor.record import Feedback, FeedbackRecord
record = FeedbackRecord(Path(sys.argv[1]))
for number in range(1_000_000):
    record.add(Feedback(str(number), "clean", "accepted"))
    print(number, flush=True)
"""


def test_what_was_acknowledged_survives_kill_9(path: Path) -> None:
    acknowledged = []
    for _ in range(3):  # each run meets what the one before left
        command = [sys.executable, "-c", _ADDING, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                acknowledged.append(line.strip())
                if int(line) >= 40:
                    process.send_signal(signal.SIGKILL)
                    break
            acknowledged += [line.strip() for line in process.stdout if line.endswith("\n")]
        assert process.returncode == -signal.SIGKILL
    with FeedbackRecord(path) as record:
        known = {number for number in acknowledged if record.get(number) is not None}
        assert known == set(acknowledged)
        # One more may be on the disk that was not acknowledged any more.
        assert len(known) <= total(record) <= len(known) + 1


@contextmanager
def no_more_room(path: Path) -> Iterator[None]:
    """Let no file of this process grow beyond what the record has now: the kernel refuses the next write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(file.stat().st_size for file in path.parent.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_told_and_nothing_is_counted_or_lost(path: Path) -> None:
    with FeedbackRecord(path) as record:
        record.add(Feedback("before", "clean", "accepted"))
        with no_more_room(path):
            with pytest.raises(RecordError, match=r"was not recorded .*disk has room"):
                record.add(Feedback("one", "clean", "accepted"))
            assert record.get("before") is not None
            assert total(record) == 1
        assert record.add(Feedback("one", "clean", "accepted")) is Added.NEW
        assert total(record) == 2
    with FeedbackRecord(path) as record:
        assert total(record) == 2


def test_a_record_in_use_is_refused(path: Path) -> None:
    with FeedbackRecord(path), pytest.raises(InputError, match="in use by another process"):
        FeedbackRecord(path, wait_seconds=0.1)
    FeedbackRecord(path).close()


def test_a_record_that_is_let_go_of_in_time_is_taken(path: Path) -> None:
    holder = FeedbackRecord(path)
    timer = threading.Timer(0.3, holder.close)
    timer.start()
    with FeedbackRecord(path, wait_seconds=20) as record:
        assert total(record) == 0
    timer.join()


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to have a header of one" * 40)
    with pytest.raises(InputError, match=r"is damaged or no record \(file is not a database\)"):
        FeedbackRecord(path)


def test_a_damaged_record_is_refused(path: Path) -> None:
    with FeedbackRecord(path) as record:
        for number in range(100):
            record.add(Feedback(f"{number:0128}", "clean", "accepted"))
    content = bytearray(path.read_bytes())
    content[8192:] = os.urandom(len(content) - 8192)
    path.write_bytes(content)
    with pytest.raises(InputError, match="is damaged or no record"):
        FeedbackRecord(path)


def test_a_database_of_something_else_is_refused_and_left_as_it_is(path: Path) -> None:
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE feedback (anything)")
    other.close()
    with pytest.raises(InputError, match="database of something else"):
        FeedbackRecord(path)
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT COUNT(*) FROM feedback").fetchone() == (0,)
    other.close()


VERSION_1 = """
CREATE TABLE feedback (
    request_id TEXT PRIMARY KEY NOT NULL,
    truth TEXT NOT NULL CHECK (truth IN ('clean', 'trojaned')),
    verdict TEXT NOT NULL CHECK (verdict IN ('accepted', 'rejected')),
    recorded_at REAL NOT NULL
) WITHOUT ROWID;
INSERT INTO feedback VALUES ('b', 'clean', 'rejected', 1.5), ('a', 'trojaned', 'rejected', 2.5),
    ('c', 'clean', 'accepted', 0.5);
PRAGMA application_id = 0x53545257;
PRAGMA user_version = 1;
"""


def test_a_record_of_the_version_before_is_taken_over(path: Path) -> None:
    with sqlite3.connect(path) as before:
        before.executescript(VERSION_1)
    before.close()
    for _ in range(2):
        with FeedbackRecord(path) as record:
            assert record.counts()["clean", "rejected"] == 1
            assert record.add(Feedback("c", "clean", "accepted")) is Added.KNOWN
            record.add(Feedback("0", "clean", "accepted"))
            found = record.after(0, 10)
    assert [(each.number, each.feedback.request_id) for each in found] == [(1, "c"), (2, "b"), (3, "a"), (4, "0")]
    assert found[1].recorded_at == 1.5


def test_feedback_is_read_in_pieces_in_the_order_in_which_it_came(path: Path) -> None:
    clock = iter([5.0, 4.0, 3.0])  # a clock that is set back decides nothing
    with FeedbackRecord(path, now=lambda: next(clock)) as record:
        for name in ("b", "c", "a"):
            record.add(Feedback(name, "clean", "accepted"))
        first = record.after(0, 2)
        assert [each.feedback.request_id for each in first] == ["b", "c"]
        (last,) = record.after(first[-1].number, 2)
        assert (last.feedback, last.recorded_at) == (Feedback("a", "clean", "accepted"), 3.0)
        assert record.after(last.number, 2) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent is no folder"):
        FeedbackRecord(tmp_path / "absent" / "record.sqlite")


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        FeedbackRecord(tmp_path)


def test_a_closed_record_takes_nothing(path: Path) -> None:
    record = FeedbackRecord(path)
    record.close()
    with pytest.raises(RecordError, match="not recorded"):
        record.add(Feedback("one", "clean", "accepted"))


def test_a_record_whose_log_was_cut_off_keeps_what_came_before(path: Path, tmp_path: Path) -> None:
    with FeedbackRecord(path) as record:
        for number in range(20):
            record.add(Feedback(str(number), "clean", "accepted"))
        copy = tmp_path / "copy"
        copy.mkdir()
        for file in tmp_path.glob("record.sqlite*"):
            shutil.copy(file, copy)
    log = copy / "record.sqlite-wal"
    log.write_bytes(log.read_bytes()[:-100])  # as a power failure in the middle of a write would
    with FeedbackRecord(copy / "record.sqlite") as record:
        assert total(record) == 19
