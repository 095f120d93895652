"""The command line, put together."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from stripwire.commands import ask, export, feedback, monitor, quarantine, serve, try_out, versions

app = typer.Typer(
    help="A tripwire for trojaned inputs: repairs a backdoored Keras classifier, serves it with a verdict on inputs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes cut the names of options off on a narrow terminal
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("stripwire"))
        raise typer.Exit


@app.callback()
def every_command(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Hold the options that come before a command."""


for commands in (try_out, export, serve, versions, ask, monitor):
    app.add_typer(commands.app)
app.add_typer(quarantine.app, name="quarantine")
app.add_typer(feedback.app, name="feedback")
