"""The embedded server's onnxruntime backend reads of a config what NVIDIA's does."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf import json_format

from deploy.embedded import server
from exporter.repository import model_configs
from tests.detector.triton import PbUtils


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(server.__file__).parent / "backends" / "onnxruntime" / "model.py"
    spec = importlib.util.spec_from_file_location("onnxruntime_backend", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", PbUtils())
    spec.loader.exec_module(module)
    return module


def test_what_an_export_says_of_a_gpu_is_what_the_session_is_given(backend: ModuleType) -> None:
    versions = {"guarded": 1, "strip_perturb": 1, "badnet": 1, "strip_entropy": 1, "repaired": 1, "strip_verdict": 1}
    (config,) = (each for each in model_configs((8, 7, 3), 5, versions) if each.name == "badnet")
    as_triton_hands_it_over = json.loads(json_format.MessageToJson(config, preserving_proto_field_name=True))
    options = backend._cuda_options(as_triton_hands_it_over)
    assert options == {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}


def test_an_older_config_leaves_onnxruntime_its_defaults(backend: ModuleType) -> None:
    assert backend._cuda_options({"name": "badnet"}) == {"cudnn_conv_algo_search": "EXHAUSTIVE"}
