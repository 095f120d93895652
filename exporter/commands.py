"""The commands that repeat an export."""

from __future__ import annotations

from pathlib import Path

from exporter.options import USED, Data, ExportOptions


def commands(model: Path, data: Data, output: Path, options: ExportOptions) -> tuple[tuple[str, ...], ...]:
    """Return the command that repeats an export, with every option that shapes its result, and what serves it then."""
    repair, rule, preprocessing = options.repair, options.rule, options.preprocessing
    values: dict[str, object] = {
        "output": output,
        "clean": data.clean,
        "attack": data.attack,
        **{f"{_SINGULAR.get(name, name)}-images": path for name, path in data.parts.items()},
        "scale": preprocessing.scale,
        "mean": ",".join(map(repr, preprocessing.mean)) or None,
        "std": ",".join(map(repr, preprocessing.std)) or None,
        "architecture": options.architecture,
        "repair": repair.method,
        **{name.replace("_", "-"): getattr(repair, name) for name in USED[repair.method] if name != "stop_on_attack"},
        "overlays": options.overlays,
        "overlay-choice": options.overlay_choice,
        "alpha": options.alpha,
        "detector": rule.detector,
        "calibration-method": rule.method,
        "target-frr": rule.target_frr if uses_target_frr(rule.threshold_bits, options.overlay_choice) else None,
        "threshold-bits": rule.threshold_bits,
        "layout": options.layout,
        "seed": options.seed,
    }
    arguments = [str(part) for name, value in values.items() if value is not None for part in (f"--{name}", value)]
    flags = {
        "--resize": options.resize,
        "--stop-on-attack": repair.stop_on_attack,
        "--no-early-exit": not options.early_exit,
    }
    arguments += [flag for flag, given in flags.items() if given]
    return ("stripwire", "export", str(model), *arguments), ("stripwire", "serve", str(output))


def uses_target_frr(threshold_bits: float | None, overlay_choice: str | None) -> bool:
    """Return whether a target FRR shapes the result: where the threshold is given, greedy overlays alone look at it."""
    return threshold_bits is None or overlay_choice == "greedy"


_SINGULAR = {"overlays": "overlay"}
