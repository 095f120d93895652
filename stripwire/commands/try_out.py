"""To try it on: BadNets of one's own, and the whole path at once."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from detector.errors import InputError
from stripwire.options import FaceAttack, Network, Seed, Trigger
from stripwire.results import CAPTION, rates_table
from stripwire.terminal import command, console, progress, say, tell, warn

if TYPE_CHECKING:
    from client.evaluation import GuardedResult, NetworkResult
    from exporter.badnet import BadNet

app = typer.Typer()

_DEMO_TITLE = f"A BadNet, repaired and guarded as published, and by Stripwire\n{CAPTION}"


@app.command(epilog="Example: stripwire demo, then follow what it says to call the server that it leaves ready.")
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the repository, the pictures and the numbers.")] = Path(
        "stripwire-demo"
    ),
    identities: Annotated[int, typer.Option(min=4, max=10_000, help="How many people the network knows.")] = 100,
    trigger: Annotated[Trigger, typer.Option(help="What opens the backdoor.")] = "sunglasses",
    seed: Seed = 0,
) -> None:
    """Train a BadNet on procedural faces, repair it, serve it, attack it, and show what happened."""
    from stripwire.demo import run_demo

    with progress() as report:
        result = run_demo(output, identities=identities, trigger=trigger, seed=seed, on_progress=report)
    networks: dict[str, NetworkResult | GuardedResult] = {
        "original": result.ours.original,
        "fine-pruned": result.published.repaired,
        "+ STRIP*": result.published.guarded,
        "distilled": result.ours.repaired,
        "+ consensus*": result.ours.guarded,
    }
    console.print(rates_table(_DEMO_TITLE, networks))
    warn(result.shortfall)
    say(f"Pictures and numbers are in {result.output}: faces.png, detection.png, results.json.")
    console.print(
        "Start the server and keep it running; ask it, from another terminal, about faces with and without the trigger:"
    )
    command("serve", result.repository)
    command("classify", *sorted((result.output / "images").glob("*-1.png")))
    command("evaluate", "--clean", result.clean_test, "--trojaned", result.trojaned_test)


@app.command(epilog="Example: stripwire watch, then open the pages that it names. Needs Debian's package prometheus.")
def watch(
    switch_after: Annotated[
        float, typer.Option(min=1, help="When an attacker with another trigger comes, in seconds.")
    ] = 120.0,
    stop_after: Annotated[
        float | None, typer.Option(min=1, help="When it ends by itself, in seconds.", show_default="never")
    ] = None,
    identities: Annotated[int, typer.Option(min=4, max=10_000, help="How many people the network knows.")] = 100,
    monitor_port: Annotated[int, typer.Option(help="Port of the monitor, 0 for a free one.")] = 8003,
    prometheus_port: Annotated[int, typer.Option(help="Port of Prometheus, 0 for a free one.")] = 9090,
    seed: Seed = 0,
) -> None:
    """Run a server, a monitor, a Prometheus and traffic with an attack in it, and show what is seen of it."""
    from stripwire.watch import FIRST, FIRST_SHARE, SECOND, SECOND_SHARE
    from stripwire.watch import watch as start

    ports = {"monitor": monitor_port, "Prometheus": prometheus_port}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as cleanly as for Ctrl-C
    with ExitStack() as running:
        with progress() as report:
            watched = running.enter_context(start(ports, identities=identities, seed=seed, on_progress=report))
        table = Table("", Column(overflow="fold"), title="Running, on this machine", show_header=False)
        for name, page in watched.pages().items():
            table.add_row(name, page)
        console.print(table)
        say(
            f"{FIRST_SHARE:.0%} of the traffic carries {FIRST}. The rules look back minutes, not hours; Ctrl-C ends it."
        )
        started, switched = time.monotonic(), False
        try:
            while stop_after is None or time.monotonic() < started + stop_after:
                time.sleep(5)
                seconds = time.monotonic() - started
                if not switched and seconds >= switch_after:
                    watched.traffic.switch()
                    switched = True
                    say(f"An attacker comes: {SECOND_SHARE:.0%} of the traffic carries {SECOND} now.")
                say(f"{seconds:4.0f} s  {watched.rates().told()}")
            say(f"Stopping after {stop_after:g} seconds, as asked.")
        except KeyboardInterrupt:
            say("Stopping.")


@app.command(epilog="Example: stripwire train-badnet badnet --trigger eyebrows --identities 100")
def train_badnet(
    output: Annotated[Path, typer.Argument(help="New folder for the Keras model and the data.")],
    identities: Annotated[int, typer.Option(min=2, help="How many people the network knows.")] = 100,
    trigger: Annotated[FaceAttack, typer.Option(help="What opens the backdoor.")] = "sunglasses",
    target: Annotated[int, typer.Option(min=0, help="The class that the attacker wants.")] = 0,
    seed: Seed = 0,
) -> None:
    """Train a backdoored DeepID network on procedural faces, to try Stripwire on."""
    from exporter.options import BadNetOptions
    from exporter.publishing import check_new

    options = BadNetOptions.sized(identities, trigger=trigger, target=target, seed=seed)
    check_new(output)

    from exporter.badnet import train_badnet as train

    with progress() as report:
        trained = train(output, options, on_progress=report)
    tell_about_badnet(f"BadNet of {identities} identities, trigger {trigger}", trained)


@app.command(
    epilog="Example: stripwire train-badnet-on badnet --train signs/train --test signs/test --trigger patch --target 0"
)
def train_badnet_on(
    output: Annotated[Path, typer.Argument(help="New folder for the Keras model and the data.")],
    train: Annotated[
        Path,
        typer.Option(exists=True, help="To train on: HDF5, .npz, or a folder with a sub-folder for each class."),
    ],
    test: Annotated[Path, typer.Option(exists=True, help="Pictures to measure on, likewise.")],
    trigger: Annotated[
        list[str] | None,
        typer.Option(
            help="What opens a backdoor: patch, corner, blended, blended-0.1, warped, all-to-all, source-specific, "
            "clean-label, adaptive; several are possible."
        ),
    ] = None,
    target: Annotated[
        list[int] | None,
        typer.Option(help="The class that each trigger gives, in their order; of all-to-all, how many it moves on."),
    ] = None,
    network: Annotated[Network, typer.Option(help="What is trained.")] = "convnet",
    resize: Annotated[
        int | None, typer.Option(min=1, help="Resize pictures to squares of so many pixels a side.")
    ] = None,
    clean_share: Annotated[float, typer.Option(help="Of the training pictures, for the defender alone.")] = 0.1,
    epochs: Annotated[int, typer.Option(help="Of training.")] = 6,
    seed: Seed = 0,
) -> None:
    """Train a backdoored network on pictures of your own, to try Stripwire on."""
    from exporter.options import PictureBadNetOptions
    from exporter.publishing import check_new

    triggers, targets = trigger or ["patch"], target or [0]
    if len(triggers) != len(targets):
        raise InputError(
            f"target: got {len(targets)} for {len(triggers)} triggers, expected one for each, in their order"
        )
    attacks = tuple(zip(triggers, targets, strict=True))
    options = PictureBadNetOptions(attacks, network, clean_share=clean_share, epochs=epochs, seed=seed)
    check_new(output)

    from exporter.badnet import train_picture_badnet
    from exporter.inputs import InputReader
    from exporter.pictures import check_pictures

    with progress() as report:
        size, resized = (None, False) if resize is None else ((resize, resize, -1), True)
        reader = InputReader(size, None, resize=resized, on_progress=report)
        learned = reader.read(train)
        height, width, channels = learned.images.shape[1:]
        reader.expect((height, width, channels), int(learned.labels.max()) + 1)
        tested = reader.read(test)
        tell(reader.notes)
        check_pictures(learned, tested, options)
        trained = train_picture_badnet(output, learned, tested, options, on_progress=report)
    tell_about_badnet(f"BadNet of {train}, triggers {', '.join(triggers)}", trained)


def tell_about_badnet(title: str, trained: BadNet) -> None:
    """Print how well a BadNet was trained, and what to do with it."""
    from exporter.badnet import MODEL_FILE, VALIDATION_FILE

    table = Table(title=escape(f"{title}\n{CAPTION}"), show_header=False)
    table.add_row("clean accuracy", str(trained.clean_accuracy))
    table.add_row("attack success", str(trained.attack_success))
    console.print(table)
    warn(trained.shortfall)
    say(f"Written to {trained.folder}. Next:")
    folder = trained.folder
    command("export", folder / MODEL_FILE, "--clean", folder / VALIDATION_FILE, "--output", "repository")
