"""What a monitor was told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from detector.errors import StripwireError
from stripwire.options import FeedbackToken, Monitor
from stripwire.terminal import progress, say, tell, waiting

app = typer.Typer(help="Save what a monitor was told, and load it into one again.", no_args_is_help=True)


@app.command("save", epilog="Example: stripwire feedback save feedback-2026-01-31.jsonl")
def feedback_save(
    file: Annotated[Path, typer.Argument(help="File to write, a line of JSON for each; it must not exist.")],
    monitor: Monitor = "http://127.0.0.1:8003",
    feedback_token: FeedbackToken = None,
) -> None:
    """Save all feedback of a running monitor, in the order in which it came."""
    from client.feedback import FeedbackClient
    from samples.writing import check_new_file, whole_file

    check_new_file(file)
    count = 0
    with FeedbackClient(monitor, feedback_token) as client, waiting("Saving feedback …"), whole_file(file) as written:
        for line in client.saved():
            written.write(f"{line}\n".encode())
            count += 1
    say(f"Feedback on {count} images written to {file}.")


@app.command("load", epilog="Example: stripwire feedback load feedback-2026-01-31.jsonl")
def feedback_load(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What `save` wrote.")],
    monitor: Monitor = "http://127.0.0.1:8003",
    feedback_token: FeedbackToken = None,
) -> None:
    """Give a monitor feedback that was saved; what it knows already counts once, and what it knows otherwise stays."""
    from client.feedback import FeedbackClient, read_saved
    from client.monitor.record import Added

    total = sum(1 for _ in read_saved(file))  # or nothing is given
    counts = dict.fromkeys(Added, 0)
    with FeedbackClient(monitor, feedback_token) as client, progress() as report:
        for done, feedback in enumerate(read_saved(file), start=1):
            try:
                added = client.give(feedback)
            except StripwireError:
                tell([f"{done - 1} of {total} were given: load the file again, which counts nothing twice"])
                raise
            counts[added] += 1
            if added is Added.CONFLICT:
                tell([f"{feedback.request_id}: the record says otherwise than {feedback.truth}, {feedback.verdict}"])
            report("Giving feedback", done, total)
    say(f"{counts[Added.NEW]} new, {counts[Added.KNOWN]} known before, {counts[Added.CONFLICT]} recorded otherwise.")
    if counts[Added.CONFLICT]:
        raise typer.Exit(1)
