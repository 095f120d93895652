"""What is compared, each behind a server of its own: the bare network, the same guard done naively, and ours."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from deploy.embedded.server import EmbeddedTriton
from detector.calibration import ThresholdRule
from detector.errors import ExportError
from model_repository.manifest import read_manifest, write_manifest

BARE = "bare network"
NAIVE = "naive ensemble"
ENSEMBLE, FUSED, FUSED_WHOLE = "ensemble", "fused", "fused, no early exit"
STRIP_ENSEMBLE, STRIP_FUSED = "ensemble, strip", "fused, strip"
CONTENDERS = (BARE, NAIVE, ENSEMBLE, FUSED, FUSED_WHOLE, STRIP_ENSEMBLE, STRIP_FUSED)
"""Ours are with the default detector, `consensus`, where nothing else is said; the naive one is STRIP."""

_NAIVE = Path(__file__).with_name("naive")
_NAIVE_ANSWERS = {"label", "trojaned", "entropy"}
_NOT_NAIVE = {"sentinel_plain_entropy", "sentinel_label", "sentinel_perturbations"}


@dataclass(frozen=True)
class Contender:
    """One way to get a label for an image, with a verdict or without.

    Attributes:
        name: one of `CONTENDERS`.
        server: that is asked; of a server that nobody asks, nothing runs.
        model: which of its models is asked.
        outputs: what it is asked for.
        one_by_one: whether a request holds one image only.
    """

    name: str
    server: EmbeddedTriton
    model: str
    outputs: Sequence[str]
    one_by_one: bool = False


def export_all(badnet: Path, folder: Path) -> None:
    """Export a BadNet in every layout.

    What a network costs does not hang on its weights, so the repair is cut short; but two networks it must be, since
    what two that are the same have in common would be computed once.

    Args:
        badnet: folder of a trained BadNet, see `exporter.badnet`.
        folder: where the repositories go.
    """
    # Whoever only asks servers needs neither TensorFlow nor onnx.
    from exporter.badnet import MODEL_FILE, VALIDATION_FILE
    from exporter.export import Data, ExportOptions, export
    from exporter.repair import RepairOptions

    repair, strip = RepairOptions(epochs=1), ThresholdRule(detector="strip")
    repositories = {
        ENSEMBLE: ExportOptions(repair=repair),
        FUSED: ExportOptions(repair=repair, layout="fused"),
        FUSED_WHOLE: ExportOptions(repair=repair, layout="fused", early_exit=False),
        STRIP_ENSEMBLE: ExportOptions(repair=repair, rule=strip),
        STRIP_FUSED: ExportOptions(repair=repair, rule=strip, layout="fused"),
    }
    for name, options in repositories.items():
        export(badnet / MODEL_FILE, Data(badnet / VALIDATION_FILE), folder / name, options)
        _check_two_networks(folder / name)
    write_naive(folder / STRIP_ENSEMBLE, folder / NAIVE)


@contextmanager
def serve_all(folder: Path) -> Iterator[list[Contender]]:
    """Serve each of the repositories in a folder, see `export_all`, and yield who can be asked."""
    ours = [name for name in CONTENDERS if name not in (BARE, NAIVE)]
    with ExitStack() as running:
        servers = {name: running.enter_context(EmbeddedTriton(folder / name)) for name in (NAIVE, *ours)}
        verdict = ("label", "trojaned", "entropy")
        yield [
            Contender(BARE, servers[ENSEMBLE], "repaired", ("repaired_probabilities",)),
            Contender(NAIVE, servers[NAIVE], "guarded", verdict, one_by_one=True),
            *(Contender(name, servers[name], "guarded", verdict) for name in ours),
        ]


def _check_two_networks(repository: Path) -> None:
    """Raise where the repair was taken back: what would be measured is half of the work then."""
    manifest = read_manifest(repository)
    if not manifest["versions"][manifest["active"]]["repair"]["changed"]:
        raise ExportError(f"{repository}: the repair changed nothing, so there are no two networks to measure")


def write_naive(repository: Path, folder: Path) -> None:
    """Write a copy of a repository in the layout `ensemble` whose Python-backend models are those in `naive`.

    Args:
        repository: a model repository with the detector `strip`.
        folder: the copy, which must not exist.
    """
    from exporter.repository import render

    shutil.copytree(repository, folder)
    manifest = read_manifest(repository)
    for model in _NAIVE.glob("*/model.py"):
        shutil.copy(model, folder / model.parent.name / manifest["active"] / "model.py")
    for path in folder.glob("*/config.pbtxt"):
        config = text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
        _without_batches(config)
        path.write_text(render(config), encoding="utf-8")
    write_manifest(folder, manifest["versions"], manifest["active"])


def _without_batches(config: ModelConfig) -> None:
    """Take out of a config what the naive models do not have: batches, and outputs that they do not give."""
    config.max_batch_size = 0
    config.ClearField("dynamic_batching")
    config.ClearField("model_warmup")
    for tensors, answers in ((config.input, False), (config.output, config.name in ("guarded", "strip_verdict"))):
        unused = _NOT_NAIVE | ({"image"} if config.name == "strip_verdict" else set())
        kept = [tensor for tensor in tensors if tensor.name not in unused]
        kept = [tensor for tensor in kept if not answers or tensor.name in _NAIVE_ANSWERS]
        for tensor in kept:
            tensor.dims.insert(0, -1)
        copies = [type(tensor).FromString(tensor.SerializeToString()) for tensor in kept]
        del tensors[:]
        tensors.extend(copies)
    for step in config.ensemble_scheduling.step:
        for names in (step.input_map, step.output_map):
            for name in [*names]:
                answer = step.model_name == "strip_verdict" and names is step.output_map
                unseen = name == "image" and step.model_name == "strip_verdict"
                if name in _NOT_NAIVE or unseen or (answer and name not in _NAIVE_ANSWERS):
                    del names[name]
