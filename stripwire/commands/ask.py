"""Asking a server: for verdicts, and how good they are."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from detector.errors import InputError
from stripwire.connection import connect
from stripwire.options import Access, AsJson, Timeout, Url, with_access
from stripwire.results import CAPTION, rates_table
from stripwire.terminal import console, print_json, progress, tell, warn

if TYPE_CHECKING:
    from client.evaluation import GuardedResult, NetworkResult

app = typer.Typer()


@app.command(epilog="Example: stripwire classify face.png --url 127.0.0.1:8001 --resize")
@with_access
def classify(
    *,
    files: Annotated[
        list[Path], typer.Argument(exists=True, dir_okay=False, help="Images: png, jpg, bmp, ppm, webp, npy or HDF5.")
    ],
    url: Url = "127.0.0.1:8001",
    resize: Annotated[bool, typer.Option("--resize", help="Resize images to what the model takes.")] = False,
    shared_memory: Annotated[
        bool, typer.Option("--shared-memory", help="Hand images to a server on this machine through /dev/shm.")
    ] = False,
    as_json: AsJson = False,
    timeout: Timeout = 30.0,
    access: Access,
) -> None:
    """Classify image files through the server, with a verdict on each."""
    from samples.files import load_images

    with progress() as report, connect(url, timeout, access) as client:
        about = client.metadata()
        loaded = load_images(files, size=about.image_shape, resize=resize)
        verdicts = client.classify(
            loaded.images,
            shared_memory=shared_memory,
            on_progress=lambda done, total: report("Classifying", done, total),
        )
    tell(loaded.notes)
    if as_json:
        rows = [{"name": name, **asdict(verdict)} for name, verdict in zip(loaded.names, verdicts, strict=True)]
        print_json(rows)
        return
    table = Table(Column("image", overflow="fold"), "label", "verdict", "mean entropy (bits)", "p-value")
    for name, verdict in zip(loaded.names, verdicts, strict=True):
        shown = "[red]trojaned[/red]" if verdict.trojaned else "[green]accepted[/green]"
        label = "blocked" if verdict.label == about.classes else str(verdict.label)
        table.add_row(escape(name), label, shown, f"{verdict.entropy_bits:.3f}", f"{verdict.p_value:.2g}")
    console.print(table)


@app.command(epilog="Example: stripwire evaluate --clean clean_test_data.h5 --trojaned sunglasses_poisoned_data.h5")
@with_access
def evaluate(
    *,
    clean: Annotated[
        Path,
        typer.Option(exists=True, help="Clean labelled images, as for export; none that the export has seen."),
    ],
    trojaned: Annotated[
        Path | None,
        typer.Option(exists=True, help="Trojaned images, likewise; their label is the attacker's class."),
    ] = None,
    resize: Annotated[bool, typer.Option("--resize", help="Resize images to what the model takes.")] = False,
    url: Url = "127.0.0.1:8001",
    as_json: AsJson = False,
    timeout: Timeout = 30.0,
    access: Access,
) -> None:
    """Measure accuracy, attack success, FAR and FRR through the server, with 95 % intervals."""
    from client.evaluation import evaluate as run_evaluation
    from exporter.inputs import InputReader

    if trojaned is not None and trojaned.samefile(clean):
        raise InputError(f"trojaned: {trojaned} is what --clean is, expected trojaned images")
    with progress() as report, connect(url, timeout, access) as client:
        about = client.metadata()
        reader = InputReader(about.image_shape, about.classes, resize=resize, on_progress=report)
        clean_samples = reader.read(clean)
        trojaned_samples = None if trojaned is None else reader.read_attack(trojaned)
        result = run_evaluation(
            client,
            clean_samples,
            trojaned_samples,
            on_progress=lambda done, total: report("Evaluating", done, total),
        )
    tell(reader.notes)
    if as_json:
        print_json(result.to_json())
        return
    networks: dict[str, NetworkResult | GuardedResult] = {
        "original": result.original,
        "repaired": result.repaired,
        "guarded*": result.guarded,
    }
    console.print(rates_table(escape(f"Through {url}\n{CAPTION}"), networks))
    if result.auroc is not None and result.auroc_of_p_value is not None:
        told = []
        for area in (result.auroc, result.auroc_of_p_value):
            low, high = result.interval(area)
            told.append(f"{area:.4f} ({low:.4f}-{high:.4f})")
        console.print(f"AUROC (95 %) of the mean entropy: {told[0]}; of the p-value: {told[1]}")
    if result.auroc is not None and max(result.auroc, result.auroc_of_p_value or 0.0) < 0.5:
        warn(
            "the guard does not tell trojaned images from clean ones: it does not see the trigger, or --clean and "
            "--trojaned are swapped"
        )
