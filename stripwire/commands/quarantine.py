"""Inputs that were rejected."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from detector.errors import InputError
from stripwire.connection import connect
from stripwire.options import Access, AsJson, FeedbackToken, Monitor, Timeout, Truth, with_access
from stripwire.terminal import console, progress, say, tell

app = typer.Typer(help="Look at inputs that were rejected, and say what they were.", no_args_is_help=True)


@app.command("list", epilog="Example: stripwire quarantine list --monitor http://127.0.0.1:8003")
def quarantine_list(
    monitor: Monitor = "http://127.0.0.1:8003",
    feedback_token: FeedbackToken = None,
    every: Annotated[bool, typer.Option("--all", help="Also those of which somebody has said what they are.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="The most inputs, the newest first.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List rejected inputs that the server has kept, the newest first."""
    from client.quarantine import QuarantineClient

    with QuarantineClient(monitor, feedback_token) as client:
        found = client.listing(limit=limit, labelled=every)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    console.print(rejected_table(found["inputs"]))
    say(f"{found['kept']} inputs are kept, {found['unlabelled']} not labelled. In a browser: {monitor}/quarantine")


@app.command("show", epilog="Example: stripwire quarantine show 7f3a.0 --output input.png")
def quarantine_show(
    request_id: Annotated[str, typer.Argument(help="Name of the input, as `list` and `classify --json` have it.")],
    output: Annotated[Path | None, typer.Option(help="PNG file for its image, which must not exist.")] = None,
    monitor: Monitor = "http://127.0.0.1:8003",
    feedback_token: FeedbackToken = None,
) -> None:
    """Show what is known of a rejected input, as JSON, and save its image."""
    from client.quarantine import QuarantineClient
    from samples.writing import check_new_file, whole_file

    if output is not None:
        check_new_file(output)
    with QuarantineClient(monitor, feedback_token) as client:
        about = client.find(request_id)
        typer.echo(json.dumps(about, indent=1))
        if output is not None:
            picture = client.picture(about["key"])
            with whole_file(output, mode=0o600) as file:
                file.write(picture)


@app.command("label", epilog="Example: stripwire quarantine label trojaned 7f3a.0 7f3b.0")
def quarantine_label(
    truth: Annotated[Truth, typer.Argument(help="What the inputs really were.")],
    request_ids: Annotated[list[str], typer.Argument(help="Names of the inputs, as `list` has them.")],
    monitor: Monitor = "http://127.0.0.1:8003",
    feedback_token: FeedbackToken = None,
) -> None:
    """Say what rejected inputs were; it counts as feedback, and what is recorded stays."""
    from client.quarantine import QuarantineClient

    with QuarantineClient(monitor, feedback_token) as client:
        keys = [client.find(request_id)["key"] for request_id in request_ids]  # or nothing is recorded
        new = sum(client.label(key, truth) for key in keys)
    known = len(request_ids) - new
    say(f"{new} recorded as {truth}" + (f", {known} had been before." if known else "."))


@app.command(
    "save",
    epilog="Example: stripwire quarantine save trojaned.npz --truth trojaned --label 0, then evaluate --trojaned",
)
@with_access
def quarantine_save(
    *,
    output: Annotated[Path, typer.Argument(help="Data file to write (.npz), which must not exist.")],
    request_ids: Annotated[
        list[str] | None,
        typer.Argument(help="Names of inputs, marked or not.", show_default="all that are marked as --truth says"),
    ] = None,
    truth: Annotated[Truth, typer.Option(help="What they were, as people have marked them.")] = "trojaned",
    label: Annotated[
        int | None,
        typer.Option(min=0, help="Label of all of them: of trojaned ones, the class that the attacker wants."),
    ] = None,
    monitor: Monitor = "http://127.0.0.1:8003",
    feedback_token: FeedbackToken = None,
    url: Annotated[
        str | None,
        typer.Option(help="host:port (gRPC) of a server: labels are what its original network answers to each."),
    ] = None,
    timeout: Timeout = 30.0,
    access: Access,
) -> None:
    """Save rejected inputs as a data file, pixel by pixel, for evaluate, export, calibrate and canaries."""
    import numpy as np

    from client.quarantine import QuarantineClient
    from samples.npz import write_npz
    from samples.types import Samples
    from samples.writing import check_new_file

    if label is not None and url is not None:
        raise InputError(f"label: got {label} and a server to ask for labels ({url}), expected one of them")
    if label is None and url is None and truth == "trojaned":
        raise InputError(
            "label: got none, expected the class that the attacker wants: --label CLASS, or --url of a server whose "
            "original network, which falls for the trigger, answers it. FAR does not depend on it, attack success does"
        )
    check_new_file(output, ".npz")
    with progress() as report, QuarantineClient(monitor, feedback_token) as client:
        found = client.evidence(truth, request_ids or (), lambda done, total: report("Fetching images", done, total))
        labels, said = found.labels, "what the repaired network answered, which is no measure of that network"
        if label is not None:
            labels, said = np.full_like(labels, label), f"{label}, as asked"
        if url is not None:
            with connect(url, timeout, access) as server:
                answers = server.original_probabilities(
                    found.images, on_progress=lambda done, total: report("Asking the original network", done, total)
                )
            labels, said = answers.argmax(axis=1), "what the original network answers, which is no measure of that one"
    tell(found.notes)
    write_npz(output, Samples(found.images, labels), mode=0o600)  # people's pictures, as in the quarantine
    say(f"{len(labels)} {truth} inputs written to {output}. Labels: {said}.")


@app.command("remove", epilog="Example: stripwire quarantine remove 7f3a.0")
def quarantine_remove(
    request_ids: Annotated[list[str], typer.Argument(help="Names of the inputs, as `list --all` has them.")],
    monitor: Monitor = "http://127.0.0.1:8003",
    feedback_token: FeedbackToken = None,
) -> None:
    """Remove rejected inputs for good, all of these names; what was said of them stays in the record."""
    from client.quarantine import QuarantineClient

    with QuarantineClient(monitor, feedback_token) as client:
        removed = client.remove(*request_ids)
    say(f"{removed} removed.")


def rejected_table(inputs: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of inputs in the quarantine, two lines each: so a request id stays whole at 80 columns."""
    longest = max((len(about["request_id"]) for about in inputs), default=0)
    room = console.width - 42  # beside what the other columns need
    ids = Column("request id", overflow="fold", width=max(len("request id"), min(longest, room)))
    others = ("rejected (UTC)\nby", "label\nwas", "entropy\n(bits)\np-value")
    table = Table(ids, *others, show_edge=False, padding=(0, 1, 0, 0))
    for about in inputs:
        rejected_at = datetime.fromtimestamp(about["rejected_at"], timezone.utc)
        bits = "" if about["entropy_bits"] is None else f"{about['entropy_bits']:.3g}"
        table.add_row(
            escape(about["request_id"]),
            f"{rejected_at:%Y-%m-%d %H:%M:%S}\n{', '.join(about['scores'])}",
            f"{about['label']}\n{about['truth'] or ''}",
            f"{bits}\n{about['p_value']:.2g}",
        )
    return table
