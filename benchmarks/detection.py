"""How well both defences do: what each repair leaves of an attack, and what STRIP lets through.

`python -m benchmarks.detection CASE --data DATA` measures a case and adds it to `benchmarks/results/CASE.json`; what is
there already, with the same network, split and options, is not measured again, so a run that was broken off goes on.
`python -m benchmarks.detection tables` prints what was measured as the tables of docs/results.md. DATA is described in
CONTRIBUTING.md; faces need none.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import keras
import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.gtsrb import read_gtsrb
from detector.calibration import calibrate, least_images
from detector.statistics import Proportion, auroc
from exporter.badnet import (
    MODEL_FILE,
    TEST_FILE,
    VALIDATION_FILE,
    BadNetOptions,
    PictureBadNetOptions,
    cached_badnet,
    cached_picture_badnet,
    trojaned_file,
)
from exporter.convert import sentinel_graph, to_onnx
from exporter.entropies import entropy_matrix, open_graph
from exporter.keras_files import load_model
from exporter.preprocessing import Preprocessing
from exporter.repair import REPAIRS, RepairOptions, repair_network
from exporter.splits import Split, split_clean
from exporter.training import score
from samples.hdf5 import read_hdf5
from samples.types import Samples

RESULTS = Path(__file__).parent / "results"
OVERLAYS = (10, 32, 100)
TARGETS = (0.01, 0.05)
ALPHAS = (0.5, 0.7)
SEED = 0

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Material:
    """What a case is measured on; no image is in two of its parts.

    Attributes:
        model: the network as it came.
        preprocessing: what it expects of pixels.
        split: the defender's clean data, with 100 overlays, or as many as there can be.
        clean: further clean images.
        trojaned: further images that carry a trigger, by trigger.
        repairs: what to measure.
    """

    model: keras.Model
    preprocessing: Preprocessing
    split: Split
    clean: Samples
    trojaned: dict[str, Samples]
    repairs: tuple[str, ...] = tuple(name for name in REPAIRS if name != "none")


def faces(identities: int) -> Callable[[Path | None, Report], Material]:
    """Return how to get a BadNet of so many procedural people."""
    options = BadNetOptions.sized(identities)

    def load(_: Path | None, report: Report) -> Material:
        return _trained(cached_badnet(options, on_progress=report).folder, (options.trigger,))

    return load


def signs(attacks: tuple[tuple[str, int], ...], network: str = "convnet") -> Callable[[Path | None, Report], Material]:
    """Return how to get a BadNet of traffic signs with these triggers and targets."""
    options = PictureBadNetOptions(attacks=attacks, network=network)

    def load(data: Path | None, report: Report) -> Material:
        train, test = read_gtsrb(_given(data) / "gtsrb32")
        folder = cached_picture_badnet(train, test, options, on_progress=report).folder
        return _trained(folder, tuple(trigger for trigger, _ in attacks))

    return load


def csaw(weights: str, scale: str) -> Callable[[Path | None, Report], Material]:
    """Return how to get a CSAW HackML 2020 BadNet; 170 clean faces are too few for 100 overlays, and for a repair."""

    def load(data: Path | None, _: Report) -> Material:
        folder = _given(data) / "csaw"
        clean, trojaned = read_hdf5(folder / "clean.h5"), read_hdf5(folder / "sunglasses_poisoned.h5")
        order = np.random.default_rng(SEED).permutation(len(clean))
        split = Split(*(clean.take(part) for part in np.split(order[:102], [32, 32, 102, 102])))
        model = load_model(folder / weights, architecture="deepid")
        return Material(model, Preprocessing(scale), split, clean.take(order[102:]), {"sunglasses": trojaned}, ())

    return load


CASES: dict[str, Callable[[Path | None, Report], Material]] = {
    "faces-100": faces(100),
    "faces-1283": faces(1283),
    "csaw-sunglasses": csaw("sunglasses_bd_weights.h5", "unit"),
    "csaw-lab3": csaw("lab3_bd_weights.h5", "raw"),
    "signs-patch": signs((("patch", 0),)),
    "signs-blended": signs((("blended", 0),)),
    "signs-two": signs((("patch", 0), ("corner", 1))),
    "signs-patch-resnet": signs((("patch", 0),), "resnet"),
}

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def run(
    case: Annotated[str, typer.Argument(help=f"One of {', '.join(CASES)}, `all`, or `tables`.")],
    data: Annotated[Path | None, typer.Option(help="Folder with csaw/ and gtsrb32/ in it.")] = None,
    images: Annotated[int, typer.Option(help="At most so many of each kind for STRIP, of 100 passes each.")] = 1000,
    repairs: Annotated[str, typer.Option(help="Measure only these repairs, with commas between.")] = "",
) -> None:
    """Measure a case, or print the tables."""
    if case == "tables":
        Console(soft_wrap=True).print(tables(), markup=False, highlight=False)
        return
    for name in CASES if case == "all" else (case,):
        if name not in CASES:
            raise typer.BadParameter(f"got {name!r}, expected one of {', '.join(CASES)}, all or tables")
        columns = (TextColumn(name), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), transient=True) as bars:
            task = bars.add_task("")

            def report(description: str, done: int, total: int) -> None:
                bars.update(task, description=description, completed=done, total=total)  # noqa: B023

            measure(name, data, images, tuple(filter(None, repairs.split(","))), report)


def measure(name: str, data: Path | None, images: int, only: tuple[str, ...], report: Report) -> None:
    """Measure what is not yet in the case's file, and write each figure there as soon as it is known."""
    material = CASES[name](data, report)
    file = RESULTS / f"{name}.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    key = {"network": _fingerprint(material.model), "test": material.clean.sha256(), "images": images}
    key |= {"alphas": list(ALPHAS), "overlays": list(OVERLAYS), "split": material.split.to_json()}
    if results.get("key") != key:
        results = {"key": key, "machine": platform.machine()}
        results["received"] = _rates(material.model, material)
        _save(file, results)
    if "strip" not in results:
        results["strip"] = _strip(material, images, report)
        _save(file, results)
    for method in only or material.repairs:
        options = RepairOptions(method=method, seed=SEED)
        if results.setdefault("repairs", {}).get(method, {}).get("options") != asdict(options):
            started = time.perf_counter()
            repaired = repair_network(
                material.model,
                material.split.repair,
                material.split.validation,
                preprocessing=material.preprocessing,
                options=options,
                on_progress=report,
            )
            results["repairs"][method] = {
                **_rates(repaired.model, material),
                "options": asdict(options),
                "kept": repaired.kept,
                "seconds": round(time.perf_counter() - started),
            }
            _save(file, results)


def _trained(folder: Path, triggers: tuple[str, ...]) -> Material:
    split = split_clean(
        read_hdf5(folder / VALIDATION_FILE),
        overlay_count=OVERLAYS[-1],
        least_calibration=least_images(TARGETS[0]),
        with_repair=True,
        seed=SEED,
    )
    return Material(
        model=load_model(folder / MODEL_FILE),
        preprocessing=Preprocessing("unit"),
        split=split,
        clean=read_hdf5(folder / TEST_FILE),
        trojaned={trigger: read_hdf5(folder / trojaned_file(trigger)) for trigger in triggers},
    )


def _rates(model: keras.Model, material: Material) -> dict[str, Any]:
    """Return clean accuracy, and of each trigger attack success and recovered accuracy."""
    rates: dict[str, Any] = {"clean_accuracy": score(model, material.clean, material.preprocessing).to_json()}
    for trigger, part in material.trojaned.items():
        success = score(model, part, material.preprocessing).to_json()
        recovered = None
        if part.true_labels is not None:
            recovered = score(model, Samples(part.images, part.true_labels), material.preprocessing).to_json()
        rates[trigger] = {"attack_success": success, "recovered_accuracy": recovered}
    return rates


def _strip(material: Material, images: int, report: Report) -> list[dict[str, Any]]:
    """Return AUROC, FAR and FRR for each weight of the input, number of overlays, target and trigger."""
    session = open_graph(sentinel_graph(to_onnx(material.model), material.preprocessing).SerializeToString())
    overlays = material.split.overlays.images
    rows = []
    for alpha in ALPHAS:

        def entropies(samples: Samples, alpha: float = alpha) -> NDArray[np.float32]:
            return entropy_matrix(session, samples.images, overlays, alpha, report)

        calibration, clean = entropies(material.split.calibration), entropies(_some(material.clean, images))
        for trigger, part in material.trojaned.items():
            trojaned = entropies(_some(part, images))
            for count in (count for count in OVERLAYS if count <= len(overlays)):
                means = [matrix[:, :count].mean(axis=1) for matrix in (calibration, clean, trojaned)]
                area = auroc(-means[1], -means[2])
                row = {"alpha": alpha, "overlays": count, "trigger": trigger, "auroc": area}
                rows.append(row | {f"at_{target:g}": _errors(means, target) for target in TARGETS})
    return rows


def _errors(entropies: list[NDArray[np.float32]], target: float) -> dict[str, Any] | None:
    """Return FAR and FRR of the threshold for a target FRR; None where the calibration images are too few for it."""
    calibration, clean, trojaned = entropies
    if len(calibration) < least_images(target):
        return None
    threshold = calibrate(calibration, target).threshold_bits
    accepted = Proportion(int(np.count_nonzero(trojaned > threshold)), len(trojaned))
    rejected = Proportion(int(np.count_nonzero(clean <= threshold)), len(clean))
    return {"far": accepted.to_json(), "frr": rejected.to_json(), "threshold_bits": threshold}


def _some(samples: Samples, count: int) -> Samples:
    return samples.take(np.sort(np.random.default_rng(SEED).permutation(len(samples))[:count]))


def _given(data: Path | None) -> Path:
    if data is None:
        raise typer.BadParameter("this case needs --data, the folder with csaw/ and gtsrb32/ in it")
    return data


def _fingerprint(model: keras.Model) -> str:
    weights = np.concatenate([weight.ravel() for weight in model.get_weights()]).astype(np.float64)
    return f"{len(weights)}:{weights.sum():.9g}:{np.abs(weights).sum():.9g}"


def _save(file: Path, results: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    part = file.with_suffix(".partial")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def tables() -> str:
    """Return what was measured as Markdown."""
    found = {name: RESULTS / f"{name}.json" for name in CASES}
    results = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in found.items() if file.is_file()}
    return "\n\n".join([_repair_table(results), *(_strip_table(name, results[name]) for name in results)])


def _repair_table(results: dict[str, Any]) -> str:
    lines = ["| case | repair | clean accuracy | trigger | attack success | recovered accuracy | minutes |"]
    lines.append("|---|---|---|---|---|---|---|")
    for case, result in results.items():
        for repair, rates in {"as received": result["received"], **result.get("repairs", {})}.items():
            minutes = f"{rates['seconds'] / 60:.0f}" if "seconds" in rates else ""
            for trigger, attack in rates.items():
                if isinstance(attack, dict) and "attack_success" in attack:
                    cells = [rates["clean_accuracy"], attack["attack_success"], attack["recovered_accuracy"]]
                    clean, success, recovered = map(_figure, cells)
                    lines.append(f"| {case} | {repair} | {clean} | {trigger} | {success} | {recovered} | {minutes} |")
    return "\n".join(lines)


def _strip_table(case: str, result: dict[str, Any]) -> str:
    lines = [f"**{case}**", "", "| alpha | N | trigger | AUROC | FAR at 1 % | FRR then | FAR at 5 % | FRR then |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in result.get("strip", []):
        cells = []
        for target in TARGETS:
            errors = row[f"at_{target:g}"]
            cells += [_figure(errors["far"]), _figure(errors["frr"])] if errors else ["too few images", ""]
        start = f"| {row['alpha']:g} | {row['overlays']} | {row['trigger']} | {row['auroc']:.3f} | "
        lines.append(start + " | ".join(cells) + " |")
    return "\n".join(lines)


def _figure(rate: dict[str, Any] | None) -> str:
    return "-" if rate is None else str(Proportion(rate["successes"], rate["count"]))


if __name__ == "__main__":
    app()
