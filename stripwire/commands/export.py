"""From a suspicious network to a model repository."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from stripwire.options import (
    Architecture,
    AsJson,
    Augment,
    CalibrationMethod,
    Detector,
    Layout,
    Optimizer,
    OverlayChoice,
    RepairMethod,
    Scale,
    Seed,
    check_aim,
    numbers,
    overlay_count,
)
from stripwire.results import CAPTION, blends, doubts, figure, rejections, thresholds
from stripwire.terminal import command, console, print_json, progress, say, tell, warn

if TYPE_CHECKING:
    from exporter.export import Export

app = typer.Typer()

_PART = "Data for the {} alone, instead of a share of --clean."


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
    target_frr: Annotated[
        float | None, typer.Option(help="Share of clean inputs that may be rejected, 0..1.", show_default="0.05")
    ] = None,
    threshold_bits: Annotated[
        float | None, typer.Option(help="Entropy threshold to use as it is, instead of --target-frr.")
    ] = None,
    layout: Annotated[
        Layout, typer.Option(help="What answers: models in a row, or for the same verdicts, sooner, one graph.")
    ] = "ensemble",
    no_early_exit: Annotated[
        bool,
        typer.Option(
            "--no-early-exit",
            help="Of fused: make all perturbations also where the input is certain to be accepted. For GPUs.",
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
    for doubt in doubts(result.calibration, detector):
        warn(doubt)
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
    table = Table(title=f"{title}\n{CAPTION}")
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
