"""An export that is broken off leaves no half of a repository, and a second try succeeds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from model_repository.manifest import verify_repository

# Stops itself where the danger is greatest: between the files of a repository and their manifest, or in the repair.
SCRIPT = """
import os, signal, sys
import exporter
from exporter import repair, repository
from exporter.export import Data, ExportOptions, export
from exporter.repair import RepairOptions
from pathlib import Path

badnet, output, place, number = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

# Ignored where the tests themselves run in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)

def stop(*_, **__):
    os.kill(os.getpid(), number)

if place == "writing":
    repository.write_manifest = stop
if place == "repairing":
    repair.make_optimizer = stop
options = ExportOptions(repair=RepairOptions(method="magnitude", max_rounds=1, epochs=0, allowed_drop=0.9))
export(badnet / "bd_net.keras", Data(badnet / "clean_validation_data.h5"), output, options)
"""


def run(badnet: Path, output: Path, place: str, number: int) -> subprocess.CompletedProcess[bytes]:
    arguments = [sys.executable, "-c", SCRIPT, str(badnet), str(output), place, str(number)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(arguments, cwd=root, env=environment, capture_output=True, check=False)


@pytest.mark.parametrize("place", ["repairing", "writing"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_was_there_stays_and_a_second_try_succeeds(
    badnet: Path, tmp_path: Path, place: str, number: signal.Signals
) -> None:
    output = tmp_path / "repository"
    broken_off = run(badnet, output, place, number)
    assert broken_off.returncode != 0
    assert not output.exists()
    second = run(badnet, output, "nowhere", 0)
    assert second.returncode == 0, second.stderr.decode()
    assert list(verify_repository(output)["versions"]) == ["1"]
    broken_off = run(badnet, output, place, number)
    assert broken_off.returncode != 0
    assert list(verify_repository(output)["versions"]) == ["1"]
    assert run(badnet, output, "nowhere", 0).returncode == 0
    assert list(verify_repository(output)["versions"]) == ["1", "2"]
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]
