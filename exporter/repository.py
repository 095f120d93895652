"""Writes the Triton model repository, in either layout of the served graph."""

from __future__ import annotations

import importlib.resources
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import uuid4

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
    ModelQueuePolicy,
    ModelWarmup,
)

from detector.calibration import Calibration
from detector.errors import InputError, RepositoryError
from detector.serving import (
    BEHIND,
    IDENTITY_KEY,
    MODES,
    REGION_FIELDS,
    SENTINEL_OUTPUTS,
    layout_of,
    read_plain_first,
)
from exporter.fused import Fused
from exporter.publishing import check_writable, locked, staged_folder
from model_repository.manifest import FUSED, MODELS, next_version, verify_repository, write_manifest

MAX_BATCH_SIZE = 64
MAX_QUEUE_DELAY_MICROSECONDS = 500
MAX_QUEUE_SECONDS = 30
"""How long a request may wait for one of the models; by then our clients have given it up, unless told otherwise."""

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
        fused: what serves instead of the ensemble's models, which lie beside it then; None for the ensemble layout.
    """

    badnet: onnx.ModelProto
    repaired: onnx.ModelProto
    overlays: NDArray[np.uint8]
    alpha: float
    calibration: Calibration
    classes: int
    provenance: dict[str, Any]
    fused: Fused | None = None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(height, width, channels)."""
        return self.overlays.shape[1:]


@dataclass(frozen=True)
class Recalibrated:
    """What a re-calibration changes of a version; the networks, and what is not named here, stay as they are.

    Attributes:
        calibration: the new threshold and what it rests on.
        overlays: for STRIP, (perturbations, height, width, channels), uint8; None where neither they nor whether
            the sentinel is shown inputs as they came changes.
        alpha: weight of the input in the blend, which goes with `overlays`.
        provenance: what the manifest says about where this version came from.
        fused: what overlays and threshold make of the fused graph; None where the version has none.
    """

    calibration: Calibration
    overlays: NDArray[np.uint8] | None
    alpha: float
    provenance: dict[str, Any]
    fused: Fused | None = None


def check_output(output: Path, image_shape: tuple[int, ...], classes: int) -> dict[str, Any] | None:
    """Check, before any long work, that a version with this contract can be written to `output`.

    Returns:
        The manifest of the repository that is there; None where it is to be new.

    Raises:
        InputError: `output` is no model repository, or serves images of another shape or another number of classes.
    """
    check_writable(output)
    if not output.exists() or not any(output.iterdir()):
        return None
    manifest = verify_repository(output)
    contract = manifest["versions"][manifest["active"]]["contract"]
    wanted = _contract(image_shape, classes)
    if contract != wanted:
        raise InputError(
            f"{output}: serves images of {contract['image_shape']} in {contract['classes']} classes, got a network for "
            f"{wanted['image_shape']} in {classes}; a new version keeps the contract, so choose another folder"
        )
    return manifest


WriteBeside = Callable[[Path, str, dict[str, Any]], None]
"""Writes into the folder of a version of `guarded`, given the folder, its number and what the manifest says of it."""


def write_repository(output: Path, served: ServedModel, write_beside: WriteBeside | None = None) -> str:
    """Write `served` to `output`: a new repository, or a new version of the one that is there, and make it active.

    What appears, appears whole; versions that were there stay as they are.

    Args:
        output: the model repository.
        served: what goes into it.
        write_beside: writes what is for people, and for the monitor.

    Returns:
        The number of the version written.

    Raises:
        InputError: see `check_output`.
    """
    check_writable(output)
    output.resolve().parent.mkdir(parents=True, exist_ok=True)
    with locked(output):
        manifest = check_output(output, served.image_shape, served.classes)
        versions = {} if manifest is None else manifest["versions"]
        number = next_version(versions)
        versions[number] = {
            "identity": uuid4().hex,
            "contract": _contract(served.image_shape, served.classes),
            "models": dict.fromkeys(MODELS if served.fused is None else (*MODELS, FUSED), int(number)),
            "previous": None if manifest is None else manifest["active"],
            **_about(served.fused),
            **served.provenance,
        }
        with _replaced(output, versions, number) as staged:
            _write_networks(staged, number, served)
            _write_fused(staged, number, served.fused)
            _write_overlays(staged, number, served.overlays, served.alpha, served.calibration)
            _write_entropy(staged, number, served.calibration)
            _write_calibration(staged, number, served.calibration)
            _write_ensemble(staged, number)
            if write_beside is not None:
                write_beside(staged / "guarded" / number, number, versions[number])
    return number


def write_recalibration(
    repository: Path, base: str, changed: Recalibrated, write_beside: WriteBeside | None = None
) -> str:
    """Write a version that differs from version `base` by its calibration, and make it active.

    Only the models concerned get a new version; the others, the networks among them, are shared with `base`.

    Returns:
        The number of the version written.

    Raises:
        RepositoryError: `repository` cannot be used, or another version became active since `base` was read.
    """
    check_writable(repository)
    with locked(repository):
        manifest = verify_repository(repository)
        versions = manifest["versions"]
        if manifest["active"] != base:
            raise RepositoryError(
                f"{repository}: version {manifest['active']} became active while version {base} was calibrated again; "
                "nothing was written, run it again"
            )
        models = versions[base]["models"]
        if (FUSED in models) != (changed.fused is not None):
            raise RepositoryError(
                f"{repository}: version {base} has the layout {layout_of(models)}, got a calibration for another; "
                "nothing was written"
            )
        number = next_version(versions)
        renewed = ["guarded", "strip_verdict"] + ([] if changed.fused is None else [FUSED])
        if changed.overlays is not None:
            renewed.append("strip_perturb")
        entropy = repository / "strip_entropy" / str(models["strip_entropy"])
        if read_plain_first(entropy) != changed.calibration.looks_at_plain:
            renewed.append("strip_entropy")
        versions[number] = {
            "identity": uuid4().hex,
            "contract": versions[base]["contract"],
            "models": models | dict.fromkeys(renewed, int(number)),
            "previous": base,
            **_about(changed.fused),
            **changed.provenance,
        }
        with _replaced(repository, versions, number) as staged:
            if changed.overlays is not None:
                _write_overlays(staged, number, changed.overlays, changed.alpha, changed.calibration)
            if "strip_entropy" in renewed:
                _write_entropy(staged, number, changed.calibration)
            _write_fused(staged, number, changed.fused)
            _write_calibration(staged, number, changed.calibration)
            _write_ensemble(staged, number)
            if write_beside is not None:
                write_beside(staged / "guarded" / number, number, versions[number])
    return number


def activate(repository: Path, version: str | None = None) -> str:
    """Make a version of the repository the active one; all versions stay.

    Args:
        repository: the model repository.
        version: the number of the version; None for the one that was active when the active one was written.

    Returns:
        The number of the version that is active now.

    Raises:
        InputError: there is no such version, or none before the active one.
        RepositoryError: `repository` cannot be used.
    """
    check_writable(repository)
    with locked(repository):
        manifest = verify_repository(repository)
        versions, active = manifest["versions"], manifest["active"]
        wanted = versions[active]["previous"] if version is None else version
        if wanted is None:
            raise InputError(
                f"{repository}: version {active}, which is active, was the first, expected one with a version before "
                f"it; name one of {', '.join(versions)}"
            )
        if wanted not in versions:
            raise InputError(f"version: got {wanted!r}, expected one of {', '.join(versions)}, as {repository} has")
        make_active(repository, manifest, wanted)
        return str(wanted)


def make_active(repository: Path, manifest: dict[str, Any], version: str) -> None:
    """Make a version of a verified repository the active one; for a caller that holds the lock since."""
    if version != manifest["active"]:
        with _replaced(repository, manifest["versions"], version):
            pass  # the configs are all that differs


@contextmanager
def _replaced(repository: Path, versions: dict[str, Any], active: str) -> Iterator[Path]:
    """Yield a copy of `repository` to add files to, which replaces it in one step and then serves version `active`."""
    with staged_folder(repository, replace=True) as staged:
        if repository.exists():
            shutil.copytree(repository, staged, dirs_exist_ok=True)
        yield staged
        contract, models = versions[active]["contract"], versions[active]["models"]
        identity = versions[active]["identity"]
        for config in model_configs(tuple(contract["image_shape"]), contract["classes"], models, identity):
            _write_config(staged / config.name / "config.pbtxt", config)
            if "mode" in config.parameters:
                for mode in _MODES_BESIDE_DEFAULT:
                    config.parameters["mode"].string_value = mode
                    _write_config(staged / config.name / "configs" / f"{mode}.pbtxt", config)
        write_manifest(staged, versions, active)


def _contract(image_shape: tuple[int, ...], classes: int) -> dict[str, Any]:
    return {"image_shape": list(image_shape), "classes": classes}


def render(config: ModelConfig) -> str:
    """Return the text of `config.pbtxt`."""
    return text_format.MessageToString(config)


def model_configs(
    image_shape: tuple[int, ...], classes: int, models: Mapping[str, int], identity: str = ""
) -> list[ModelConfig]:
    """Return the configs of all models of a version; the batch dimension is implied by `max_batch_size`.

    `guarded` names the version of every model behind it, so that one response never mixes two versions. Where `fused`
    is among the models, it serves; the ensemble's other models are at hand for whoever calibrates or compares.

    Args:
        image_shape: (height, width, channels).
        classes: how many classes the networks know.
        models: the version of each model that is to be served; no other is loaded.
        identity: of the version, by which a server tells from which repository it serves.
    """
    image = ("image", TYPE_UINT8, list(image_shape))
    # The number of perturbations is a version's own: -1 keeps it out of the configs, which all versions share.
    perturbations = ("perturbations", TYPE_FP32, [-1, *image_shape])
    sentinel_probabilities = ("sentinel_probabilities", TYPE_FP32, [-1, classes])
    sentinel_entropies = ("sentinel_entropies", TYPE_FP32, [-1])
    sentinel_plain_entropy = ("sentinel_plain_entropy", TYPE_FP32, [1])
    sentinel_label = ("sentinel_label", TYPE_INT32, [1])
    sentinel_perturbations = ("sentinel_perturbations", TYPE_INT32, [1])
    repaired_probabilities = ("repaired_probabilities", TYPE_FP32, [classes])
    entropy = ("entropy", TYPE_FP32, [1])
    probabilities = ("probabilities", TYPE_FP32, [classes])
    label = ("label", TYPE_INT32, [1])
    trojaned = ("trojaned", TYPE_BOOL, [1])
    p_value = ("p_value", TYPE_FP32, [1])

    count = ("perturbations", TYPE_INT32, [1])

    public = [label, trojaned, entropy, p_value, count, probabilities]
    opinion = [sentinel_entropies, sentinel_plain_entropy, sentinel_label, sentinel_perturbations]

    guarded = _config("guarded", [image], public, platform="ensemble")
    guarded.parameters[IDENTITY_KEY].CopyFrom(ModelParameter(string_value=identity))
    tensors: dict[str, tuple[list[str], list[str]]] = {
        "strip_perturb": (["image"], ["perturbations"]),
        "badnet": (["perturbations"], ["sentinel_probabilities"]),
        "strip_entropy": (["sentinel_probabilities"], [*SENTINEL_OUTPUTS]),
        "repaired": (["image"], ["repaired_probabilities"]),
        "fused": (["image"], [*SENTINEL_OUTPUTS, "repaired_probabilities"]),
        "strip_verdict": (["image", *SENTINEL_OUTPUTS, "repaired_probabilities"], [name for name, _, _ in public]),
    }
    for name in BEHIND[layout_of(models)]:
        inputs, outputs = tensors[name]
        # A tensor has the same name in every model that reads or writes it, but for the blended images: how many of
        # them there were is public under theirs.
        among = {} if name == "strip_verdict" else {"perturbations": "blends"}
        guarded.ensemble_scheduling.step.append(
            ModelEnsembling.Step(
                model_name=name,
                model_version=models[name],
                input_map={tensor: among.get(tensor, tensor) for tensor in inputs},
                output_map={tensor: among.get(tensor, tensor) for tensor in outputs},
            )
        )
    verdict = _config(
        "strip_verdict", [image, *opinion, repaired_probabilities], public, backend="python", image_sized=False
    )
    verdict.parameters["mode"].CopyFrom(ModelParameter(string_value="block"))
    configs = [
        guarded,
        _config("strip_perturb", [image], [perturbations], backend="python"),
        _config("badnet", [perturbations], [sentinel_probabilities], platform="onnxruntime_onnx"),
        _config("strip_entropy", [sentinel_probabilities], opinion, backend="python"),
        _config("repaired", [image], [repaired_probabilities], platform="onnxruntime_onnx"),
        verdict,
    ]
    if FUSED in models:
        configs.append(_config(FUSED, [image], [*opinion, repaired_probabilities], platform="onnxruntime_onnx"))
    for config in configs:
        config.version_policy.specific.versions.append(models[config.name])
    return configs


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
    # By time, and not by length: Triton 2.51 crashes where a step of an ensemble turns a request away at its door.
    config.dynamic_batching.default_queue_policy.timeout_action = ModelQueuePolicy.REJECT
    config.dynamic_batching.default_queue_policy.default_timeout_microseconds = int(1e6 * MAX_QUEUE_SECONDS)
    kind = ModelInstanceGroup.KIND_AUTO if image_sized else ModelInstanceGroup.KIND_CPU
    config.instance_group.append(ModelInstanceGroup(count=1, kind=kind))
    if platform:
        # Threads, memory and, on a GPU, kernels are there before the first request is.
        sizes = {
            tensor: ModelWarmup.Input(data_type=kind, dims=[max(1, size) for size in dims], zero_data=True)
            for tensor, kind, dims in inputs
        }
        config.model_warmup.append(ModelWarmup(name="first", batch_size=1, inputs=sizes))
        _add_cuda_options(config)
    if image_sized:
        # Tensors stay on the GPU between the models that live there: so says a model of the Python backend, of which
        # the embedded server's onnxruntime is one. NVIDIA's takes them there anyway.
        config.parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].CopyFrom(ModelParameter(string_value="no"))
    return config


def _add_cuda_options(config: ModelConfig) -> None:
    """Say how onnxruntime is to run a network where that is on a GPU."""
    # Thresholds are calibrated in float32. With TF32, 10 bits of mantissa, entropies would be others.
    config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="cuda", parameters={"use_tf32": "0"})
    # Batches have ever other sizes, for each of which onnxruntime's default would try all algorithms. As an option of
    # the accelerator NVIDIA's backend overwrites it by that default, unless it is among the model's parameters.
    config.parameters["cudnn_conv_algo_search"].CopyFrom(ModelParameter(string_value="1"))  # HEURISTIC


def _write_networks(repository: Path, version: str, served: ServedModel) -> None:
    for name, graph in (("badnet", served.badnet), ("repaired", served.repaired)):
        onnx.save(graph, _version_folder(repository, name, version) / "model.onnx")


def _write_fused(repository: Path, version: str, fused: Fused | None) -> None:
    if fused is not None:
        onnx.save(fused.graph, _version_folder(repository, FUSED, version) / "model.onnx")


def _about(fused: Fused | None) -> dict[str, Any]:
    return {} if fused is None else {FUSED: fused.to_json()}


def _write_overlays(
    repository: Path, version: str, overlays: NDArray[np.uint8], alpha: float, calibration: Calibration
) -> None:
    folder = _python_version(repository, "strip_perturb", version)
    np.savez(folder / "overlays.npz", overlays=overlays, alpha=alpha)
    _write_plain_first(folder, calibration)


def _write_entropy(repository: Path, version: str, calibration: Calibration) -> None:
    _write_plain_first(_python_version(repository, "strip_entropy", version), calibration)


def _write_plain_first(folder: Path, calibration: Calibration) -> None:
    _write_text(folder / "perturbations.json", json.dumps({"plain_first": calibration.looks_at_plain}) + "\n")


def _write_calibration(repository: Path, version: str, calibration: Calibration) -> None:
    folder = _python_version(repository, "strip_verdict", version)
    written = calibration.to_json() | {"created": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    _write_text(folder / "calibration.json", json.dumps(written, indent=2) + "\n")
    np.savez(folder / "regions.npz", **{name: getattr(calibration.regions, name) for name in REGION_FIELDS})


def _write_ensemble(repository: Path, version: str) -> None:
    # Triton wants a version folder even for an ensemble, and object stores keep no empty ones.
    _write_text(_version_folder(repository, "guarded", version) / ".keep", "")


def _python_version(repository: Path, name: str, version: str) -> Path:
    folder = _version_folder(repository, name, version)
    shell = importlib.resources.files("model_repository") / name / "model.py"
    (folder / "model.py").write_bytes(shell.read_bytes())
    _write_text(folder / "__pycache__", _NO_BYTECODE)
    return folder


def _version_folder(repository: Path, name: str, version: str) -> Path:
    folder = repository / name / version
    folder.mkdir(parents=True)
    return folder


def _write_config(path: Path, config: ModelConfig) -> None:
    """Write a config where it differs from what is there: a running Triton loads models anew whose files are newer."""
    text = render(config)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        _write_text(path, text)


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
