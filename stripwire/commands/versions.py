"""The versions of a repository, and which of them is served."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detector.errors import ServerError, StripwireError
from stripwire.connection import controlled
from stripwire.options import (
    Access,
    AsJson,
    CalibrationMethod,
    ControlTimeout,
    ControlToken,
    Detector,
    Exported,
    OverlayChoice,
    RunningServer,
    Seed,
    Url,
    check_aim,
    overlay_count,
    with_access,
)
from stripwire.results import blends, doubts, rejections, thresholds
from stripwire.terminal import command, console, print_json, progress, say, tell, waiting, warn

if TYPE_CHECKING:
    from client.control import ModelControl

app = typer.Typer()


@app.command(epilog="Example: stripwire calibrate repository --clean new_clean_data.h5 --url 127.0.0.1:8001")
@with_access
def calibrate(
    *,
    repository: Exported,
    clean: Annotated[
        Path, typer.Option(exists=True, help="New clean images: HDF5, npz or a folder; labels are not used.")
    ],
    resize: Annotated[bool, typer.Option("--resize", help="Resize images to what the network takes.")] = False,
    detector: Annotated[
        Detector | None,
        typer.Option(help="All that was found to tell trojaned inputs, or STRIP alone.", show_default="as it is"),
    ] = None,
    target_frr: Annotated[
        float | None,
        typer.Option(
            help="Share of clean inputs that may be rejected, 0..1.",
            show_default="that of the active version; 0.05 where it does not say",
        ),
    ] = None,
    threshold_bits: Annotated[
        float | None, typer.Option(help="Entropy threshold to use as it is, instead of --target-frr.")
    ] = None,
    calibration_method: Annotated[
        CalibrationMethod | None,
        typer.Option(
            help="quantile keeps the target FRR on average; normal is the STRIP paper's, without that promise; "
            "fixed takes --threshold-bits.",
            show_default="fixed with --threshold-bits, else normal where it is, or quantile",
        ),
    ] = None,
    overlays: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Overlays to take from the new images; auto, with greedy, as many as clean images say.",
            show_default="as many as there are",
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Weight of the input in the blend.", show_default="as it is; of another detector, what export has"
        ),
    ] = None,
    overlay_choice: Annotated[
        OverlayChoice | None,
        typer.Option(help="Chance, or the best of a pool.", show_default="that of the active version"),
    ] = None,
    keep_overlays: Annotated[
        bool, typer.Option("--keep-overlays", help="Keep overlays and alpha: only the threshold is new.")
    ] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
    url: RunningServer = None,
    control_token: ControlToken = None,
    timeout: ControlTimeout = 120.0,
    access: Access,
) -> None:
    """Calibrate the guard again on new clean images: a new version with the same networks."""
    from exporter.recalibration import RecalibrationOptions, recalibrate

    check_aim(target_frr, threshold_bits, overlay_choice)
    options = RecalibrationOptions(
        method=calibration_method,
        target_frr=target_frr,
        threshold_bits=threshold_bits,
        detector=detector,
        overlays=None if overlays is None else overlay_count(overlays),
        alpha=alpha,
        overlay_choice=overlay_choice,
        resize=resize,
        keep_overlays=keep_overlays,
        seed=seed,
    )
    with controlled(url, control_token, timeout, access, repository) as control:
        with progress() as report:
            result = recalibrate(repository, clean, options, on_progress=report)
        served = switch(control, repository, back_to=result.base)
    tell(result.notes)
    for doubt in (*result.doubts, *doubts(result.calibration, detector)):
        warn(doubt)
    if as_json:
        written = {"repository": str(repository), "version": result.version, "served": served}
        print_json({**written, **result.provenance})
        return
    calibration = result.calibration
    console.print(
        f"Threshold {result.base_threshold_bits:.4g} -> {thresholds(calibration)}; of {calibration.images} clean "
        f"images it rejects {calibration.calibration_frr:.1%}: {rejections(calibration)}."
    )
    say(blends(result.provenance["options"], kept=keep_overlays))
    say(f"Version {result.version}, written to {repository}, is active in place of {result.base}.")
    tell_how_to_switch(repository, served)


@app.command(epilog="Example: stripwire rollback repository --url 127.0.0.1:8001")
@with_access
def rollback(
    *,
    repository: Exported,
    to: Annotated[
        str | None,
        typer.Option(help="Number of the version to go to, back or forth.", show_default="the one before"),
    ] = None,
    as_json: AsJson = False,
    url: RunningServer = None,
    control_token: ControlToken = None,
    timeout: ControlTimeout = 120.0,
    access: Access,
) -> None:
    """Go back to the version before, or to any other; no version is lost."""
    from exporter.publishing import locked
    from exporter.repository import activate
    from model_repository.manifest import read_manifest

    with controlled(url, control_token, timeout, access, repository) as control:
        with locked(repository):
            before = read_manifest(repository)["active"]
        active = activate(repository, to)
        served = switch(control, repository, back_to=before)
    if as_json:
        print_json({"repository": str(repository), "version": active, "served": served})
        return
    say(f"Version {active} of {repository} is active.")
    tell_how_to_switch(repository, served)


@app.command(epilog="Example: stripwire reload repository --url 127.0.0.1:8001")
@with_access
def reload(
    *,
    repository: Exported,
    as_json: AsJson = False,
    url: Url = "127.0.0.1:8001",
    control_token: ControlToken = None,
    timeout: ControlTimeout = 120.0,
    access: Access,
) -> None:
    """Have a running server serve the repository's active version: no restart, no failed request."""
    with controlled(url, control_token, timeout, access, repository) as control:
        served = switch(control, repository)
    if as_json:
        print_json({"repository": str(repository), "version": served, "served": served})
        return
    tell_how_to_switch(repository, served)


def switch(control: ModelControl | None, repository: Path, back_to: str | None = None) -> str | None:
    """Have the server, if there is one to tell, serve the active version; return what it serves then.

    Where it cannot, `back_to`, the version that was active before, is made active again: a server that is started next
    would not come up with the other one either.
    """
    from exporter.publishing import locked
    from model_repository.manifest import verify_repository

    if control is None:
        return None
    with locked(repository), waiting("The server loads the version …"):
        manifest = verify_repository(repository)
        active: str = manifest["active"]
        try:
            control.switch(active, manifest["versions"])
        except ServerError as error:
            if back_to in (None, active):
                raise
            raise ServerError(f"{error}\n{went_back(repository, manifest, back_to)}") from error
    return active


def went_back(repository: Path, manifest: dict[str, Any], version: str) -> str:
    """Make a version active again, and say so; where that fails, say what to do."""
    from exporter.repository import make_active

    try:
        make_active(repository, manifest, version)
    except (StripwireError, OSError) as error:
        line = shlex.join(["stripwire", "rollback", str(repository), "--to", version])
        return f"Version {manifest['active']} is still active in {repository} ({error}); to go back: {line}"
    return f"Version {version} is active in {repository} again; version {manifest['active']} stays in it, not active."


def tell_how_to_switch(repository: Path, served: str | None) -> None:
    """Say what the server serves, or how a running one is told."""
    if served is not None:
        say(f"The server serves version {served}. A monitor of it goes by the version before until it is started anew.")
        return
    say("A running server goes on with the version that it has until it is told:")
    command("reload", repository, "--url", "127.0.0.1:8001")
