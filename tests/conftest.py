"""What the tests share: array namespaces, the real data where it is at hand, a small BadNet and a server on it."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


def skip_or_fail(reason: str) -> None:
    """Skip on a user's machine; fail in CI, where everything must be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(params=["numpy", "array_api_strict", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request: pytest.FixtureRequest) -> ModuleType:
    """Return each array namespace that the maths must run on."""
    if request.param == "numpy":
        return np
    return pytest.importorskip(request.param)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of the real networks and faces."""
    default = Path(__file__).parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("STRIPWIRE_DATA", default))
    if not (folder / "csaw" / "clean.h5").is_file():
        skip_or_fail(f"no real data at {folder}; set STRIPWIRE_DATA")
    return folder
