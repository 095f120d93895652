"""The command; see the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import benchmarks.detection
from benchmarks.detection.cases import CASES
from benchmarks.detection.measure import measure
from benchmarks.detection.tables import read_results, tables, write_csv

RESULTS = Path(__file__).parents[1] / "results"

app = typer.Typer(add_completion=False, help=benchmarks.detection.__doc__)


@app.command()
def run(
    case: Annotated[str, typer.Argument(help=f"One of {', '.join(CASES)}, `all`, or `tables`.")],
    data: Annotated[Path | None, typer.Option(help="Folder with csaw/ and gtsrb32/ in it.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Detectors judge at most so many of each kind.")] = 1000,
    repairs: Annotated[str, typer.Option(help="Measure only these repairs, with commas between.")] = "",
    output: Annotated[Path, typer.Option(help="Folder for what is measured.")] = RESULTS,
) -> None:
    """Measure a case, or print the tables."""
    if case == "tables":
        results = read_results(output)
        write_csv(output, results)
        Console(soft_wrap=True).print(tables(results), markup=False, highlight=False)
        return
    for name in CASES if case == "all" else (case,):
        if name not in CASES:
            raise typer.BadParameter(f"got {name!r}, expected one of {', '.join(CASES)}, all or tables")
        columns = (TextColumn(name), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), transient=True) as bars:
            task = bars.add_task("")

            def report(description: str, done: int, total: int) -> None:
                bars.update(task, description=description, completed=done, total=total)  # noqa: B023

            material = CASES[name](data, report)
            only = tuple(filter(None, repairs.split(",")))
            measure(material, output / f"{name}.json", images=images, only=only, report=report)


if __name__ == "__main__":
    app()
