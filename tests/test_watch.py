"""The watch runs all of its parts, sees the attack that comes, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from deploy.prometheus.local import RULES, hasty
from tests.conftest import program, wait_for

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the trained network is kept for the next test."""
    return tmp_path_factory.mktemp("networks")


@pytest.fixture
def environment(tmp_path: Path, cache: Path) -> dict[str, str]:
    program("prometheus", "apt-get install prometheus")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STRIPWIRE_")}
    return kept | {
        "STRIPWIRE_CACHE_DIR": str(cache),
        "TMPDIR": str(tmp_path),
        "COLUMNS": "200",
        "PYTHONUNBUFFERED": "1",
    }


def heed_interrupts() -> None:
    """Undo what a shell does to commands that it runs in the background: they ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def watching(environment: dict[str, str], *options: str) -> subprocess.Popen[str]:
    """Start the command, on free ports."""
    ports = ("--monitor-port", "0", "--prometheus-port", "0")
    return subprocess.Popen(
        [sys.executable, "-m", "stripwire", "watch", "--identities", "20", *ports, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
        preexec_fn=heed_interrupts,
    )


def test_the_rates_and_the_alert_follow_the_attack_and_ctrl_c_stops_all(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with watching(environment, "--switch-after", "15") as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            seconds = re.match(r"\s*(\d+) s ", line)
            if "StripwireEntropyDrift" in line or (seconds is not None and int(seconds[1]) > 150):
                process.send_signal(signal.SIGINT)
                break
        said += process.stdout.readlines()
        process.wait(timeout=60)
    text = "".join(said)
    assert "An attacker comes: 50% of the traffic carries patch now." in text
    assert re.search(r"firing: .*StripwireEntropyDrift", text), text
    rates = [float(share) for share in re.findall(r"rejected +([\d.]+)%", text)]
    assert rates[-1] > 25 > rates[0], text
    assert process.returncode == 0
    assert text.endswith("Stopping.\n")
    assert [*tmp_path.glob("stripwire-watch-*"), *tmp_path.glob("stripwire-triton-*")] == []
    wait_for(lambda: survivors(tmp_path) == [], otherwise=lambda: survivors(tmp_path))


def survivors(folder: Path) -> list[str]:
    """Return the command lines of processes that have to do with a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if str(folder) in line or str(folder) in process.cwd():
                found.append(line)
    return found


def test_when_it_is_killed_nothing_goes_on(environment: dict[str, str], tmp_path: Path) -> None:
    with watching(environment) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "inputs/s" in line:
                break
        assert "inputs/s" in said[-1], "".join(said)
        assert len(survivors(tmp_path)) >= 3  # Triton, the monitor, Prometheus
        process.kill()
        wait_for(lambda: survivors(tmp_path) == [], otherwise=lambda: survivors(tmp_path))


def test_what_is_shortened_are_windows_and_waits_alone() -> None:
    rules = RULES.read_text()
    shortened = hasty(rules)
    assert "[1h]" not in shortened
    assert "[1d]" not in shortened
    assert shortened.count("[1m]") == rules.count("[5m]")
    assert shortened.count("[2m]") == rules.count("[1h]") + rules.count("[10m]")
    assert re.findall(r"(record|alert): (\S+)", shortened) == re.findall(r"(record|alert): (\S+)", rules)
    assert set(re.findall(r"(?m)^\s+(?:for|interval): (\w+)$", shortened)) == {"10s"}


def test_without_prometheus_nothing_is_begun(environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stripwire", "watch"]
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment | {"PATH": str(tmp_path)}, check=False
    )
    assert ended.returncode == 1
    assert "apt-get install prometheus" in ended.stderr
    assert "Training" not in ended.stderr
