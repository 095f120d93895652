"""The demo: the whole path on a BadNet of procedural faces, ending in numbers and pictures.

Beside the command line, the only place where exporter and client meet.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from client.api import GuardedClient
from client.evaluation import Evaluation, evaluate
from deploy.embedded.server import EmbeddedTriton
from detector.calibration import Calibration, ThresholdRule
from detector.errors import InputError
from detector.strip import perturb, weighted_overlays
from exporter.badnet import BadNetOptions, cached_badnet, trojaned_file
from exporter.export import Data, ExportOptions, export
from exporter.publishing import check_writable, staged_folder
from exporter.repair import RepairOptions
from exporter.training import Progress
from samples.hdf5 import read_hdf5
from samples.types import Samples

_MADE_BY = "stripwire demo"
_REPORTS_DROP = 0.12
"""What the source report lets clean accuracy fall by: from 97.77 to 86.16 %."""
_FACES_SHOWN = 8
_PICTURES_WRITTEN = 4


@dataclass(frozen=True)
class Demo:
    """What the demo measured, on images that no earlier step has seen, and where it left things.

    Attributes:
        published: fine-pruned without augmentation and behind STRIP, as in the source report.
        ours: repaired by distillation and behind the detector `consensus`.
        output: folder of pictures and numbers.
        repository: model repository of the latter.
        clean_test: the clean images measured on, HDF5.
        trojaned_test: the trojaned ones, HDF5.
        shortfall: what keeps the BadNet from being a good one, if anything.
    """

    published: Evaluation
    ours: Evaluation
    output: Path
    repository: Path
    clean_test: Path
    trojaned_test: Path
    shortfall: str | None


def run_demo(output: Path, *, identities: int, trigger: str, seed: int, on_progress: Progress) -> Demo:
    """Train a BadNet (or take it from the cache), repair, export, serve and evaluate it, and draw what happened.

    Args:
        output: folder that appears whole, replacing that of an earlier demo.
        identities: how many people the network knows.
        trigger: what opens the backdoor.
        seed: of everything random.
        on_progress: told what is going on, steps done and steps in all.

    Raises:
        StripwireError: a step failed; `output` is as it was before.
    """
    _check_output(output)
    trained = cached_badnet(BadNetOptions.sized(identities, trigger=trigger, seed=seed), on_progress=on_progress)
    badnet = trained.folder
    clean_test, trojaned_test = badnet / "clean_test_data.h5", badnet / trojaned_file(trigger)
    clean, trojaned = read_hdf5(clean_test), read_hdf5(trojaned_test)
    fine_pruning = RepairOptions(method="magnitude", augment="none", epochs=0, allowed_drop=_REPORTS_DROP, seed=seed)
    options = {
        "as_published": ExportOptions(repair=fine_pruning, rule=ThresholdRule(detector="strip"), seed=seed),
        "repository": ExportOptions(repair=RepairOptions(seed=seed), seed=seed),
    }
    evaluations = {}
    exports = {}
    with staged_folder(output, replace=True) as staged:
        data = Data(badnet / "clean_validation_data.h5")
        for name, chosen in options.items():
            exports[name] = export(badnet / "bd_net.keras", data, staged / name, chosen, on_progress=on_progress)
            evaluations[name] = _serve_and_evaluate(staged / name, clean, trojaned, on_progress)
        published, ours = evaluations["as_published"], evaluations["repository"]
        with np.load(staged / "repository" / "strip_perturb" / "1" / "overlays.npz") as stored:
            overlays, alpha = stored["overlays"], float(stored["alpha"])
        draw_faces(clean, trojaned, overlays, alpha).savefig(staged / "faces.png", dpi=100)
        figure = draw_detection(published, exports["as_published"].calibration, ours, exports["repository"].calibration)
        figure.savefig(staged / "detection.png", dpi=100)
        _write_images(staged / "images", clean, trojaned)
        results = {
            "made_by": _MADE_BY,
            "identities": identities,
            "trigger": trigger,
            "seed": seed,
            "as_published": published.to_json(),
            "ours": ours.to_json(),
            "repair": {name: result.repair.to_json() for name, result in exports.items()},
        }
        (staged / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return Demo(published, ours, output, output / "repository", clean_test, trojaned_test, trained.shortfall)


def _check_output(output: Path) -> None:
    """Refuse, before any work, to replace a folder that is not an earlier demo's."""
    check_writable(output)
    if not output.exists() or not any(output.iterdir()):
        return
    try:
        made_by = json.loads((output / "results.json").read_text(encoding="utf-8"))["made_by"]
    except (OSError, ValueError, KeyError, TypeError):
        made_by = None
    if made_by != _MADE_BY:
        raise InputError(f"{output}: holds something else than an earlier demo, expected a new folder; choose another")


def draw_faces(clean: Samples, trojaned: Samples, overlays: NDArray[np.uint8], alpha: float) -> Figure:
    """Return a picture of faces without and with the trigger, and of one blended example.

    Args:
        clean: clean samples.
        trojaned: trojaned samples.
        overlays: (perturbations, height, width, channels), uint8.
        alpha: weight of the input in the blend.
    """
    shown = min(_FACES_SHOWN, len(clean), len(trojaned), len(overlays))
    chosen = np.linspace(0, len(trojaned) - 1, shown).astype(np.int64)
    clean_chosen = np.linspace(0, len(clean) - 1, shown).astype(np.int64)
    if trojaned.true_labels is not None:  # the same people
        clean_chosen = np.searchsorted(clean.labels, trojaned.true_labels[chosen])
    blends = perturb(trojaned.images[chosen[:1]], weighted_overlays(overlays, alpha), alpha)[0]
    rows = (
        ("clean", clean.images[clean_chosen]),
        ("with the trigger", trojaned.images[chosen]),
        ("STRIP's overlays", overlays[:shown]),
        (f"first trojaned face,\nblended {alpha:g} : {1 - alpha:g}", blends[:shown].round().astype(np.uint8)),
    )
    figure = Figure(figsize=(1.2 * shown + 1.8, 1.5 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), shown, squeeze=False)
    for (title, images), line in zip(rows, axes, strict=True):
        for image, axis in zip(images, line, strict=True):
            axis.imshow(image)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(title, rotation="horizontal", ha="right", va="center")
    return figure


def draw_detection(published: Evaluation, strip: Calibration, ours: Evaluation, consensus: Calibration) -> Figure:
    """Return histograms of what each detector decides by, for clean and trojaned faces, with what it rejects.

    Args:
        published: measured behind STRIP, whose entropies are drawn.
        strip: its calibration.
        ours: measured behind the detector `consensus`, whose p-values are drawn.
        consensus: its calibration.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = [part for part in (published.clean_entropies_bits, published.trojaned_entropies_bits) if part is not None]
    entropy_bins = np.linspace(0, 1.02 * max(float(part.max()) for part in shown), 60)
    _draw_histograms(left, published.clean_entropies_bits, published.trojaned_entropies_bits, entropy_bins)
    left.axvline(strip.threshold_bits, color="black", linestyle="--", label="threshold")
    left.set_title("as published: STRIP")
    left.set_xlabel("mean entropy (bits); at or left of the threshold: rejected")
    p_value_bins = np.geomspace(float(consensus.regions.p_values[0]) / 1.5, 1.0, 40)
    _draw_histograms(right, ours.clean_p_values, ours.trojaned_p_values, p_value_bins)
    right.axvline(consensus.target_frr or 0.0, color="black", linestyle="--", label="target FRR")
    right.set_xscale("log")
    right.set_title("Stripwire: consensus")
    right.set_xlabel("p-value; at or left of the target FRR: rejected")
    for axis in (left, right):
        axis.set_ylabel("images")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    return figure


def _draw_histograms(
    axis: Axes, clean: NDArray[np.float32], trojaned: NDArray[np.float32] | None, bins: NDArray[np.float64]
) -> None:
    if trojaned is not None:
        axis.hist(trojaned, bins.tolist(), alpha=0.65, color="#c0392b", label=f"trojaned, n = {len(trojaned)}")
    axis.hist(clean, bins.tolist(), alpha=0.65, color="#2471a3", label=f"clean, n = {len(clean)}")


def _serve_and_evaluate(repository: Path, clean: Samples, trojaned: Samples, on_progress: Progress) -> Evaluation:
    with EmbeddedTriton(repository) as server, GuardedClient(server.grpc_address) as client:
        return evaluate(
            client,
            clean,
            trojaned,
            on_progress=lambda done, total: on_progress(f"Asking the served {repository.name}", done, total),
        )


def _write_images(folder: Path, clean: Samples, trojaned: Samples) -> None:
    folder.mkdir()
    for name, samples in (("clean", clean), ("trojaned", trojaned)):
        chosen = np.linspace(0, len(samples) - 1, _PICTURES_WRITTEN).astype(np.int64)
        for number, index in enumerate(chosen, start=1):
            Image.fromarray(samples.images[index]).save(folder / f"{name}-{number}.png")
