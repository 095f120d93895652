"""How results are told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from client.evaluation import GuardedResult, NetworkResult
    from detector.calibration import Calibration
    from detector.statistics import Proportion


CAPTION = "share of images, its 95 % interval, and how many images"
_ALONE = "no repair changed the network, so there is no second one to ask: the original one's answers decide alone"

_NEARLY_NOTHING_BITS = 1e-3
_SURE = (
    f"the threshold is under {_NEARLY_NOTHING_BITS:g} bits: the network is so sure of whatever it is shown that STRIP "
    "has little to go by. Is it fed as it was trained (--scale, --mean, --std)? If so, see --detector consensus"
)


def doubts(calibration: Calibration, detector: str | None) -> list[str]:
    """Return what is doubtful about a calibration, given the detector that was asked for."""
    found = [calibration.note] if calibration.note else []
    if calibration.detector == "strip" and calibration.threshold_bits < _NEARLY_NOTHING_BITS:
        found.append(_SURE)
    if detector == "consensus" and not calibration.asks_repaired:
        found.append(_ALONE)
    return found


def thresholds(calibration: Calibration) -> str:
    """Say what is rejected at or beyond."""
    texts = [f"{calibration.threshold_bits:.4g} bits"]
    if calibration.threshold_plain_bits is not None:
        texts.append(f"{calibration.threshold_plain_bits:.4g} bits for the input as it came")
    if calibration.threshold_nll is not None:
        texts.append(f"an nll of {calibration.threshold_nll:.4g} nats")
    return ", or ".join(texts)


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
