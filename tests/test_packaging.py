"""The wheel holds all that is needed outside the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder into which the wheel was unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: a build in the checkout would take along what an earlier one left there.
    skipped = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "stripwire-demo", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=skipped)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    command.append(str(folder / "source"))
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.parametrize(
    "name",
    [
        "stripwire/__main__.py",
        "stripwire/commands/export.py",
        "exporter/report/report.html.j2",
        "model_repository/strip_perturb/model.py",
        "model_repository/strip_entropy/model.py",
        "model_repository/strip_verdict/model.py",
        "deploy/embedded/launch.py",
        "deploy/embedded/leftovers.py",
        "client/monitor/page/page.html",
        "client/monitor/page/page.js",
        "deploy/grafana/stripwire.json",
        "deploy/prometheus/rules.yaml",
        "deploy/embedded/backends/onnxruntime/model.py",
    ],
)
def test_the_wheel_holds_what_is_served_and_watched(installed: Path, name: str) -> None:
    assert (installed / name).read_bytes() == (ROOT / name).read_bytes()


def test_the_wheel_holds_nothing_else(installed: Path) -> None:
    tops = {path.name.split("-")[0] for path in installed.iterdir()}
    assert tops == {"client", "deploy", "detector", "exporter", "model_repository", "samples", "stripwire"}


def test_it_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = (
        "import stripwire.app, exporter.repository as r, deploy.embedded.server; "
        f"assert r.__file__.startswith({str(installed)!r}); print('whole')"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout == "whole\n"
