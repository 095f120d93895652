"""What the tests share: array namespaces, the real data where it is at hand, a small BadNet and a server on it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest

from deploy.background import find_program
from detector.errors import SetupError

if TYPE_CHECKING:
    from deploy.embedded.server import EmbeddedTriton


def skip_or_fail(reason: str) -> None:
    """Skip on a user's machine; fail in CI, where everything must be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def program(name: str, remedy: str) -> str:
    """Return the path of a program, of the virtual environment or of the machine; skip or fail where there is none."""
    try:
        return find_program(name, remedy)
    except SetupError:
        skip_or_fail(f"{name} is missing; {remedy} has it")
        raise


def wait_for(
    happened: Callable[[], bool],
    seconds: float = 60.0,
    *,
    otherwise: Callable[[], object] = lambda: "it did not happen in time",
) -> None:
    """Wait until something has happened; fail where it does not in time, with what `otherwise` says then."""
    give_up_at = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < give_up_at, otherwise()
        time.sleep(0.05)


@pytest.fixture(params=["numpy", "array_api_strict", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request: pytest.FixtureRequest) -> ModuleType:
    """Return each array namespace that the maths must run on."""
    if request.param == "numpy":
        return np
    module: ModuleType = pytest.importorskip(request.param)
    return module


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of the real networks and faces."""
    default = Path(__file__).parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("STRIPWIRE_DATA", default))
    if not (folder / "csaw" / "clean.h5").is_file():
        skip_or_fail(f"no real data at {folder}; set STRIPWIRE_DATA")
    return folder


@pytest.fixture(scope="session")
def badnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small BadNet of procedural faces."""
    from exporter.badnet import BadNetOptions, train_badnet

    folder = tmp_path_factory.mktemp("badnet") / "badnet"
    options = BadNetOptions(identities=12, train_images=40, validation_images=40, test_images=5, epochs=10)
    train_badnet(folder, options)
    return folder


@pytest.fixture(scope="session")
def repository(badnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the model repository exported from the small BadNet."""
    from detector.calibration import ThresholdRule
    from exporter.export import Data, ExportOptions, export
    from exporter.repair import RepairOptions

    folder = tmp_path_factory.mktemp("exported") / "repository"
    repair = RepairOptions(method="magnitude", max_rounds=1, epochs=2)
    options = ExportOptions(repair=repair, rule=ThresholdRule(detector="strip"))
    export(badnet / "bd_net.keras", Data(badnet / "clean_validation_data.h5"), folder, options)
    return folder


@pytest.fixture(scope="session")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedTriton]:
    """Return a real server on that repository, which keeps what it rejects."""
    from deploy.embedded.server import EmbeddedTriton

    with EmbeddedTriton(repository, quarantine=tmp_path_factory.mktemp("quarantine")) as running:
        yield running
