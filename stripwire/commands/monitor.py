"""Watching a server."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from detector.errors import InputError
from stripwire.connection import is_one_local_server
from stripwire.options import Access, ControlToken, Seed, with_access
from stripwire.terminal import command, progress, say, tell, warn

app = typer.Typer()


@app.command(epilog="Example: stripwire canaries clean.h5 trojaned.h5 --repository repository --output canaries.npz")
def canaries(
    clean: Annotated[
        Path, typer.Argument(exists=True, help="Clean images, as for export; none that the export has seen.")
    ],
    trojaned: Annotated[Path | None, typer.Argument(exists=True, help="Trojaned images, likewise.")] = None,
    output: Annotated[Path, typer.Option(help="Canary file for `stripwire monitor`.")] = Path("canaries.npz"),
    repository: Annotated[
        Path | None, typer.Option(help="What they are for: knows size, classes, and what its calibration promises.")
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Of the network, instead of --repository.")] = None,
    count: Annotated[int, typer.Option(min=1, help="The most of each kind; chosen by chance.")] = 100,
    resize: Annotated[bool, typer.Option("--resize", help="Resize images to what the network takes.")] = False,
    seed: Seed = 0,
) -> None:
    """Choose labelled images for the monitor to send to the server again and again."""
    from exporter.canaries import canaries_for, unused
    from exporter.inputs import InputReader
    from model_repository.manifest import read_manifest
    from samples.canaries import Canaries, choose_canaries, write_canaries

    if (repository is None) == (classes is None):
        raise InputError(
            "repository: got "
            + ("neither it nor classes" if classes is None else "classes as well")
            + ", expected one of them: --repository, which the images are for, or --classes, without any promises"
        )
    if trojaned is not None and trojaned.samefile(clean):
        raise InputError(f"trojaned: {trojaned} is what clean is, expected trojaned images")
    manifest = None if repository is None else read_manifest(repository)
    active = None if manifest is None else manifest["versions"][manifest["active"]]
    with progress() as report:
        shape, known = None, classes
        if active is not None:
            shape, known = tuple(active["contract"]["image_shape"]), active["contract"]["classes"]
        reader = InputReader(shape, known, resize=resize, on_progress=report)
        clean_images = reader.read(clean).images
        trojaned_images = None if trojaned is None else reader.read(trojaned).images
    tell(reader.notes)
    if manifest is not None and repository is not None:
        clean_images, notes = unused(clean_images, repository, manifest)
        tell(notes)
    images, truth = choose_canaries(clean_images, trojaned_images, count, seed)
    if manifest is None or active is None:
        chosen = Canaries(images, truth, classes or 0)
    else:
        chosen = canaries_for(manifest["active"], active, images, truth)
    write_canaries(output, chosen)
    if trojaned is None:
        warn("without trojaned canaries nobody sees the FAR, or a guard that accepts everything")
    say(f"{int((~truth).sum())} clean and {int(truth.sum())} trojaned canaries written to {output}. Next:")
    command("monitor", "--canaries", output)


@app.command(epilog="Example: stripwire monitor --canaries canaries.npz --record /data/feedback.sqlite")
@with_access
def monitor(
    *,
    canaries: Annotated[
        Path | None,
        typer.Option(help="Canary file (`stripwire canaries`), or a repository, whose active one is taken."),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="Database of feedback, made if there is none.", show_default="stripwire-feedback.sqlite"),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="host:port to listen on, port 0 for a free one.", show_default="127.0.0.1:8003")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="host:port of the server's gRPC endpoint.", show_default="127.0.0.1:8001")
    ] = None,
    canaries_per_minute: Annotated[
        float | None, typer.Option(help="How many canaries are sent.", show_default="60")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Longest wait for a canary's verdict, in seconds.", show_default="5")
    ] = None,
    reload_timeout: Annotated[
        float | None,
        typer.Option(help="Longest wait for a broken model to load again, in seconds.", show_default="120"),
    ] = None,
    dead_after: Annotated[
        float | None,
        typer.Option(help="How long canaries may fail before liveness does, in seconds.", show_default="120"),
    ] = None,
    quarantine: Annotated[
        Path | None, typer.Option(help="Folder where the server keeps what it rejects (its STRIPWIRE_QUARANTINE).")
    ] = None,
    metrics_url: Annotated[
        str | None, typer.Option(help="Triton's metrics, http://127.0.0.1:8002/metrics, to tell how entropies drift.")
    ] = None,
    feedback_token: Annotated[
        str | None,
        typer.Option(
            help="Lets its holder give feedback and see the quarantine; 16 characters or more.",
            show_default="nobody may",
        ),
    ] = None,
    control_token: ControlToken = None,
    access: Access,
) -> None:
    """Watch a server: send canaries, take feedback, heal broken models, and count it all for Prometheus.

    Whatever is not given is taken from the environment: --canaries-per-minute from STRIPWIRE_CANARIES_PER_MINUTE, and
    so on; --timeout, --reload-timeout and --dead-after from STRIPWIRE_TIMEOUT_SECONDS, and so on.
    """
    from client.monitor.logs import configure_logs
    from client.monitor.service import run_monitor
    from client.monitor.settings import read_settings
    from deploy.embedded.control_file import read_control_token
    from exporter.canaries import find_canaries

    settings = read_settings(
        canaries=canaries,
        record=record,
        quarantine=quarantine,
        metrics_url=metrics_url,
        listen=listen,
        url=url,
        canaries_per_minute=canaries_per_minute,
        timeout_seconds=timeout,
        reload_timeout_seconds=reload_timeout,
        dead_after_seconds=dead_after,
        feedback_token=feedback_token,
        control_token=control_token,
        **{**asdict(access), "tls": access.tls or None},
    )
    settings = settings.model_copy(update={"canaries": find_canaries(settings.canaries)})

    is_local = is_one_local_server(settings.url)

    def find_control_token() -> str | None:
        return read_control_token(settings.url.rpartition(":")[2]) if is_local else None

    configure_logs()
    run_monitor(settings, find_control_token)
