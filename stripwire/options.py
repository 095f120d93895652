"""Options that several commands have, and what they are read as."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from detector.errors import InputError

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
Monitor = Annotated[
    str, typer.Option("--monitor", envvar="STRIPWIRE_MONITOR", show_envvar=True, help="URL of `stripwire monitor`.")
]
FeedbackToken = Annotated[
    str | None, typer.Option(envvar="STRIPWIRE_FEEDBACK_TOKEN", show_envvar=True, help="The monitor's feedback token.")
]
Truth = Literal["clean", "trojaned"]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@dataclass(frozen=True)
class Access:
    """What a server lets us in by: options of every command that calls one, see `with_access`."""

    token: Annotated[
        str | None, typer.Option(envvar="STRIPWIRE_TOKEN", help="Sent as authorization: Bearer.", show_envvar=True)
    ] = None
    tls: Annotated[bool, typer.Option("--tls", help="Encrypt, trusting the authorities that gRPC brings along.")] = (
        False
    )
    tls_ca: Annotated[
        Path | None, typer.Option("--tls-ca", help="PEM file of the authorities to trust; turns TLS on.")
    ] = None
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="Our private key (PEM), for mutual TLS.")] = None
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", help="Our certificate chain (PEM), for mutual TLS.")
    ] = None


def with_access(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `Access` in place of its last parameter, `access`."""
    *others, access = inspect.signature(command, eval_str=True).parameters.values()
    hints = get_type_hints(Access, include_extras=True)
    options = [
        access.replace(name=field.name, default=field.default, annotation=hints[field.name]) for field in fields(Access)
    ]

    @functools.wraps(command)
    def called(**arguments: Any) -> None:
        given = {option.name: arguments.pop(option.name) for option in options}
        command(**arguments, access=Access(**given))

    called.__annotations__ = {each.name: each.annotation for each in (*others, *options)}
    called.__signature__ = inspect.Signature([*others, *options])  # type: ignore[attr-defined]
    return called


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
