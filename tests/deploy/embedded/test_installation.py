"""What the embedded Triton needs of a machine is found, or what is missing is named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deploy.embedded.installation import check_stub_packages, find_libpython, find_triton
from detector.errors import SetupError


def test_a_missing_libpython_is_named_with_the_package_to_install(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"libpython3\.11\.so\.1\.0 was not found.*apt-get install libpython3\.11"):
        find_libpython("3.11", (str(tmp_path), None))


@pytest.mark.parametrize(
    ("python", "numpy", "missing", "message"),
    [
        ("2.7", "1.26.4", [], "is 2.7, expected 3"),
        (None, "2.1.0", [], "got NumPy 2.1.0, expected 1.26"),
        (None, "1.26.4", ["onnxruntime"], "cannot import onnxruntime"),
    ],
)
def test_a_python_that_triton_cannot_use_is_named(
    python: str | None, numpy: str, missing: list[str], message: str
) -> None:
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    with pytest.raises(SetupError, match=message):
        check_stub_packages(python or running, numpy, missing)


def test_the_installation_is_found_whole() -> None:
    triton = find_triton()
    assert triton.executable.is_file()
    assert triton.stub.is_file()
    assert all(folder.is_dir() for folder in triton.library_folders)


@pytest.mark.parametrize(
    ("cupy", "providers", "hidden"),
    [
        (None, ["CUDAExecutionProvider", "CPUExecutionProvider"], True),
        (object(), ["CPUExecutionProvider"], True),
        (object(), ["CUDAExecutionProvider", "CPUExecutionProvider"], False),
    ],
)
def test_a_gpu_that_the_packages_cannot_use_is_hidden(
    monkeypatch: pytest.MonkeyPatch, cupy: object, providers: list[str], hidden: bool
) -> None:
    triton = find_triton()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: cupy)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    assert (triton.environment().get("CUDA_VISIBLE_DEVICES") == "") is hidden
