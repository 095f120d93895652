"""What the Python-backend models of the repository delegate to.

A stage is an array function with named inputs and outputs. It runs once over all requests that Triton handed over
together, on the device where the model instance lives.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
import zipfile
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from detector.conformal import Regions
from detector.consensus import negative_log_likelihood
from detector.errors import RepositoryError, SetupError
from detector.live_metrics import CANARY_KEY, MOST_LABELS, LiveMetrics
from detector.quarantine import FOLDER_VARIABLE, REQUEST_ID, Quarantine, QuarantineMetrics, Rejected
from detector.scores import DETECTORS, Evidence, Thresholds, score_bits
from detector.strip import (
    Array,
    guarded_labels,
    perturb,
    perturbation_entropies_bits,
    plain_first,
    weighted_overlays,
)

MODES = ("block", "shadow")

BEHIND = {
    "ensemble": ("strip_perturb", "badnet", "strip_entropy", "repaired", "strip_verdict"),
    "fused": ("fused", "strip_verdict"),
}
"""The models that answer for `guarded`, by layout."""

ON_THE_CPU = "onnxruntime could not load CUDA, so it runs on the CPU"
"""What the embedded server's log says of a network that a GPU was there for."""

SENTINEL = "badnet"
"""The original network by itself. Where it is not behind `guarded` it lies beside it: `evaluate` asks it for labels."""

IDENTITY_KEY = "stripwire-identity"
"""Parameter of the ensemble that tells which version of which repository it is."""

IMAGE = "image"
"""What `guarded` takes. `strip_verdict` takes it as well, to keep what it rejects, and looks at no other."""

SENTINEL_OUTPUTS = ("sentinel_entropies", "sentinel_plain_entropy", "sentinel_label", "sentinel_perturbations")
REGION_FIELDS = ("thresholds", "p_values")

_LEAST_THRESHOLD = -float(np.finfo(np.float32).smallest_subnormal)
"""Just under 0, a threshold rejects nothing: that of a score which is 0 for too many clean images."""

CONTROL_KEY = "stripwire-control"
"""What the secret is called without which a server loads no model."""

CONTROL_RULE = "at least 16 letters, digits or any of _ . ~ -"
"""What the secret is made of. Triton takes it as part of a longer option, in which other characters mean something."""


def is_control_token(token: str) -> bool:
    """Say whether a server can be given that secret, see `CONTROL_RULE`."""
    return re.fullmatch(r"[A-Za-z0-9_.~-]{16,}", token) is not None


class Stage:
    """Runs an array function over all requests of a Triton batch.

    Args:
        pb_utils: Triton's `triton_python_backend_utils`, or a typed stand-in.
        inputs: names of the input tensors, in the order of the function's arguments.
        outputs: names of the output tensors, in the order of the function's results.
        compute: takes one array per input and returns one per output; the first axis of each is the batch.
        xp: the array namespace in which `compute` works.
        with_origins: tell `compute`, as its last argument, where the rows come from: `Origins`.
        close: ends what the stage has going on; Triton says when.
    """

    def __init__(
        self,
        pb_utils: Any,
        inputs: Sequence[str],
        outputs: Sequence[str],
        compute: Callable[..., Sequence[Array]],
        xp: ModuleType = np,
        with_origins: bool = False,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.close = close
        self._with_origins = with_origins
        self._pb_utils = pb_utils
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._compute = compute
        self._xp = xp

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request with one InferenceResponse, computing all of them at once."""
        per_request = [[self.read(request, name) for name in self._inputs] for request in requests]
        arrays = (
            per_request[0] if len(per_request) == 1 else [self.join(parts) for parts in zip(*per_request, strict=True)]
        )
        if self._with_origins:
            counts = [parts[0].shape[0] for parts in per_request]
            results = self._compute(*arrays, Origins(self._pb_utils, requests, counts))
        else:
            results = self._compute(*arrays)
        if self._xp is not np:
            # Triton reads the results on a stream of its own.
            self._xp.cuda.get_current_stream().synchronize()
        responses = []
        start = 0
        for request, parts in zip(requests, per_request, strict=True):
            stop = start + parts[0].shape[0]
            requested = set(request.requested_output_names())
            tensors = [
                self._to_tensor(name, result[start:stop])
                for name, result in zip(self._outputs, results, strict=True)
                if name in requested
            ]
            responses.append(self._pb_utils.InferenceResponse(output_tensors=tensors))
            start = stop
        return responses

    def read(self, request: Any, name: str) -> Array:
        """Return an input of a request, as an array of the namespace."""
        tensor = self._pb_utils.get_input_tensor_by_name(request, name)
        if tensor.is_cpu():
            return self._xp.asarray(tensor.as_numpy())
        return self._xp.from_dlpack(tensor)

    def join(self, parts: Sequence[Array]) -> Array:
        """Return what was read of several requests as one array."""
        return self._xp.concatenate(parts, axis=0)

    def _to_tensor(self, name: str, array: Array) -> Any:
        if self._xp is np:
            return self._pb_utils.Tensor(name, array)
        return self._pb_utils.Tensor.from_dlpack(name, array)


class Origins:
    """Where the rows of a Triton batch come from.

    Args:
        pb_utils: Triton's `triton_python_backend_utils`.
        requests: the requests, in the order of their rows.
        counts: how many rows each has.
    """

    def __init__(self, pb_utils: Any, requests: Sequence[Any], counts: Sequence[int]) -> None:
        self._pb_utils = pb_utils
        self._requests = requests
        self._starts = np.cumsum([0, *counts])
        self.canary = np.repeat([_is_canary(request) for request in requests], counts)
        """(rows,), bool: which were sent to watch the guard."""

    def request_id(self, row: int) -> str:
        """Return the name of a row, `<id of its request>.<row in it>`; a new one where its request has no usable id."""
        request, within = self._place(row)
        own = f"{request.request_id()}.{within}"
        return own if re.fullmatch(REQUEST_ID, own) and not own.startswith(".") else f"{uuid.uuid4().hex}.{within}"

    def image(self, row: int) -> Array:
        """Return a copy of the image of a row, (height, width, channels), uint8."""
        request, within = self._place(row)
        return np.array(self._pb_utils.get_input_tensor_by_name(request, IMAGE).as_numpy()[within])

    def _place(self, row: int) -> tuple[Any, int]:
        index = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._requests[index], row - int(self._starts[index])


def _is_canary(request: Any) -> bool:
    parameters = request.parameters()
    return bool(parameters) and json.loads(parameters).get(CANARY_KEY) is True


def perturb_stage(args: dict[str, str], pb_utils: Any) -> Stage:
    """Return the stage of `strip_perturb`: `image` to `perturbations`.

    Args:
        args: what Triton passes to `initialize`. The version folder holds `overlays.npz`: `overlays`, (perturbations,
            height, width, channels) uint8, and `alpha`; and `perturbations.json`, see `read_plain_first`.
        pb_utils: Triton's `triton_python_backend_utils`.

    Raises:
        RepositoryError: a file is missing or malformed; Triton then refuses to load the model.
    """
    xp = array_namespace(args)
    overlays, alpha = read_overlays(_version_folder(args))
    weighted, weights = xp.asarray(weighted_overlays(overlays, alpha)), alpha
    if read_plain_first(_version_folder(args)):
        weighted, weights = plain_first(weighted, alpha, xp=xp)
    return Stage(pb_utils, ["image"], ["perturbations"], lambda images: [perturb(images, weighted, weights, xp=xp)], xp)


def entropy_stage(args: dict[str, str], pb_utils: Any) -> Stage:
    """Return the stage of `strip_entropy`: `sentinel_probabilities` to entropies, label and count.

    `sentinel_plain_entropy` and `sentinel_label` are of the image as it came; without it among the perturbations, -1.
    `sentinel_perturbations` is how many others there are.

    Args:
        args: what Triton passes to `initialize`. The version folder holds `perturbations.json`, see
            `read_plain_first`.
        pb_utils: Triton's `triton_python_backend_utils`.

    Raises:
        RepositoryError: the file is missing or malformed; Triton then refuses to load the model.
    """
    xp = array_namespace(args)
    with_plain = read_plain_first(_version_folder(args))

    def compute(probabilities: Array) -> list[Array]:
        if with_plain:
            plain, probabilities = probabilities[:, 0], probabilities[:, 1:]
            labels = xp.asarray(xp.argmax(plain, axis=-1), dtype=xp.int32)[:, None]
            plain_entropy = perturbation_entropies_bits(plain[:, None], xp=xp)
        else:
            labels = xp.full((probabilities.shape[0], 1), -1, dtype=xp.int32)
            plain_entropy = xp.asarray(labels, dtype=xp.float32)
        entropies = perturbation_entropies_bits(probabilities, xp=xp)
        return [entropies, plain_entropy, labels, xp.full_like(labels, entropies.shape[1])]

    return Stage(pb_utils, ["sentinel_probabilities"], SENTINEL_OUTPUTS, compute, xp)


def verdict_stage(args: dict[str, str], pb_utils: Any) -> Stage:
    """Return the stage of `strip_verdict`: what the sentinel found and repaired probabilities to all public outputs.

    What was found comes from `strip_entropy`, or from `fused`. There, an input that was certain to be accepted may have
    been spared some perturbations: then its entropy is the mean over those that ran, and its p-value that of the score
    of those, which is over the threshold.

    What it decides is counted, see `detector.live_metrics`; labels if the environment has `STRIPWIRE_COUNT_LABELS=1`.
    What it rejects, canaries apart, is kept if the environment has `STRIPWIRE_QUARANTINE`, see `detector.quarantine`.

    The stage hands entropy, count and probabilities on under their public names: a tensor of an ensemble that is public
    and read by another step is lost to that step when the caller does not ask for it. Its tensors are tiny, so it runs
    on the CPU wherever the other models run.

    Args:
        args: what Triton passes to `initialize`. The version folder holds `calibration.json`, see `read_thresholds`,
            and `regions.npz`, see `read_regions`; the config's parameter `mode` is `block` or `shadow`.
        pb_utils: Triton's `triton_python_backend_utils`.

    Raises:
        RepositoryError: no usable calibration or mode; Triton then refuses to load the model.
    """
    detector, thresholds = read_thresholds(_version_folder(args))
    regions = read_regions(_version_folder(args), 1 if detector == "strip" else 2 if thresholds.nll is None else 3)
    parameters = json.loads(args["model_config"])["parameters"]
    mode = parameters.get("mode", {}).get("string_value")
    if mode not in MODES:
        raise RepositoryError(f"{args['model_name']}: parameter mode is {mode!r}, expected one of {', '.join(MODES)}")

    quarantine = _quarantine(args)
    metrics = _live_metrics(args, pb_utils, mode, thresholds, quarantine)

    def compute(
        entropies: Array,
        plain_entropy: Array,
        sentinel_label: Array,
        perturbations: Array,
        probabilities: Array,
        origins: Origins,
    ) -> list[Array]:
        ran = perturbations[:, 0]
        bits = score_bits(entropies, detector, ran)
        evidence, entropy = Evidence(bits), bits
        if detector != "strip":
            entropy = score_bits(entropies, "strip", ran)
            asked = thresholds.nll is not None
            nlls = negative_log_likelihood(probabilities, sentinel_label[:, 0]) if asked else None
            evidence = Evidence(bits, plain_entropy[:, 0], nlls)
        # A label read off broken probabilities means nothing: reject the input.
        broken = ~np.all(np.isfinite(probabilities), axis=-1)
        rejecting = thresholds.rejecting(evidence)
        rejecting["not_finite"] |= broken
        trojaned = np.any([*rejecting.values()], axis=0)
        labels = guarded_labels(probabilities, trojaned, block=mode == "block")
        p_value = np.where(broken, np.float32(0.0), regions.p_value(evidence.scores()))
        metrics.count(origins.canary, trojaned, rejecting, bits, ran, labels)
        if quarantine is not None:
            for row in np.flatnonzero(trojaned & ~origins.canary).tolist():
                quarantine.offer(
                    Rejected(
                        origins.request_id(row),
                        origins.image(row),
                        label=int(probabilities[row].argmax()),
                        entropy_bits=float(entropy[row]),
                        p_value=float(p_value[row]),
                        scores=tuple(score for score, rejects in rejecting.items() if rejects[row]),
                        version=args["model_version"],
                        rejected_at=time.time(),
                    )
                )
        return [labels[:, None], trojaned[:, None], entropy[:, None], p_value[:, None], perturbations, probabilities]

    inputs = [*SENTINEL_OUTPUTS, "repaired_probabilities"]
    outputs = ["label", "trojaned", "entropy", "p_value", "perturbations", "probabilities"]

    def close() -> None:
        if quarantine is not None:
            quarantine.close()
        metrics.close()

    return Stage(pb_utils, inputs, outputs, compute, with_origins=True, close=close)


def _quarantine(args: dict[str, str]) -> Quarantine | None:
    """Return where a version of `strip_verdict` keeps what it rejects; None where it keeps nothing."""
    quarantine = Quarantine.of_environment()
    if quarantine is not None and IMAGE not in [each["name"] for each in json.loads(args["model_config"])["input"]]:
        quarantine.close()
        raise RepositoryError(
            f"{FOLDER_VARIABLE}: this version was exported by a Stripwire that had no quarantine, so strip_verdict "
            "does not see images; export the model again, or serve without the variable"
        )
    return quarantine


def _live_metrics(
    args: dict[str, str], pb_utils: Any, mode: str, thresholds: Thresholds, quarantine: Quarantine | None
) -> LiveMetrics:
    """Return what counts the verdicts of a version of `strip_verdict`."""
    path = _version_folder(args) / "calibration.json"
    content = path.read_bytes()
    config = json.loads(args["model_config"])
    (classes,) = next(output["dims"] for output in config["output"] if output["name"] == "probabilities")
    count_labels = os.environ.get("STRIPWIRE_COUNT_LABELS", "0")
    if count_labels not in ("0", "1") or (count_labels == "1" and int(classes) > MOST_LABELS):
        raise RepositoryError(
            f"STRIPWIRE_COUNT_LABELS: got {count_labels!r} for {classes} classes, expected 0, or 1 for at most "
            f"{MOST_LABELS}: every label is a time series"
        )
    try:
        calibration = json.loads(content)
        histogram = calibration["histogram"]
        pairs = zip(histogram["bounds_bits"], histogram["counts"], strict=True)
        clean = {float(bound): count / histogram["images"] for bound, count in pairs}
        created = datetime.fromisoformat(calibration["created"]).timestamp()
    except (KeyError, TypeError, ValueError) as error:
        raise RepositoryError(f"{path}: no usable calibration ({error!r}); export the model again") from error
    return LiveMetrics(
        pb_utils,
        mode=mode,
        thresholds=thresholds,
        clean=clean,
        calibration={"repository_version": args["model_version"], "sha256": hashlib.sha256(content).hexdigest()},
        created=created,
        tell_others=(lambda: None) if quarantine is None else QuarantineMetrics(pb_utils, quarantine).tell,
        classes=int(classes) if count_labels == "1" else None,
    )


def layout_of(models: Mapping[str, int]) -> str:
    """Return the layout of a version that consists of these models: one of `BEHIND`."""
    return "fused" if "fused" in models else "ensemble"


def read_overlays(folder: Path) -> tuple[Array, float]:
    """Return the overlays in a version folder of `strip_perturb`, and their alpha; see `weighted_overlays`.

    Raises:
        RepositoryError: they are missing or malformed.
    """
    path = folder / "overlays.npz"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            overlays, alpha = stored["overlays"], float(stored["alpha"])
        weighted_overlays(overlays[:1], alpha)  # which says what is wrong with them
    except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RepositoryError(f"{path}: cannot be used as overlays ({error}); export the model again") from error
    return overlays, alpha


def read_plain_first(folder: Path) -> bool:
    """Return whether the perturbations of a version of `strip_perturb` begin with the image as it came.

    `strip_entropy` is told the same; the detector `consensus` wants it.

    Raises:
        RepositoryError: a version folder does not say so.
    """
    path = folder / "perturbations.json"
    try:
        plain_first = json.loads(path.read_text(encoding="utf-8"))["plain_first"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RepositoryError(f"{path}: cannot be read ({error!r}); export the model again") from error
    if not isinstance(plain_first, bool):
        raise RepositoryError(f"{path}: plain_first is {plain_first!r}, expected true or false")
    return plain_first


def read_thresholds(folder: Path) -> tuple[str, Thresholds]:
    """Return what a version folder of `strip_verdict` decides by: one of `DETECTORS`, and its thresholds.

    Raises:
        RepositoryError: they are missing or malformed.
    """
    path = folder / "calibration.json"
    fields = {"bits": "threshold_bits", "plain_bits": "threshold_plain_bits", "nll": "threshold_nll"}
    try:
        calibration = json.loads(path.read_text(encoding="utf-8"))
        detector = calibration["detector"]
        values = {field: calibration[name] for field, name in fields.items()}
        bits = float(values.pop("bits"))
        thresholds = Thresholds(
            bits, **{name: None if value is None else float(value) for name, value in values.items()}
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RepositoryError(f"{path}: no usable calibration ({error!r}); export the model again") from error
    if detector not in DETECTORS:
        raise RepositoryError(f"{path}: detector is {detector!r}, expected one of {', '.join(DETECTORS)}")
    for field, name in fields.items():
        value = getattr(thresholds, field)
        if value is not None and not (np.isfinite(value) and value >= _LEAST_THRESHOLD):
            raise RepositoryError(f"{path}: {name} is {value}, expected a finite number of at least 0")
        if detector == "strip" and field != "bits" and value is not None:
            raise RepositoryError(f"{path}: {name} is {value} with the detector strip, expected null")
    return detector, thresholds


def read_regions(folder: Path, scores: int) -> Regions:
    """Return the rejection regions in a version folder of `strip_verdict`, of which `regions.npz` holds the fields.

    Args:
        folder: the version folder.
        scores: how many scores the detector looks at.

    Raises:
        RepositoryError: they are missing or malformed.
    """
    path = folder / "regions.npz"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            regions = Regions(*(np.asarray(stored[name], np.float64) for name in REGION_FIELDS))
    except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RepositoryError(f"{path}: cannot be used for p-values ({error}); export the model again") from error
    if not regions.is_whole():
        raise RepositoryError(f"{path}: the regions are not nested; export the model again")
    if len(regions.thresholds) != scores:
        raise RepositoryError(
            f"{path}: the regions are of {len(regions.thresholds)} scores, expected {scores}; export the model again"
        )
    return regions


def _version_folder(args: dict[str, str]) -> Path:
    return Path(args["model_repository"]) / args["model_version"]


def array_namespace(args: dict[str, str]) -> ModuleType:
    """Return CuPy for a model instance on a GPU, on that GPU, and NumPy otherwise.

    Args:
        args: what Triton passes to `initialize`.

    Raises:
        SetupError: there is no CuPy; Triton then refuses to load the model.
    """
    if args["model_instance_kind"] != "GPU":
        return np
    try:
        import cupy
    except ImportError as error:
        # Its tensors would arrive on the GPU, where NumPy cannot read them.
        raise SetupError(
            f"{args['model_name']}: runs on a GPU, which needs CuPy; pip install cupy-cuda13x (12x for CUDA 12)"
        ) from error
    cupy.cuda.Device(int(args["model_instance_device_id"])).use()
    return cupy  # type: ignore[no-any-return]
