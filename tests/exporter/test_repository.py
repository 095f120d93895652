"""The model repository: configs, versions, manifest, and nothing half-written."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from detector.calibration import fixed_threshold
from detector.errors import InputError, RepositoryError
from exporter.convert import repaired_graph, sentinel_graph, to_onnx
from exporter.repository import ServedModel, check_output, model_configs, render, write_repository
from model_repository.manifest import MODELS, next_version, read_manifest, verify_repository, write_manifest
from tests.networks import small_network

SHAPE, CLASSES = (8, 7, 3), 5
ONE = dict.fromkeys(MODELS, 1)


@pytest.fixture(scope="module")
def served() -> ServedModel:
    network = to_onnx(small_network(SHAPE, CLASSES))
    overlays = np.random.default_rng(0).integers(0, 256, (4, *SHAPE), dtype=np.uint8)
    calibration = fixed_threshold(np.array([1.0, 2.0]), 0.5)
    return ServedModel(
        sentinel_graph(network, "unit"),
        repaired_graph(network, "unit"),
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
    for config in model_configs(SHAPE, CLASSES, ONE):
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
        assert (config.backend == "python" and on_gpu) == ("FORCE_CPU_ONLY_INPUT_TENSORS" in config.parameters)
    assert {step.platform for step in steps if not step.backend} == {"onnxruntime_onnx"}


def test_the_public_contract_stands_in_the_config() -> None:
    guarded = model_configs(SHAPE, CLASSES, ONE)[0]
    assert [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in guarded.input] == [("image", 2, [8, 7, 3])]
    assert [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in guarded.output] == [
        ("label", 8, [1]),
        ("trojaned", 1, [1]),
        ("entropy", 11, [1]),
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
    "text", ["", "[]", "null", '{"format": 3}', '{"format": 2, "files": {}, "versions": {}}', '{"format": 2}']
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
