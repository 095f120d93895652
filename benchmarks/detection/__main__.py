"""The command; see the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import benchmarks.detection
from benchmarks.detection.cases import CASES, JOINED, QUICK, QUICK_IMAGES
from benchmarks.detection.measure import measure
from benchmarks.detection.plots import draw
from benchmarks.detection.tables import read_results, rows, tables, write_csv

RESULTS = Path(__file__).parents[1] / "results"

app = typer.Typer(add_completion=False, help=benchmarks.detection.__doc__)


@app.command()
def run(
    case: Annotated[str, typer.Argument(help=f"One of {', '.join(CASES)}, `all`, or `tables`.")],
    data: Annotated[Path | None, typer.Option(help="Folder with csaw/ and gtsrb32/ in it.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Detectors judge at most so many of each kind.")] = 1000,
    repairs: Annotated[str, typer.Option(help="Measure only these repairs, with commas between.")] = "",
    output: Annotated[Path, typer.Option(help="Folder for what is measured.")] = RESULTS,
    quick: Annotated[
        bool, typer.Option(help="With `all`: a few cases on few images, in minutes; into another --output.")
    ] = False,
) -> None:
    """Measure a case, or print the tables."""
    if case == "tables":
        results = read_results(output)
        write_csv(output, results)
        draw(output, rows(results))
        Console(soft_wrap=True).print(tables(results), markup=False, highlight=False)
        return
    if quick and output.resolve() == RESULTS.resolve():
        raise typer.BadParameter("--quick measures on too few images for the results that are kept; give an --output")
    if case not in (*CASES, "all"):
        raise typer.BadParameter(f"got {case!r}, expected one of {', '.join(CASES)}, all or tables")
    names = (case,) if case != "all" else QUICK if quick else tuple(CASES)
    columns = (TextColumn("{task.fields[case]}"), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), transient=True) as bars:
        cases = bars.add_task("cases", total=len(names), case="all:", visible=len(names) > 1)
        task = bars.add_task("", case="")

        def report(description: str, done: int, total: int) -> None:
            bars.update(task, description=description, completed=done, total=total)

        for name in names:
            bars.update(task, case=name)
            material = CASES[name].material(data, report)
            if quick:
                material = replace(material, repairs=JOINED if material.repairs else (), sweep=False)
            only = tuple(filter(None, repairs.split(",")))
            most = min(images, QUICK_IMAGES) if quick else images
            measure(material, output / f"{name}.json", images=most, only=only, report=report)
            bars.advance(cases)


if __name__ == "__main__":
    app()
