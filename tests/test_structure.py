"""The folders import one way, and the light parts stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"client", "deploy", "detector", "exporter", "model_repository", "samples", "stripwire"}
MAY_IMPORT = {
    "detector": set(),
    "model_repository": {"detector"},
    "samples": {"detector"},
    "exporter": {"detector", "model_repository", "samples"},
    "client": {"detector", "samples"},
    "deploy": {"detector", "model_repository"},
}


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        assert imports_of(path) & OURS <= MAY_IMPORT[folder] | {folder}, path


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT.keys() - {"exporter"}))
def test_only_the_exporter_imports_tensorflow(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        assert not imports_of(path) & {"tensorflow", "keras", "tf2onnx"}, path


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("stripwire.app", "tensorflow keras onnxruntime grpc matplotlib scipy"),
        ("client.api, client.evaluation, samples.files", "tensorflow keras onnxruntime"),
        ("client.monitor.service", "tensorflow keras onnxruntime matplotlib scipy h5py"),
        (
            "client.feedback, client.quarantine, samples.npz",
            "tensorflow keras onnxruntime matplotlib scipy h5py starlette",
        ),
        ("exporter.canaries", "tensorflow keras tf2onnx matplotlib"),
        ("exporter.recalibration, client.control", "tensorflow keras tf2onnx matplotlib"),
        ("deploy.embedded.server", "tensorflow keras grpc"),
        ("detector.serving", "tensorflow keras grpc scipy h5py"),
    ],
)
def test_the_light_parts_load_nothing_heavy(modules: str, absent: str) -> None:
    code = f"import {modules}, sys; print(sorted(set({absent!r}.split()) & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == "[]"
