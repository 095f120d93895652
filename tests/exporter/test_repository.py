"""The model repository: configs, versions, manifest, and nothing half-written."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from detector.calibration import fixed_threshold
from detector.errors import InputError, RepositoryError
from exporter.convert import repaired_graph, sentinel_graph, to_onnx
from exporter.preprocessing import Preprocessing
from exporter.repository import (
    Recalibrated,
    ServedModel,
    activate,
    check_output,
    model_configs,
    render,
    write_recalibration,
    write_repository,
)
from model_repository.manifest import MODELS, next_version, read_manifest, verify_repository, write_manifest
from tests.networks import small_network

SHAPE, CLASSES = (8, 7, 3), 5
ONE = dict.fromkeys(MODELS, 1)
ONE_FUSED = dict.fromkeys((*MODELS, "fused"), 1)


@pytest.fixture(scope="module")
def served() -> ServedModel:
    network = to_onnx(small_network(SHAPE, CLASSES))
    overlays = np.random.default_rng(0).integers(0, 256, (4, *SHAPE), dtype=np.uint8)
    calibration = fixed_threshold(np.array([1.0, 2.0]), 0.5)
    return ServedModel(
        sentinel_graph(network, Preprocessing()),
        repaired_graph(network, Preprocessing()),
        overlays,
        0.5,
        calibration,
        CLASSES,
        {"created": "now"},
    )


@pytest.fixture
def repository(tmp_path: Path, served: ServedModel) -> Path:
    write_repository(tmp_path / "repository", served)
    return tmp_path / "repository"


def test_every_config_is_the_protobuf_that_was_meant() -> None:
    for config in model_configs(SHAPE, CLASSES, ONE_FUSED):
        assert text_format.Parse(render(config), ModelConfig()) == config
        assert config.max_batch_size == 64


def test_the_ensemble_keeps_the_batch_dimension_and_batches_at_every_step() -> None:
    guarded, *steps = model_configs(SHAPE, CLASSES, ONE)
    assert guarded.platform == "ensemble"
    assert [step.model_name for step in guarded.ensemble_scheduling.step] == [config.name for config in steps]
    for config in steps:
        assert config.HasField("dynamic_batching")
        on_gpu = config.name != "strip_verdict"  # whose tensors are tiny
        kind = ModelInstanceGroup.KIND_AUTO if on_gpu else ModelInstanceGroup.KIND_CPU
        assert [group.kind for group in config.instance_group] == [kind]
        assert on_gpu == ("FORCE_CPU_ONLY_INPUT_TENSORS" in config.parameters)
        if not config.backend:
            (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
            assert (accelerator.name, dict(accelerator.parameters)) == ("cuda", {"use_tf32": "0"})
            assert config.parameters["cudnn_conv_algo_search"].string_value == "1"  # heuristic, by NVIDIA's number
    assert {step.platform for step in steps if not step.backend} == {"onnxruntime_onnx"}


def test_in_the_fused_layout_one_graph_and_the_verdict_answer() -> None:
    guarded, *others = model_configs(SHAPE, CLASSES, ONE_FUSED)
    assert [step.model_name for step in guarded.ensemble_scheduling.step] == ["fused", "strip_verdict"]
    assert {config.name for config in others} == ONE_FUSED.keys() - {"guarded"}
    (fused,) = (config for config in others if config.name == "fused")
    assert fused.platform == "onnxruntime_onnx"
    assert fused.HasField("dynamic_batching")


@pytest.mark.parametrize("models", [ONE, ONE_FUSED], ids=["ensemble", "fused"])
def test_the_public_contract_stands_in_the_config(models: dict[str, int]) -> None:
    guarded = model_configs(SHAPE, CLASSES, models)[0]
    assert [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in guarded.input] == [("image", 2, [8, 7, 3])]
    assert [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in guarded.output] == [
        ("label", 8, [1]),
        ("trojaned", 1, [1]),
        ("entropy", 11, [1]),
        ("p_value", 11, [1]),
        ("perturbations", 8, [1]),
        ("probabilities", 11, [5]),
    ]


def test_shadow_is_a_parameter_of_its_own_config(repository: Path) -> None:
    folder = repository / "strip_verdict"
    for path, mode in ((folder / "config.pbtxt", "block"), (folder / "configs" / "shadow.pbtxt", "shadow")):
        config = text_format.Parse(path.read_text(), ModelConfig())
        assert config.parameters["mode"].string_value == mode


def test_a_second_export_is_a_second_version_and_changes_no_file_of_the_first(
    repository: Path, served: ServedModel
) -> None:
    first = read_manifest(repository)["files"]
    assert write_repository(repository, served) == "2"
    manifest = verify_repository(repository)
    assert manifest["active"] == "2"
    versions = {name: digest for name, digest in first.items() if "/1/" in name}
    assert {name: manifest["files"][name] for name in versions} == versions
    assert (repository / "badnet" / "2" / "model.onnx").is_file()
    assert [path.name for path in repository.parent.iterdir()] == ["repository"]


def test_the_eleventh_version_follows_the_tenth(repository: Path) -> None:
    assert next_version({"9": {}, "10": {}, "2": {}}) == "11"
    assert next_version(read_manifest(repository)["versions"]) == "2"


def test_a_version_with_another_contract_is_refused_and_nothing_is_lost(repository: Path) -> None:
    before = read_manifest(repository)
    with pytest.raises(InputError, match=r"serves images of \[8, 7, 3\] in 5 classes, got a network for .* in 6"):
        check_output(repository, SHAPE, 6)
    assert verify_repository(repository) == before


def test_a_folder_of_something_else_is_no_place_to_export_to(tmp_path: Path, served: ServedModel) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RepositoryError, match=r"has no manifest\.json"):
        write_repository(tmp_path, served)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_altered_file_is_named(repository: Path) -> None:
    (repository / "strip_verdict" / "1" / "calibration.json").write_text('{"threshold_bits": 0}')
    with pytest.raises(RepositoryError, match=r"strip_verdict/1/calibration\.json was altered"):
        verify_repository(repository)


def test_a_missing_file_is_named(repository: Path) -> None:
    (repository / "badnet" / "1" / "model.onnx").unlink()
    with pytest.raises(RepositoryError, match=r"badnet/1/model\.onnx is missing"):
        verify_repository(repository)


@pytest.mark.parametrize("planted", ["strip_verdict/1/triton_python_backend_utils.py", "extra/config.pbtxt"])
def test_a_planted_file_is_named(repository: Path, planted: str) -> None:
    (repository / planted).parent.mkdir(exist_ok=True)
    (repository / planted).touch()
    with pytest.raises(RepositoryError, match=rf"{planted} is not listed"):
        verify_repository(repository)


def test_planted_bytecode_has_no_place(repository: Path) -> None:
    assert (repository / "strip_verdict" / "1" / "__pycache__").is_file()
    (repository / "strip_verdict" / "1" / "__pycache__").unlink()
    (repository / "strip_verdict" / "1" / "__pycache__").mkdir()
    (repository / "strip_verdict" / "1" / "__pycache__" / "model.cpython-311.pyc").touch()
    with pytest.raises(RepositoryError, match="__pycache__ is missing"):
        verify_repository(repository)


def test_a_linked_folder_is_named(repository: Path, tmp_path: Path) -> None:
    (repository / "linked").symlink_to(tmp_path)
    with pytest.raises(RepositoryError, match="linked is not listed"):
        verify_repository(repository)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"format": 3}', '{"format": 4, "files": {}, "versions": {}}', '{"format": 4}']
)
def test_a_broken_manifest_is_refused(repository: Path, text: str) -> None:
    (repository / "manifest.json").write_text(text)
    with pytest.raises(RepositoryError, match=r"manifest\.json"):
        verify_repository(repository)


def test_a_missing_repository_is_named(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="no such folder"):
        verify_repository(tmp_path / "nowhere")


def test_the_calibration_beside_the_verdict_is_the_one_that_was_measured(repository: Path, served: ServedModel) -> None:
    stored = json.loads((repository / "strip_verdict" / "1" / "calibration.json").read_text())
    assert stored["threshold_bits"] == served.calibration.threshold_bits
    assert stored["images"] == 2


@pytest.mark.parametrize("number", ["one", "-1", "²"])
def test_a_version_that_is_no_number_is_refused(repository: Path, number: str) -> None:
    versions = read_manifest(repository)["versions"]
    write_manifest(repository, {number: versions["1"]}, number)
    with pytest.raises(RepositoryError, match="is malformed"):
        verify_repository(repository)


def test_a_version_without_all_its_models_is_refused(repository: Path) -> None:
    versions = read_manifest(repository)["versions"]
    models = {**versions["1"]["models"], "guarded": 2, "strip_verdict": 7}
    write_manifest(repository, {**versions, "2": {**versions["1"], "models": models}}, "1")
    with pytest.raises(RepositoryError, match="version 2 lacks guarded/2/, strip_verdict/7/"):
        verify_repository(repository)


def test_a_planted_empty_version_is_named(repository: Path) -> None:
    (repository / "guarded" / "9").mkdir()
    with pytest.raises(RepositoryError, match="guarded/9 is not listed"):
        verify_repository(repository)


def test_two_exports_at_once_lose_no_version(tmp_path: Path, served: ServedModel) -> None:
    with ThreadPoolExecutor(4) as pool:
        versions = list(pool.map(lambda _: write_repository(tmp_path / "repository", served), range(4)))
    assert sorted(versions) == ["1", "2", "3", "4"]
    assert sorted(verify_repository(tmp_path / "repository")["versions"]) == ["1", "2", "3", "4"]


def pins(repository: Path) -> dict[str, int]:
    """Return the versions that the ensemble names, and check that these alone are served."""
    guarded = text_format.Parse((repository / "guarded" / "config.pbtxt").read_text(), ModelConfig())
    models = {step.model_name: step.model_version for step in guarded.ensemble_scheduling.step}
    for name, number in models.items():
        for path in (repository / name).rglob("*.pbtxt"):
            policy = text_format.Parse(path.read_text(), ModelConfig()).version_policy
            assert list(policy.specific.versions) == [number], path
    (own,) = guarded.version_policy.specific.versions
    return {"guarded": own, **models}


def recalibrated(served: ServedModel, *, keep_overlays: bool = False) -> Recalibrated:
    calibration = fixed_threshold(np.array([1.0, 2.0]), 0.75)
    return Recalibrated(calibration, None if keep_overlays else served.overlays, served.alpha, {"why": "drift"})


def test_a_recalibration_shares_the_networks(repository: Path, served: ServedModel) -> None:
    assert pins(repository) == ONE
    assert write_recalibration(repository, "1", recalibrated(served)) == "2"
    assert pins(repository) == {**ONE, "guarded": 2, "strip_perturb": 2, "strip_verdict": 2}
    assert write_recalibration(repository, "2", recalibrated(served, keep_overlays=True)) == "3"
    assert pins(repository) == {**ONE, "guarded": 3, "strip_perturb": 2, "strip_verdict": 3}
    versions = verify_repository(repository)["versions"]
    assert versions["3"]["models"] == pins(repository)
    assert (versions["3"]["previous"], versions["3"]["why"]) == ("2", "drift")
    assert [path.name for path in (repository / "badnet").iterdir() if path.is_dir()] == ["1"]


def test_rolling_back_follows_the_history_and_loses_nothing(repository: Path, served: ServedModel) -> None:
    write_recalibration(repository, "1", recalibrated(served))
    write_repository(repository, served)
    files = {name for name in read_manifest(repository)["files"] if not name.endswith(".pbtxt")}
    assert pins(repository) == dict.fromkeys(MODELS, 3)
    assert activate(repository) == "2"
    assert activate(repository) == "1"
    assert pins(repository) == ONE
    with pytest.raises(InputError, match=r"version 1, which is active, was the first.* name one of 1, 2, 3"):
        activate(repository)
    assert activate(repository, "3") == "3"  # forth again
    assert pins(repository) == dict.fromkeys(MODELS, 3)
    activate(repository, "1")
    assert write_recalibration(repository, "1", recalibrated(served)) == "4"  # no number is given twice
    assert activate(repository) == "1"  # which was active before, not number 3
    assert files < verify_repository(repository)["files"].keys()


def test_a_rollback_and_back_again_restores_every_config(repository: Path, served: ServedModel) -> None:
    before = verify_repository(repository)["files"]
    write_recalibration(repository, "1", recalibrated(served))
    activate(repository)
    after = verify_repository(repository)["files"]
    assert {name: after[name] for name in before} == before


def test_what_a_version_shares_is_not_touched(repository: Path, served: ServedModel) -> None:
    shared = ("badnet/config.pbtxt", "repaired/config.pbtxt", "strip_entropy/config.pbtxt", "badnet/1/model.onnx")
    before = [(repository / name).stat().st_mtime_ns for name in shared]
    write_recalibration(repository, "1", recalibrated(served))
    assert [(repository / name).stat().st_mtime_ns for name in shared] == before


def test_a_version_that_there_is_not_is_named(repository: Path) -> None:
    with pytest.raises(InputError, match="version: got '7', expected one of 1"):
        activate(repository, "7")


def test_activating_the_active_version_writes_nothing(repository: Path) -> None:
    before = repository.stat().st_ino
    assert activate(repository, "1") == "1"
    assert repository.stat().st_ino == before


def test_an_altered_repository_is_neither_calibrated_nor_rolled_back(repository: Path, served: ServedModel) -> None:
    write_recalibration(repository, "1", recalibrated(served))
    (repository / "strip_verdict" / "1" / "calibration.json").write_text("{}")
    with pytest.raises(RepositoryError, match="was altered"):
        activate(repository)
    with pytest.raises(RepositoryError, match="was altered"):
        write_recalibration(repository, "2", recalibrated(served))


def test_a_repository_of_an_older_format_is_to_be_exported_again(repository: Path) -> None:
    manifest = json.loads((repository / "manifest.json").read_text())
    (repository / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    with pytest.raises(RepositoryError, match="got manifest format 1, expected 4; export the repository again"):
        activate(repository)


@pytest.mark.parametrize(
    "entry", [{"previous": "9"}, {"models": {"guarded": 1}}, {"models": dict.fromkeys(MODELS, "1")}]
)
def test_a_version_that_is_no_version_is_refused(repository: Path, entry: dict[str, Any]) -> None:
    versions = read_manifest(repository)["versions"]
    write_manifest(repository, {"1": {**versions["1"], **entry}}, "1")
    with pytest.raises(RepositoryError, match="version '1' is malformed"):
        verify_repository(repository)


def test_an_active_version_that_there_is_not_is_refused(repository: Path) -> None:
    write_manifest(repository, read_manifest(repository)["versions"], "2")
    with pytest.raises(RepositoryError, match="active version '2' is none of its own"):
        verify_repository(repository)


_KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from exporter import publishing, repository

folder, place, command, arguments = Path(sys.argv[1]), sys.argv[2], sys.argv[3], pickle.load(sys.stdin.buffer)

def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if place == "writing":
    repository.write_manifest = killed
elif place == "exchanged":
    publishing._flush = lambda path: killed() if path == folder.parent else None
else:
    publishing.ctypes.CDLL = lambda *_, **__: object()
    aside, publishing._aside = publishing._aside(folder), lambda _: aside
    rename = Path.rename
    Path.rename = lambda self, to: (rename(self, to), killed() if to == aside else None)[0]
getattr(repository, command)(folder, *arguments)
"""


@pytest.mark.parametrize(("place", "active"), [("writing", "2"), ("exchanged", None), ("between renames", "2")])
@pytest.mark.parametrize("command", ["write_repository", "write_recalibration", "activate"])
def test_a_command_that_is_killed_leaves_a_whole_repository_and_no_debris(
    repository: Path, served: ServedModel, command: str, place: str, active: str | None
) -> None:
    write_recalibration(repository, "1", recalibrated(served))
    arguments: dict[str, tuple[Any, ...]] = {
        "write_repository": (served,),
        "write_recalibration": ("2", recalibrated(served)),
        "activate": ("1",),
    }
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", _KILLED, repository, place, command],
        cwd=root,
        check=False,
        input=pickle.dumps(arguments[command]),
    )
    assert ended.returncode == -signal.SIGKILL
    active = active or {"activate": "1"}.get(command, "3")
    assert activate(repository, active) == active  # nobody is locked out
    assert list(repository.parent.iterdir()) == [repository]
    assert verify_repository(repository)["active"] == active
    assert pins(repository)["guarded"] == int(active)
