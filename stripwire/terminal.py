"""What is printed: results on stdout, all else on stderr."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

console = Console()
errors = Console(stderr=True)

ReportProgress = Callable[[str, int, int], None]


@contextmanager
def progress() -> Iterator[ReportProgress]:
    """Yield what shows a progress bar for each description, gone when done; a line for each without a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def report(description: str, done: int, total: int) -> None:
            if description not in tasks:
                tasks[description] = bars.add_task(description, total=total)
                if not errors.is_terminal:
                    tell([f"{description} …"])
            bars.update(tasks[description], completed=done, total=total)
            for other, task in tasks.items():
                bars.update(task, visible=other == description)

        yield report


@contextmanager
def waiting(description: str) -> Iterator[None]:
    """Show what is waited for, gone when done; a line without a terminal."""
    if errors.is_terminal:
        with errors.status(description):
            yield
        return
    tell([description])
    yield


def tell(notes: Sequence[str]) -> None:
    """Print notes on stderr, a line each."""
    for note in notes:
        errors.print(note, markup=False, highlight=False)


def say(text: str) -> None:
    """Print text as it is."""
    console.print(text, markup=False, highlight=False)


def warn(text: str | None) -> None:
    """Print a warning on stderr, if there is one."""
    if text is not None:
        errors.print(f"warning: {text}", style="yellow", markup=False, highlight=False)


def command(*arguments: str | Path) -> None:
    """Print a command to copy: one that works in this shell, also where `stripwire` is not on its path."""
    program = ["stripwire"]
    if not shutil.which("stripwire"):
        program = [sys.executable, "-m", "stripwire"] if sys.argv[0].endswith("__main__.py") else [sys.argv[0]]
    line = shlex.join([*program, *map(str, arguments)])
    console.print(f"  {line}", style="bold", markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print JSON to stdout, undecorated."""
    typer.echo(json.dumps(value, indent=2))


def fail(message: str, status: int) -> None:
    """End with a message on stderr."""
    errors.print("error:", style="bold red", end=" ")
    errors.print(message, markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)
