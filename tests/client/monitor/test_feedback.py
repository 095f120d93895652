"""Feedback leaves a running monitor as a file, and comes into another: whole, in order, and counted once."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from client.feedback import FeedbackClient, read_saved
from client.monitor.record import Feedback
from detector.errors import DataError, ServerError
from tests.client.monitor.conftest import TOKEN, Monitor, TextPage, given, monitoring, stripwire

AWAY = "127.0.0.1:1"


def counted(monitor: Monitor) -> float:
    return sum(
        monitor.metric("stripwire_feedback_total", truth=truth, verdict=verdict)
        for truth in ("clean", "trojaned")
        for verdict in ("accepted", "rejected")
    )


def test_what_a_monitor_was_told_moves_to_another(canary_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "saved.jsonl"
    with monitoring(canary_file, AWAY) as monitor:
        for feedback in given(8):
            assert monitor.give(**vars(feedback)).status_code == 201
        assert stripwire(monitor, "feedback", "save", str(file)).stdout == f"Feedback on 8 images written to {file}.\n"
        assert f"{file} exists" in stripwire(monitor, "feedback", "save", str(file)).stderr
    assert list(read_saved(file)) == given(8)
    with monitoring(canary_file, AWAY, record=tmp_path / "other.sqlite") as other:
        conflicts = [Feedback(each.request_id, "clean", "rejected") for each in given(8) if each.truth == "trojaned"][
            :2
        ]
        for feedback in conflicts:
            other.give(**vars(feedback))
        loaded = stripwire(other, "feedback", "load", str(file))
        assert (loaded.returncode, loaded.stdout) == (1, "6 new, 0 known before, 2 recorded otherwise.\n")
        for conflict in conflicts:
            assert f"{conflict.request_id}: the record says otherwise than trojaned" in loaded.stderr
        assert counted(other) == 8
        again = tmp_path / "again.jsonl"
        assert stripwire(other, "feedback", "save", str(again)).returncode == 0
        assert "8 known before" in stripwire(other, "feedback", "load", str(again)).stdout
        assert counted(other) == 8


def test_a_load_that_fails_midway_is_told_and_can_be_done_again(canary_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "saved.jsonl"
    file.write_text("".join(json.dumps(vars(feedback)) + "\n" for feedback in given(200)))
    with monitoring(canary_file, AWAY) as monitor:
        monitor.give(request_id="first", truth="clean", verdict="accepted")
        limits = resource.prlimit(monitor.process.pid, resource.RLIMIT_FSIZE)
        size = max(each.stat().st_size for each in tmp_path.glob("record.sqlite*"))
        resource.prlimit(monitor.process.pid, resource.RLIMIT_FSIZE, (size + 40_000, limits[1]))
        failed = stripwire(monitor, "feedback", "load", str(file))
        assert failed.returncode == 1
        assert "of 200 were given: load the file again, which counts nothing twice" in failed.stderr
        assert "nothing was counted" in failed.stderr
        resource.prlimit(monitor.process.pid, resource.RLIMIT_FSIZE, limits)
        assert stripwire(monitor, "feedback", "load", str(file)).returncode == 0
        assert counted(monitor) == 201


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", "line 2: got no JSON"),
        ("{", "line 2: got no JSON"),
        ("[]", "line 2: body: got list"),
        ('{"request_id": "a.0", "truth": "odd", "verdict": "accepted"}', "line 2: truth: got 'odd'"),
        ("\udcff", "cannot be read"),
    ],
)
def test_a_line_that_is_no_feedback_is_named_and_nothing_is_given(
    canary_file: Path, tmp_path: Path, line: str, complaint: str
) -> None:
    file = tmp_path / "saved.jsonl"
    good = json.dumps(vars(given(1)[0]))
    file.write_bytes(f"{good}\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=complaint):
        list(read_saved(file))
    if line == "{":
        with monitoring(canary_file, AWAY) as monitor:
            assert stripwire(monitor, "feedback", "load", str(file)).returncode == 2
            assert counted(monitor) == 0


def test_what_is_no_monitor_gives_no_feedback(page_of_text: TextPage) -> None:
    page_of_text.status = 404
    with (
        pytest.raises(ServerError, match="is this a monitor of ours"),
        FeedbackClient(page_of_text.url, TOKEN) as client,
    ):
        list(client.saved())
