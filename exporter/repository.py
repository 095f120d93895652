"""Writes the Triton model repository: the ensemble layout of the served graph."""

from __future__ import annotations

import importlib.resources
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf import text_format
from numpy.typing import NDArray
from tritonclient.grpc.model_config_pb2 import (
    TYPE_BOOL,
    TYPE_FP32,
    TYPE_INT32,
    TYPE_UINT8,
    ModelConfig,
    ModelEnsembling,
    ModelInput,
    ModelInstanceGroup,
    ModelOutput,
    ModelParameter,
)

from detector.calibration import Calibration
from detector.errors import InputError
from detector.serving import MODES
from exporter.publishing import check_writable, locked, staged_folder
from model_repository.manifest import latest_version, verify_repository, write_manifest

MAX_BATCH_SIZE = 64
MAX_QUEUE_DELAY_MICROSECONDS = 500

_NO_BYTECODE = "A file where Python would keep bytecode: none is left here, and none that somebody planted is run.\n"
_MODES_BESIDE_DEFAULT = tuple(mode for mode in MODES if mode != "block")


@dataclass(frozen=True)
class ServedModel:
    """All that goes into one version of a model repository.

    Attributes:
        badnet: the sentinel's graph, see `exporter.convert.sentinel_graph`.
        repaired: the repaired network's graph, see `exporter.convert.repaired_graph`.
        overlays: (perturbations, height, width, channels), uint8.
        alpha: weight of the input in the blend.
        calibration: the threshold and what it rests on.
        classes: how many classes the networks know.
        provenance: what the manifest says about where this version came from.
    """

    badnet: onnx.ModelProto
    repaired: onnx.ModelProto
    overlays: NDArray[np.uint8]
    alpha: float
    calibration: Calibration
    classes: int
    provenance: dict[str, Any]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(height, width, channels)."""
        return self.overlays.shape[1:]


def check_output(output: Path, image_shape: tuple[int, ...], classes: int) -> dict[str, Any]:
    """Check, before any long work, that a version with this contract can be written to `output`.

    Returns:
        The versions that are there, by number; none where the repository is to be new.

    Raises:
        InputError: `output` is no model repository, or serves images of another shape or another number of classes.
    """
    check_writable(output)
    if not output.exists() or not any(output.iterdir()):
        return {}
    manifest = verify_repository(output)
    versions: dict[str, Any] = manifest["versions"]
    contract = versions[latest_version(manifest)]["contract"]
    wanted = {"image_shape": list(image_shape), "classes": classes}
    if contract != wanted:
        raise InputError(
            f"{output}: serves images of {contract['image_shape']} in {contract['classes']} classes, got a network for "
            f"{wanted['image_shape']} in {classes}; a new version keeps the contract, so choose another folder"
        )
    return versions


def write_repository(output: Path, served: ServedModel) -> str:
    """Write `served` to `output`: a new repository, or a new version of the one that is there.

    What appears, appears whole; versions that were there stay as they are.

    Returns:
        The number of the version written.

    Raises:
        InputError: see `check_output`.
    """
    with locked(output):
        return _write_locked(output, served)


def _write_locked(output: Path, served: ServedModel) -> str:
    versions = check_output(output, served.image_shape, served.classes)
    version = str(max((int(number) for number in versions), default=0) + 1)
    with staged_folder(output, replace=True) as staged:
        if versions:
            shutil.copytree(output, staged, dirs_exist_ok=True)
        _write_version(staged, version, served)
        for config in model_configs(served.image_shape, served.classes):
            _write_text(staged / config.name / "config.pbtxt", render(config))
            if "mode" in config.parameters:
                for mode in _MODES_BESIDE_DEFAULT:
                    config.parameters["mode"].string_value = mode
                    _write_text(staged / config.name / "configs" / f"{mode}.pbtxt", render(config))
        contract = {"image_shape": list(served.image_shape), "classes": served.classes}
        versions[version] = {"contract": contract, **served.provenance}
        write_manifest(staged, versions)
    return version


def render(config: ModelConfig) -> str:
    """Return the text of `config.pbtxt`."""
    return text_format.MessageToString(config)


def model_configs(image_shape: tuple[int, ...], classes: int) -> list[ModelConfig]:
    """Return the configs of all six models; the batch dimension is implied by `max_batch_size`.

    Args:
        image_shape: (height, width, channels).
        classes: how many classes the networks know.
    """
    image = ("image", TYPE_UINT8, list(image_shape))
    # The number of perturbations is a version's own: -1 keeps it out of the configs, which all versions share.
    perturbations = ("perturbations", TYPE_FP32, [-1, *image_shape])
    sentinel_probabilities = ("sentinel_probabilities", TYPE_FP32, [-1, classes])
    sentinel_entropy = ("sentinel_entropy", TYPE_FP32, [1])
    repaired_probabilities = ("repaired_probabilities", TYPE_FP32, [classes])
    entropy = ("entropy", TYPE_FP32, [1])
    probabilities = ("probabilities", TYPE_FP32, [classes])
    label = ("label", TYPE_INT32, [1])
    trojaned = ("trojaned", TYPE_BOOL, [1])

    public = [label, trojaned, entropy, probabilities]

    guarded = _config("guarded", [image], public, platform="ensemble")
    steps = (
        ("strip_perturb", ["image"], ["perturbations"]),
        ("badnet", ["perturbations"], ["sentinel_probabilities"]),
        ("strip_entropy", ["sentinel_probabilities"], ["sentinel_entropy"]),
        ("repaired", ["image"], ["repaired_probabilities"]),
        ("strip_verdict", ["sentinel_entropy", "repaired_probabilities"], [name for name, _, _ in public]),
    )
    for name, inputs, outputs in steps:
        # A tensor has the same name in every model that reads or writes it.
        guarded.ensemble_scheduling.step.append(
            ModelEnsembling.Step(
                model_name=name,
                model_version=-1,
                input_map={tensor: tensor for tensor in inputs},
                output_map={tensor: tensor for tensor in outputs},
            )
        )
    verdict = _config(
        "strip_verdict", [sentinel_entropy, repaired_probabilities], public, backend="python", image_sized=False
    )
    verdict.parameters["mode"].CopyFrom(ModelParameter(string_value="block"))
    return [
        guarded,
        _config("strip_perturb", [image], [perturbations], backend="python"),
        _config("badnet", [perturbations], [sentinel_probabilities], platform="onnxruntime_onnx"),
        _config("strip_entropy", [sentinel_probabilities], [sentinel_entropy], backend="python"),
        _config("repaired", [image], [repaired_probabilities], platform="onnxruntime_onnx"),
        verdict,
    ]


_Tensor = tuple[str, Any, list[int]]


def _config(
    name: str,
    inputs: list[_Tensor],
    outputs: list[_Tensor],
    *,
    platform: str = "",
    backend: str = "",
    image_sized: bool = True,
) -> ModelConfig:
    config = ModelConfig(
        name=name,
        platform=platform,
        backend=backend,
        max_batch_size=MAX_BATCH_SIZE,
        input=[ModelInput(name=tensor, data_type=kind, dims=dims) for tensor, kind, dims in inputs],
        output=[ModelOutput(name=tensor, data_type=kind, dims=dims) for tensor, kind, dims in outputs],
    )
    if platform == "ensemble":
        return config
    config.dynamic_batching.max_queue_delay_microseconds = MAX_QUEUE_DELAY_MICROSECONDS
    kind = ModelInstanceGroup.KIND_AUTO if image_sized else ModelInstanceGroup.KIND_CPU
    config.instance_group.append(ModelInstanceGroup(count=1, kind=kind))
    if backend == "python" and image_sized:
        # Tensors stay on the GPU between the models that live there.
        config.parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].CopyFrom(ModelParameter(string_value="no"))
    return config


def _write_version(repository: Path, version: str, served: ServedModel) -> None:
    onnx_folders = {name: _version_folder(repository, name, version) for name in ("badnet", "repaired")}
    onnx.save(served.badnet, onnx_folders["badnet"] / "model.onnx")
    onnx.save(served.repaired, onnx_folders["repaired"] / "model.onnx")
    shells = importlib.resources.files("model_repository")
    for name in ("strip_perturb", "strip_entropy", "strip_verdict"):
        folder = _version_folder(repository, name, version)
        (folder / "model.py").write_bytes((shells / name / "model.py").read_bytes())
        _write_text(folder / "__pycache__", _NO_BYTECODE)
    np.savez(repository / "strip_perturb" / version / "overlays.npz", overlays=served.overlays, alpha=served.alpha)
    _write_text(
        repository / "strip_verdict" / version / "calibration.json",
        json.dumps(asdict(served.calibration), indent=2) + "\n",
    )
    # Triton wants a version folder even for an ensemble, and object stores keep no empty ones.
    _write_text(_version_folder(repository, "guarded", version) / ".keep", "")


def _version_folder(repository: Path, name: str, version: str) -> Path:
    folder = repository / name / version
    folder.mkdir(parents=True)
    return folder


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
