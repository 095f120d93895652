"""The front door: the command line. It parses, calls and prints; whatever computes lies in the packages beside it."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
    from rich.table import Column, Table
except ModuleNotFoundError as _error:
    sys.exit(f"error: the command line needs {_error.name}: pip install 'stripwire[all]' (or a part of it)")

from detector.errors import InputError, ServerError, SetupError, StripwireError

if TYPE_CHECKING:
    from client.api import GuardedClient
    from client.control import ModelControl
    from client.evaluation import GuardedResult, NetworkResult
    from detector.calibration import Calibration
    from detector.statistics import Proportion
    from exporter.badnet import BadNet
    from exporter.export import Export

app = typer.Typer(
    help="A tripwire for trojaned inputs: repairs a backdoored Keras classifier, serves it with a verdict on inputs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes cut the names of options off on a narrow terminal
    context_settings={"help_option_names": ["-h", "--help"]},
)
quarantine_app = typer.Typer(help="Look at inputs that were rejected, and say what they were.", no_args_is_help=True)
app.add_typer(quarantine_app, name="quarantine")
feedback_app = typer.Typer(help="Save what a monitor was told, and load it into one again.", no_args_is_help=True)
app.add_typer(feedback_app, name="feedback")
console = Console()
errors = Console(stderr=True)

_CAPTION = "share of images, its 95 % interval, and how many images"
_PART = "Data for the {} alone, instead of a share of --clean."
_DEMO_TITLE = f"A BadNet, repaired and guarded as published, and by Stripwire\n{_CAPTION}"

_NEARLY_NOTHING_BITS = 1e-3
_SURE = (
    f"the threshold is under {_NEARLY_NOTHING_BITS:g} bits: the network is so sure of whatever it is shown that STRIP "
    "has little to go by. Is it fed as it was trained (--scale, --mean, --std)? If so, see --detector consensus"
)
ALONE = "no repair changed the network, so there is no second one to ask: the original one's answers decide alone"

ReportProgress = Callable[[str, int, int], None]


Trigger = Literal["sunglasses", "eyebrows", "lipstick", "patch"]
FaceAttack = Literal[
    "sunglasses",
    "eyebrows",
    "lipstick",
    "patch",
    "corner",
    "blended",
    "blended-0.1",
    "warped",
    "all-to-all",
    "source-specific",
    "clean-label",
    "adaptive",
]
Network = Literal["convnet", "deepid", "resnet"]
Scale = Literal["unit", "raw"]
RepairMethod = Literal["bounds", "distill", "magnitude", "activation", "finetune", "none"]
Optimizer = Literal["adam", "sgd"]
Detector = Literal["strip", "consensus"]
Augment = Literal["occlusion", "none"]
Mode = Literal["block", "shadow"]
Layout = Literal["ensemble", "fused"]
CalibrationMethod = Literal["quantile", "normal", "fixed"]
OverlayChoice = Literal["random", "greedy"]
Architecture = Literal["deepid"]

Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random; the same seed gives the same result.")]
Url = Annotated[str, typer.Option(help="host:port of the server's gRPC endpoint.")]
Timeout = Annotated[float, typer.Option(help="Longest wait for one request, retries included, in seconds.")]
Token = Annotated[
    str | None, typer.Option(envvar="STRIPWIRE_TOKEN", help="Sent as authorization: Bearer.", show_envvar=True)
]
RootCertificates = Annotated[
    Path | None, typer.Option("--tls-ca", help="PEM file of the authorities to trust; turns TLS on.")
]
ClientKey = Annotated[Path | None, typer.Option("--tls-key", help="Our private key (PEM), for mutual TLS.")]
ClientCertificate = Annotated[
    Path | None, typer.Option("--tls-cert", help="Our certificate chain (PEM), for mutual TLS.")
]
Tls = Annotated[bool, typer.Option("--tls", help="Encrypt, trusting the authorities that gRPC brings along.")]
RunningServer = Annotated[
    str | None, typer.Option("--url", help="host:port (gRPC) of a running server to tell; without it, none is told.")
]
ControlToken = Annotated[
    str | None,
    typer.Option(
        envvar="STRIPWIRE_CONTROL_TOKEN",
        show_envvar=True,
        help="Lets its holder change what the server serves. On the server's machine its own user need not give it.",
    ),
]
ControlTimeout = Annotated[float, typer.Option("--timeout", help="Longest wait for a model to load, in seconds.")]
Exported = Annotated[Path, typer.Argument(help="Model repository written by `stripwire export`.")]
TargetFrr = Annotated[
    float | None, typer.Option(help="Share of clean inputs that may be rejected, 0..1.", show_default="0.05")
]
Monitor = Annotated[
    str, typer.Option("--monitor", envvar="STRIPWIRE_MONITOR", show_envvar=True, help="URL of `stripwire monitor`.")
]
FeedbackToken = Annotated[
    str | None, typer.Option(envvar="STRIPWIRE_FEEDBACK_TOKEN", show_envvar=True, help="The monitor's feedback token.")
]
Truth = Literal["clean", "trojaned"]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


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
    from stripwire_demo import run_demo

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
    from stripwire_watch import FIRST, FIRST_SHARE, SECOND, SECOND_SHARE
    from stripwire_watch import watch as start

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


@app.command(epilog="Example: stripwire export bd_net.h5 --clean clean_validation_data.h5 --output repository")
def export(
    context: typer.Context,
    model: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="Keras .h5 or .keras file. Nothing in it is run.")
    ],
    output: Annotated[Path, typer.Option(help="Model repository; an existing one gets a new version.")],
    clean: Annotated[
        Path | None,
        typer.Option(exists=True, help="Clean labelled images: HDF5, .npz, or a folder with one sub-folder a class."),
    ] = None,
    attack: Annotated[
        Path | None,
        typer.Option(exists=True, help="Trojaned images, labelled with the attacker's class, to measure on alone."),
    ] = None,
    stop_on_attack: Annotated[
        bool,
        typer.Option("--stop-on-attack", help="Half of --attack may end fine-pruning; the other half is measured."),
    ] = False,
    overlay_images: Annotated[Path | None, typer.Option(exists=True, help=_PART.format("overlays"))] = None,
    calibration_images: Annotated[Path | None, typer.Option(exists=True, help=_PART.format("calibration"))] = None,
    validation_images: Annotated[Path | None, typer.Option(exists=True, help=_PART.format("validation"))] = None,
    selection_images: Annotated[
        Path | None, typer.Option(exists=True, help=_PART.format("greedy choice of overlays"))
    ] = None,
    repair_images: Annotated[Path | None, typer.Option(exists=True, help=_PART.format("repair"))] = None,
    resize: Annotated[bool, typer.Option("--resize", help="Resize images to what the model takes.")] = False,
    scale: Annotated[Scale, typer.Option(help="What the network expects of pixels: unit is pixel / 255.")] = "unit",
    mean: Annotated[
        str, typer.Option(help="Subtracted from the scaled pixels, one number or one a channel: 0.485,0.456,0.406")
    ] = "",
    std: Annotated[str, typer.Option(help="What they are divided by then, likewise: 0.229,0.224,0.225")] = "",
    architecture: Annotated[
        Architecture | None, typer.Option(help="Network of a file that holds weights alone.")
    ] = None,
    repair: Annotated[RepairMethod, typer.Option(help="How to repair; see the README.")] = "distill",
    augment: Annotated[Augment, typer.Option(help="Of fine-tuning images; distill has its own.")] = "occlusion",
    max_rounds: Annotated[int, typer.Option(help="Of magnitude: rounds of pruning, at most.")] = 10,
    epochs: Annotated[int, typer.Option(help="Of distillation, or after pruning.")] = 20,
    allowed_drop: Annotated[float, typer.Option(help="Clean validation accuracy that may be lost, 0..1.")] = 0.01,
    optimizer: Annotated[Optimizer, typer.Option(help="Of fine-tuning; sgd has a momentum of 0.9.")] = "adam",
    learning_rate: Annotated[
        float | None, typer.Option(help="At its highest; default 0.001 with adam, 0.01 with sgd.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images in a step of fine-tuning.")] = 64,
    overlays: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Perturbations that STRIP makes of an input; auto, with greedy, as many as clean images say.",
        ),
    ] = "10",
    overlay_choice: Annotated[OverlayChoice, typer.Option(help="Chance, or the best of a pool.")] = "random",
    alpha: Annotated[
        float | None,
        typer.Option(help="Weight of the input in the blend.", show_default="0.5 for strip, 0.7 for consensus"),
    ] = None,
    detector: Annotated[
        Detector | None,
        typer.Option(
            help="All that was found to tell trojaned inputs, or STRIP alone.",
            show_default="consensus, or strip where a threshold is given or fitted",
        ),
    ] = None,
    calibration_method: Annotated[
        CalibrationMethod | None, typer.Option(help="Order statistic, fitted normal distribution, or as given.")
    ] = None,
    target_frr: TargetFrr = None,
    threshold_bits: Annotated[
        float | None, typer.Option(help="Entropy threshold to use as it is, instead of --target-frr.")
    ] = None,
    layout: Annotated[
        Layout, typer.Option(help="What answers: models in a row, or for the same verdicts, sooner, one graph.")
    ] = "ensemble",
    no_early_exit: Annotated[
        bool,
        typer.Option(
            "--no-early-exit", help="Of fused: make all perturbations also where the input is certain to be accepted."
        ),
    ] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Repair a suspicious Keras model, calibrate a guard on it, and write a Triton model repository."""
    from detector.calibration import ThresholdRule
    from exporter.options import USED, Data, ExportOptions, RepairOptions, check_used
    from exporter.preprocessing import Preprocessing
    from exporter.publishing import check_writable

    check_aim(target_frr, threshold_bits, overlay_choice)
    if detector is None:
        detector = "consensus" if threshold_bits is None and calibration_method in (None, "quantile") else "strip"
    for name in {name for used in USED.values() for name in used}:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            check_used(name, repair)
    options = ExportOptions(
        preprocessing=Preprocessing(scale, numbers("mean", mean), numbers("std", std)),
        architecture=architecture,
        resize=resize,
        repair=RepairOptions(
            method=repair,
            augment=augment,
            max_rounds=max_rounds,
            epochs=epochs,
            optimizer=optimizer,
            allowed_drop=allowed_drop,
            learning_rate=learning_rate,
            batch_size=batch_size,
            stop_on_attack=stop_on_attack,
            seed=seed,
        ),
        overlays=overlay_count(overlays),
        overlay_choice=overlay_choice,
        alpha=alpha,
        rule=ThresholdRule(
            calibration_method,
            ThresholdRule.target_frr if target_frr is None else target_frr,
            threshold_bits,
            detector,
        ),
        layout=layout,
        early_exit=not no_early_exit,
        seed=seed,
    )
    given = {
        "overlays": overlay_images,
        "selection": selection_images,
        "calibration": calibration_images,
        "validation": validation_images,
        "repair": repair_images,
    }
    data = Data(clean, {name: path for name, path in given.items() if path is not None}, attack)
    options.check_data(data)
    check_writable(output)

    # What is wrong with the options was said before TensorFlow is loaded, which takes seconds.
    from exporter.export import export as run_export

    with progress() as report:
        result = run_export(model, data, output, options, on_progress=report)
    tell(result.notes)
    warn(result.calibration.note or None)
    if result.calibration.detector == "strip" and result.calibration.threshold_bits < _NEARLY_NOTHING_BITS:
        warn(_SURE)
    if detector == "consensus" and not result.calibration.asks_repaired:
        warn(ALONE)
    for notice in result.notices:
        if notice.level == "alarm":
            warn(notice.text)
    if as_json:
        print_json({"output": str(output), "version": result.version, **result.provenance})
        return
    softmax = ": a softmax was put behind it" if result.network_outputs == "logits" else ""
    say(f"The network returns {result.network_outputs}{softmax}.")
    if len(result.repair.steps) > 1:
        console.print(repair_table(result))
    console.print(scores_table(result))
    calibration = result.calibration
    console.print(
        f"Threshold {thresholds(calibration)}, from {calibration.images} clean images: {rejections(calibration)}."
    )
    say(blends(result.provenance["options"]))
    say(detection(result))
    say(f"Version {result.version} written to {output}; all about it in {result.report}. Next:")
    command("serve", output)
    if result.version != "1":
        say("A server that is running goes on with the version before, until:")
        command("reload", output, "--url", "127.0.0.1:8001")


@app.command(epilog="Example: stripwire verify repository && tritonserver --model-repository repository …")
def verify(
    repository: Exported,
    mode: Annotated[  # noqa: ARG001  one that does not exist is refused, and nothing else is asked of it
        Mode | None,
        typer.Option(
            help="What the server is told as --model-config-name; of a name that it does not know, it blocks."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every file of a model repository against its manifest; what does not match must not be served."""
    from model_repository.manifest import verify_repository

    manifest = verify_repository(repository)
    if as_json:
        print_json({"repository": str(repository), "version": manifest["active"], "files": len(manifest["files"])})
        return
    say(f"{repository} matches its manifest: {len(manifest['files'])} files; version {manifest['active']} is active.")


@app.command(epilog="Example: stripwire serve repository --grpc-port 8001 --mode shadow")
def serve(
    repository: Exported,
    mode: Annotated[
        Mode, typer.Option(help="block answers one past the last class when trojaned; shadow only reports.")
    ] = "block",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines call.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="Port of HTTP, 0 for a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Port of gRPC, 0 for a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Port of the Prometheus metrics, 0 for a free one.")] = 8002,
    quarantine: Annotated[
        Path | None, typer.Option(help="Folder for rejected inputs, the newest 1000 of them; see `stripwire monitor`.")
    ] = None,
    startup_timeout: Annotated[float, typer.Option(help="How long the models may take to load, in seconds.")] = 120.0,
    control_token: ControlToken = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="The server's certificate chain (PEM): gRPC over TLS, HTTP on loopback only.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The private key (PEM) of that certificate.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="PEM file of the authorities that callers' certificates are from (mutual TLS).")
    ] = None,
) -> None:
    """Serve a model repository with the pip-installed Triton, until Ctrl-C."""
    from deploy.embedded.server import EmbeddedTriton
    from deploy.embedded.tls import server_tls
    from exporter.publishing import locked
    from model_repository.manifest import read_manifest

    if not repository.exists():
        with locked(repository):
            pass  # which brings back what a killed command was replacing
    read_manifest(repository)  # a folder that is none is said before ports that are taken
    server = EmbeddedTriton(
        repository,
        mode=mode,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        startup_timeout_seconds=startup_timeout,
        control_token=control_token,
        tls=server_tls(tls_cert, tls_key, tls_client_ca),
        quarantine=quarantine,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as cleanly as for Ctrl-C
    try:
        with waiting("Loading the models …"):
            server.start()
        table = Table(title=escape(f"Serving {repository}, mode {mode}"), show_header=False)
        table.add_row("gRPC", server.grpc_address + (" (TLS)" if tls_cert else ""))
        table.add_row("HTTP", f"http://{server.http_address}")
        table.add_row("metrics", f"http://{server.metrics_address}/metrics")
        console.print(table)
        console.print("Ctrl-C stops it. From another terminal:")
        trust = ["--tls-ca", "AUTHORITIES"] if tls_cert else []
        command("classify", "--url", server.grpc_address, *trust, "IMAGE")
        watching: list[str | Path] = [
            "--url",
            server.grpc_address,
            "--metrics-url",
            f"http://{server.metrics_address}/metrics",
        ]
        if quarantine is not None:
            watching += ["--quarantine", quarantine]
        command("monitor", "--canaries", repository, *watching, *trust)
        server.wait()
    except KeyboardInterrupt:
        console.print("Stopping.")
    finally:
        server.stop()


@app.command(epilog="Example: stripwire calibrate repository --clean new_clean_data.h5 --url 127.0.0.1:8001")
def calibrate(
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
    token: Token = None,
    tls: Tls = False,
    tls_ca: RootCertificates = None,
    tls_key: ClientKey = None,
    tls_cert: ClientCertificate = None,
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
    with controlled(url, control_token, timeout, token, tls, tls_ca, tls_key, tls_cert) as control:
        with progress() as report:
            result = recalibrate(repository, clean, options, on_progress=report)
        served = switch(control, repository, back_to=result.base)
    tell(result.notes)
    warn(result.calibration.note or None)
    if result.calibration.detector == "strip" and result.calibration.threshold_bits < _NEARLY_NOTHING_BITS:
        warn(_SURE)
    if detector == "consensus" and not result.calibration.asks_repaired:
        warn(ALONE)
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
def rollback(
    repository: Exported,
    to: Annotated[
        str | None,
        typer.Option(help="Number of the version to go to, back or forth.", show_default="the one before"),
    ] = None,
    as_json: AsJson = False,
    url: RunningServer = None,
    control_token: ControlToken = None,
    timeout: ControlTimeout = 120.0,
    token: Token = None,
    tls: Tls = False,
    tls_ca: RootCertificates = None,
    tls_key: ClientKey = None,
    tls_cert: ClientCertificate = None,
) -> None:
    """Go back to the version before, or to any other; no version is lost."""
    from exporter.publishing import locked
    from exporter.repository import activate
    from model_repository.manifest import read_manifest

    with controlled(url, control_token, timeout, token, tls, tls_ca, tls_key, tls_cert) as control:
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
def reload(
    repository: Exported,
    as_json: AsJson = False,
    url: Url = "127.0.0.1:8001",
    control_token: ControlToken = None,
    timeout: ControlTimeout = 120.0,
    token: Token = None,
    tls: Tls = False,
    tls_ca: RootCertificates = None,
    tls_key: ClientKey = None,
    tls_cert: ClientCertificate = None,
) -> None:
    """Have a running server serve the repository's active version: no restart, no failed request."""
    with controlled(url, control_token, timeout, token, tls, tls_ca, tls_key, tls_cert) as control:
        served = switch(control, repository)
    if as_json:
        print_json({"repository": str(repository), "version": served, "served": served})
        return
    tell_how_to_switch(repository, served)


@app.command(epilog="Example: stripwire classify face.png --url 127.0.0.1:8001 --resize")
def classify(
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
    token: Token = None,
    tls: Tls = False,
    tls_ca: RootCertificates = None,
    tls_key: ClientKey = None,
    tls_cert: ClientCertificate = None,
) -> None:
    """Classify image files through the server, with a verdict on each."""
    from samples.files import load_images

    with progress() as report, connect(url, timeout, token, tls, tls_ca, tls_key, tls_cert) as client:
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
def evaluate(
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
    token: Token = None,
    tls: Tls = False,
    tls_ca: RootCertificates = None,
    tls_key: ClientKey = None,
    tls_cert: ClientCertificate = None,
) -> None:
    """Measure accuracy, attack success, FAR and FRR through the server, with 95 % intervals."""
    from client.evaluation import evaluate as run_evaluation
    from exporter.inputs import InputReader

    with progress() as report, connect(url, timeout, token, tls, tls_ca, tls_key, tls_cert) as client:
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
    console.print(rates_table(escape(f"Through {url}\n{_CAPTION}"), networks))
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
def monitor(
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
    token: Token = None,
    tls: Tls = False,
    tls_ca: RootCertificates = None,
    tls_key: ClientKey = None,
    tls_cert: ClientCertificate = None,
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
        token=token,
        tls=tls or None,
        tls_ca=tls_ca,
        tls_key=tls_key,
        tls_cert=tls_cert,
    )
    settings = settings.model_copy(update={"canaries": find_canaries(settings.canaries)})

    is_local = is_one_local_server(settings.url)

    def find_control_token() -> str | None:
        return read_control_token(settings.url.rpartition(":")[2]) if is_local else None

    configure_logs()
    run_monitor(settings, find_control_token)


@quarantine_app.command("list", epilog="Example: stripwire quarantine list --monitor http://127.0.0.1:8003")
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


@quarantine_app.command("show", epilog="Example: stripwire quarantine show 7f3a.0 --output input.png")
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


@quarantine_app.command("label", epilog="Example: stripwire quarantine label trojaned 7f3a.0 7f3b.0")
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


@quarantine_app.command(
    "save",
    epilog="Example: stripwire quarantine save trojaned.npz --truth trojaned --label 0, then evaluate --trojaned",
)
def quarantine_save(
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
    token: Token = None,
    tls: Tls = False,
    tls_ca: RootCertificates = None,
    tls_key: ClientKey = None,
    tls_cert: ClientCertificate = None,
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
            with connect(url, timeout, token, tls, tls_ca, tls_key, tls_cert) as server:
                answers = server.original_probabilities(
                    found.images, on_progress=lambda done, total: report("Asking the original network", done, total)
                )
            labels, said = answers.argmax(axis=1), "what the original network answers, which is no measure of that one"
    tell(found.notes)
    write_npz(output, Samples(found.images, labels), mode=0o600)  # people's pictures, as in the quarantine
    say(f"{len(labels)} {truth} inputs written to {output}. Labels: {said}.")


@quarantine_app.command("remove", epilog="Example: stripwire quarantine remove 7f3a.0")
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


@feedback_app.command("save", epilog="Example: stripwire feedback save feedback-2026-01-31.jsonl")
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


@feedback_app.command("load", epilog="Example: stripwire feedback load feedback-2026-01-31.jsonl")
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


def thresholds(calibration: Calibration) -> str:
    """Say what is rejected at or beyond."""
    texts = [f"{calibration.threshold_bits:.4g} bits"]
    if calibration.threshold_plain_bits is not None:
        texts.append(f"{calibration.threshold_plain_bits:.4g} bits for the input as it came")
    if calibration.threshold_nll is not None:
        texts.append(f"an nll of {calibration.threshold_nll:.4g} nats")
    return ", or ".join(texts)


def tell_about_badnet(title: str, trained: BadNet) -> None:
    """Print how well a BadNet was trained, and what to do with it."""
    from exporter.badnet import MODEL_FILE, VALIDATION_FILE

    table = Table(title=escape(f"{title}\n{_CAPTION}"), show_header=False)
    table.add_row("clean accuracy", str(trained.clean_accuracy))
    table.add_row("attack success", str(trained.attack_success))
    console.print(table)
    warn(trained.shortfall)
    say(f"Written to {trained.folder}. Next:")
    folder = trained.folder
    command("export", folder / MODEL_FILE, "--clean", folder / VALIDATION_FILE, "--output", "repository")


def blends(options: Mapping[str, Any], *, kept: bool = False) -> str:
    """Say what an input is blended with, given the options of a manifest."""
    how = "kept" if kept else {"random": "chosen at random", "greedy": "chosen greedily"}[options["overlay_choice"]]
    count = "1 overlay" if options["overlays"] == 1 else f"{options['overlays']} overlays"
    return f"Each input is blended with {count}, {how}, and weighs {options['alpha']:g}."


def rejections(calibration: Calibration) -> str:
    """Say how many clean inputs are rejected, and what that rests on."""
    rates = f"{calibration.frr_low:.1%} to {calibration.frr_high:.1%} (95 %)"
    if calibration.note:
        return f"these very images put its rejections at {rates}, further ones may not"
    return f"further clean inputs are rejected at {rates}"


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


def repair_table(result: Export) -> Table:
    """Return the table of an export's repair: its first and last steps, and the one that is kept."""
    from exporter.report import excerpt

    repair = result.repair
    table = Table(title=f"Repair ({repair.stopped})")
    table.add_column("")
    pruned = any(step.pruned_share for step in repair.steps)
    if pruned:
        table.add_column("pruned", justify="right")
    table.add_column(f"clean accuracy (n={result.split_sizes['validation']})", justify="right")
    if repair.steps[0].attack_success is not None:
        table.add_column("attack success", justify="right")
    for index in excerpt(repair.steps, repair.kept):
        if index is None:
            table.add_row("…")
            continue
        step = repair.steps[index]
        kept = step.name == repair.kept
        cells = [f"{step.name}, kept" if kept else step.name]
        if pruned:
            cells.append(f"{step.pruned_share:.1%}")
        cells.append(f"{step.clean_accuracy:.2%}")
        if step.attack_success is not None:
            cells.append(f"{step.attack_success:.2%}")
        table.add_row(*cells, style="bold" if kept else None)
    return table


def scores_table(result: Export) -> Table:
    """Return the table of how the network does, and of what the repair did to it if one was asked for."""
    networks = {"as it came": result.before}
    title = "The network; clean accuracy is on the validation part"
    if len(result.repair.steps) > 1:
        networks["repaired"] = result.after
        title = "What the repair did; clean accuracy is on the validation part, which chose it"
    table = Table(title=f"{title}\n{_CAPTION}")
    table.add_column("", no_wrap=True)
    for heading in ("clean accuracy", "attack success", "recovered accuracy"):
        table.add_column(heading, justify="right")
    for name, scores in networks.items():
        rates = (scores.clean_accuracy, scores.attack_success, scores.recovered_accuracy)
        table.add_row(name, *(figure(rate) for rate in rates))
    if result.before.attack_success is None:
        table.caption = "attack success is not known without --attack"
    return table


def detection(result: Export) -> str:
    """Say what the guard makes of clean images that had no part in its threshold, and of attack samples."""
    rejected = f"Measured: the guard rejects {result.false_rejection} of clean images (FRR)"
    if result.false_acceptance is None:
        return f"{rejected}; what it accepts of trojaned ones (FAR) is not known without --attack."
    return f"{rejected} and accepts {result.false_acceptance} of trojaned ones (FAR)."


def rates_table(title: str, networks: Mapping[str, NetworkResult | GuardedResult]) -> Table:
    """Return a table of networks by themselves, and of guarded ones on what they accept."""
    from client.evaluation import GuardedResult

    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for heading in ("clean accuracy", "attack success", "recovered accuracy", "FAR", "FRR"):
        table.add_column(heading, justify="right")
    unknown = False
    for name, network in networks.items():
        if isinstance(network, GuardedResult):
            rates = (
                network.clean_accuracy_of_accepted,
                network.attack_success_of_accepted,
                network.recovered_accuracy_of_accepted,
            )
            detection = [figure(network.false_acceptance), figure(network.false_rejection)]
        else:
            rates = (network.clean_accuracy, network.attack_success, network.recovered_accuracy)
            detection = ["", ""]
        figures = [*(figure(rate) for rate in rates), *detection]
        table.add_row(name, *figures)
        unknown = unknown or "-" in figures
    table.caption = "* on the inputs that the guard accepts"
    if unknown:
        table.caption += "; -: not measured, or the true labels are unknown"
    return table


def figure(rate: Proportion | None) -> str:
    """Return a rate over its interval and sample size; a dash for what was not measured."""
    if rate is None:
        return "-"
    if not rate.count:
        return "none accepted"
    return f"{100 * rate.rate:.1f} %\n{100 * rate.low:.1f}-{100 * rate.high:.1f}\nn={rate.count}"


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


@contextmanager
def controlled(
    url: str | None,
    control_token: str | None,
    timeout: float,
    token: str | None,
    tls: bool,
    ca: Path | None,
    key: Path | None,
    certificate: Path | None,
) -> Iterator[ModelControl | None]:
    """Yield control of the server at `url`, with access checked; None where there is no server to tell."""
    if url is None:
        yield None
        return
    from client.control import ModelControl, control_headers
    from deploy.embedded.control_file import read_control_token

    is_local = is_one_local_server(url)
    if control_token is None and is_local:
        control_token = read_control_token(url.rpartition(":")[2])
    headers = control_headers(control_token)
    with connect(url, timeout, token, tls, ca, key, certificate, headers) as client:
        control = ModelControl(client)
        control.check_access()
        yield control


def is_one_local_server(url: str) -> bool:
    """Say whether `url` is on this machine; InputError where it may be several servers, which would take turns."""
    from client.connection import read_target

    target = read_target(url)
    if target.is_balanced:
        raise InputError(f"url: {url} may be several servers, expected host:port of one")
    return target.is_local


@contextmanager
def connect(
    url: str,
    timeout: float,
    token: str | None,
    tls: bool,
    ca: Path | None,
    key: Path | None,
    certificate: Path | None,
    headers: Mapping[str, str] | None = None,
) -> Iterator[GuardedClient]:
    """Yield a client with the connection options of the command line."""
    from client.api import GuardedClient, TlsOptions

    encrypted = tls or ca is not None or key is not None or certificate is not None
    options = TlsOptions(ca, key, certificate) if encrypted else None
    with GuardedClient(url, timeout_seconds=timeout, token=token, tls=options, headers=headers) as client:
        yield client


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


def numbers(name: str, text: str) -> tuple[float, ...]:
    """Return the numbers of an option such as `0.485,0.456,0.406`; none for an empty text."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise InputError(f"{name}: got {text!r}, expected numbers with commas between, such as 0.5,0.5,0.5") from None


def overlay_count(text: str) -> int | Literal["auto"]:
    """Return a number of overlays, or `auto`."""
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise InputError(f"overlays: got {text!r}, expected a whole number or auto") from None


def check_aim(target_frr: float | None, threshold_bits: float | None, overlay_choice: str | None) -> None:
    """Refuse a target FRR that nothing would look at."""
    from exporter.commands import uses_target_frr

    if target_frr is not None and not uses_target_frr(threshold_bits, overlay_choice):
        raise InputError(
            f"target FRR: got {target_frr:g} and a threshold of {threshold_bits:g} bits, expected one of them: a given "
            "threshold is taken as it is"
        )


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
    program = "stripwire" if shutil.which("stripwire") else sys.argv[0]
    line = shlex.join([program, *map(str, arguments)])
    console.print(f"  {line}", style="bold", markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print JSON to stdout, undecorated."""
    typer.echo(json.dumps(value, indent=2))


def main() -> None:
    """Run the command line; an error that Stripwire knows ends it with one message and no traceback."""
    try:
        app()
    except StripwireError as error:
        fail(str(error), 2 if isinstance(error, InputError) else 1)
    except ModuleNotFoundError as error:
        fail(str(_missing(error)), 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}", 1)


def fail(message: str, status: int) -> None:
    """End with a message on stderr."""
    errors.print("error:", style="bold red", end=" ")
    errors.print(message, markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)


_EXTRAS = {
    "tensorflow": "exporter",
    "keras": "exporter",
    "tf2onnx": "exporter",
    "onnx": "exporter",
    "onnxruntime": "exporter",
    "tritonclient": "client",
    "grpc": "client",
    "tenacity": "client",
    "prometheus_client": "client",
    "httpx": "client",
    "pydantic_settings": "client",
    "starlette": "client",
    "uvicorn": "client",
    "psutil": "embedded",
}


def _missing(error: ModuleNotFoundError) -> SetupError:
    name = (error.name or "").split(".", maxsplit=1)[0]
    return SetupError(f"{name} is not installed: pip install 'stripwire[{_EXTRAS.get(name, 'all')}]'")


if __name__ == "__main__":
    main()
