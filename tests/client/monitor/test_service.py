"""The command as a process: real server, real disk, real signals."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from client.monitor.record import FeedbackRecord
from client.monitor.service import _listening
from client.monitor.settings import MonitorSettings
from deploy.embedded.server import EmbeddedTriton
from samples.canaries import write_canaries
from tests.client.monitor.conftest import ROOT, Monitor, canaries, kill, monitoring
from tests.conftest import wait_for

AWAY = "127.0.0.1:1"
FAST = ("--canaries-per-minute", "600")


def refusal(*options: str | Path) -> tuple[int, str]:
    """Run the command until it ends by itself; return its exit status and what it said."""
    command = [sys.executable, "-m", "stripwire", "monitor", "--listen", "127.0.0.1:0", *map(str, options)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STRIPWIRE_")}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120, check=False)
    assert "Traceback" not in ended.stderr
    return ended.returncode, ended.stderr


def test_it_watches_a_server_heals_it_and_ends_cleanly(ensemble: EmbeddedTriton, canary_file: Path) -> None:
    with monitoring(canary_file, ensemble.grpc_address, *FAST) as monitor:
        wait_for(lambda: monitor.http.get("/readyz").status_code == 200)
        assert monitor.http.get("/livez").json() == {"live": True, "why": ""}
        assert monitor.give(request_id="one", truth="trojaned", verdict="accepted").status_code == 201

        kill(ensemble, "strip_perturb")  # its control token lies where the same user finds it
        wait_for(lambda: monitor.metric("stripwire_model_reloads_total", model="strip_perturb", reason="died") == 1)
        wait_for(lambda: monitor.http.get("/readyz").status_code == 200)

        sent = monitor.metric("stripwire_canary_total", truth="clean", verdict="rejected")
        wait_for(
            lambda: (
                monitor.metric("stripwire_canary_total", truth="clean", verdict="rejected") > sent
                and monitor.metric("stripwire_canary_total", truth="trojaned", verdict="rejected") > 0
            )
        )
        assert monitor.metric("stripwire_feedback_total", truth="trojaned", verdict="accepted") == 1
        assert monitor.metric("stripwire_calibrated_far_upper") == 0.2
        assert monitor.metric("stripwire_canaries_calibrated_timestamp_seconds") == 1.7e9
        assert monitor.stop() == 0
        assert monitor.events() == [
            "listening",
            "canaries get verdicts",
            "a canary got no verdict",
            "a model is broken",
            "the model was loaded again",
            "canaries get verdicts",
            "stopped",
        ]
        (broken,) = [line for line in monitor.lines() if line["event"] == "a model is broken"]
        assert (broken["model"], broken["level"], broken["reason"]) == ("strip_perturb", "error", "died")


def test_a_server_that_is_away_at_the_start_is_waited_for(canary_file: Path) -> None:
    with monitoring(canary_file, AWAY, *FAST) as monitor:
        wait_for(lambda: monitor.metric("stripwire_canary_errors_total", kind="unavailable") >= 3)
        assert monitor.http.get("/readyz").status_code == 503
        assert monitor.http.get("/livez").status_code == 200
        assert monitor.give(request_id="one", truth="clean", verdict="accepted").status_code == 201
        assert monitor.events().count("a canary got no verdict") == 1  # not one for each
        assert monitor.stop() == 0


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_right_after_the_start_ends_it_too(canary_file: Path, signal_number: signal.Signals) -> None:
    with monitoring(canary_file, AWAY) as monitor:
        monitor.process.send_signal(signal_number)
        assert monitor.process.wait(timeout=60) == 0
        assert monitor.events()[-1] == "stopped"


def test_counts_go_on_after_a_restart(canary_file: Path) -> None:
    feedback = {"request_id": "one", "truth": "clean", "verdict": "rejected"}
    with monitoring(canary_file, AWAY) as monitor:
        assert monitor.give(**feedback).status_code == 201
        assert monitor.stop() == 0
    with monitoring(canary_file, AWAY) as monitor:
        assert monitor.metric("stripwire_feedback_total", truth="clean", verdict="rejected") == 1
        assert monitor.give(**feedback).status_code == 200
        assert monitor.metric("stripwire_feedback_total", truth="clean", verdict="rejected") == 1


def test_feedback_that_was_acknowledged_survives_kill_9_and_counts_once(canary_file: Path) -> None:
    acknowledged: set[str] = set()

    def give_all(monitor: Monitor, caller: str) -> None:
        for number in range(10_000):
            request_id = f"{caller}-{number}"
            try:
                answer = monitor.give(request_id=request_id, truth="clean", verdict="accepted")
            except httpx.HTTPError:
                return  # it is dead
            assert answer.status_code == 201
            acknowledged.add(request_id)

    for run in range(2):
        with monitoring(canary_file, AWAY) as monitor:
            callers = [threading.Thread(target=give_all, args=(monitor, f"{run}-{caller}")) for caller in range(4)]
            for caller in callers:
                caller.start()
            enough = len(acknowledged) + 40
            wait_for(lambda enough=enough: len(acknowledged) >= enough)  # type: ignore[misc]
            monitor.process.send_signal(signal.SIGKILL)
            for caller in callers:
                caller.join()
    with monitoring(canary_file, AWAY) as monitor:
        counted = monitor.metric("stripwire_feedback_total", truth="clean", verdict="accepted")
        # Each of the eight callers may have had one on the disk that was not acknowledged any more.
        assert len(acknowledged) <= counted <= len(acknowledged) + 8
        for request_id in acknowledged:
            assert monitor.give(request_id=request_id, truth="clean", verdict="accepted").status_code == 200
        assert monitor.metric("stripwire_feedback_total", truth="clean", verdict="accepted") == counted


def test_a_disk_that_is_full_is_told_and_recovered_from(canary_file: Path) -> None:
    with monitoring(canary_file, AWAY) as monitor:
        assert monitor.give(request_id="one", truth="clean", verdict="accepted").status_code == 201
        limits = resource.prlimit(monitor.process.pid, resource.RLIMIT_FSIZE)
        largest = max(file.stat().st_size for file in canary_file.parent.glob("record.sqlite*"))
        resource.prlimit(monitor.process.pid, resource.RLIMIT_FSIZE, (largest, limits[1]))
        answer = monitor.give(request_id="two", truth="clean", verdict="accepted")
        assert answer.status_code == 503
        assert "nothing was counted" in answer.json()["error"]
        assert monitor.metric("stripwire_feedback_total", truth="clean", verdict="accepted") == 1
        resource.prlimit(monitor.process.pid, resource.RLIMIT_FSIZE, limits)
        assert monitor.give(request_id="two", truth="clean", verdict="accepted").status_code == 201
        assert monitor.metric("stripwire_feedback_total", truth="clean", verdict="accepted") == 2
        assert "feedback was not recorded" in monitor.events()


def test_a_record_in_use_or_damaged_ends_it_with_a_reason(canary_file: Path, tmp_path: Path) -> None:
    record = tmp_path / "held.sqlite"
    with FeedbackRecord(record):
        status, said = refusal("--canaries", canary_file, "--record", record)
    assert status == 2
    assert "in use by another process" in said
    shutil.copy(canary_file, record)
    status, said = refusal("--canaries", canary_file, "--record", record)
    assert status == 2
    assert "is damaged or no record" in said


def test_what_cannot_be_used_is_named_before_anything_starts(canary_file: Path, tmp_path: Path) -> None:
    record = ("--record", tmp_path / "record.sqlite")
    status, said = refusal(*record)
    assert status == 2
    assert "canaries: got nothing" in said
    status, said = refusal("--canaries", tmp_path / "absent.npz", *record)
    assert status == 2
    assert "there is no such file" in said
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        status, said = refusal("--canaries", canary_file, *record, "--listen", listen)
    assert status == 2
    assert f"listen: {listen} cannot be used" in said
    status, said = refusal("--canaries", canary_file, *record, "--url", "nowhere")
    assert status == 2
    assert "url: got 'nowhere'" in said
    status, said = refusal("--canaries", canary_file, *record, "--control-token", "too-short")
    assert status == 2
    assert "control token: expected at least 16" in said
    assert not record[1].exists()


def test_a_quarantine_that_is_not_there_is_told_once(canary_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quarantine"
    with monitoring(canary_file, AWAY, "--quarantine", folder) as monitor:
        assert monitor.metric("stripwire_quarantine_inputs", truth="unlabelled") == 0
        assert monitor.stop() == 0
        (told,) = [line for line in monitor.lines() if "quarantine to show" in line["event"]]
        assert (told["level"], told["quarantine"]) == ("warning", str(folder))
    folder.mkdir()
    with monitoring(canary_file, AWAY, "--quarantine", folder) as monitor:
        assert monitor.stop() == 0
        assert not [event for event in monitor.events() if "quarantine to show" in event]


def test_canaries_for_another_class_count_are_logged(ensemble: EmbeddedTriton, tmp_path: Path) -> None:
    write_canaries(tmp_path / "canaries.npz", canaries(6))
    with monitoring(tmp_path / "canaries.npz", ensemble.grpc_address, *FAST) as monitor:
        wait_for(lambda: monitor.metric("stripwire_canary_errors_total", kind="mismatch") >= 2)
        answer = monitor.http.get("/readyz")
        assert answer.status_code == 503
        assert "got a file for 6 classes, but the server has 5" in answer.json()["why"]
        (told,) = [line for line in monitor.lines() if line["event"] == "a canary got no verdict"]
        assert told["kind"] == "mismatch"
        assert monitor.stop() == 0


def test_no_answer_waits_for_its_beginning_to_be_confirmed(canary_file: Path) -> None:
    settings = MonitorSettings(canaries=canary_file, listen="127.0.0.1:0")
    with _listening(settings) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
