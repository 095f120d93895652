"""What the reader of a report, or of a terminal, must not miss."""

from __future__ import annotations

from dataclasses import dataclass

from exporter.report.data import ReportData

HIGH_FAR = 0.1
"""A guard that certainly accepts more of the attack samples than this is not to be relied on."""
LOW_ACCURACY = 0.5
"""A network that is certainly right on less of the clean images than this is hardly what it was trained to be."""

_UNTAUGHT = {"as received", "bounded"}  # steps of a repair that nothing was taught in


@dataclass(frozen=True)
class Notice:
    """Something that must not be missed.

    Attributes:
        level: `alarm` for what makes the result doubtful, `note` for the rest.
        text: a few sentences, what to do among them.
    """

    level: str
    text: str


def notices(data: ReportData) -> tuple[Notice, ...]:
    """Return what must not be missed, the most important first."""
    alarms = (_unchanged(data), _untaught(data), _attack(data), _guard(data), _samples(data), _accuracy(data))
    found = [Notice("alarm", text) for text in alarms if text is not None]
    if data.after.attack_success is None:
        text = (
            "No attack samples were given. Attack success, recovered accuracy and the detection of trojaned inputs "
            "were not measured, so nothing here can say whether a backdoor was there, or is gone."
        )
        found.append(Notice("note", text))
    return tuple(found)


def percent(share: float) -> str:
    """Return a share as a percentage, to as many digits as tell it from none and from all."""
    near_an_end = 0.0 < share < 0.0005 or 0.9995 <= share < 1.0
    return f"{100 * share:.{2 if near_an_end else 1}f} %"


def _unchanged(data: ReportData) -> str | None:
    if data.changed:
        return None
    if not data.tried:
        return (
            "Nothing was repaired, as asked: what is served as the repaired network is the network as it came, with "
            "whatever backdoor it has. The guard alone stands before it."
        )
    return (
        "No step of the repair stayed within the allowed drop, so it changed nothing: what is served as the repaired "
        f"network is the network as it came, with whatever backdoor it has. The repair ended because: {data.stopped}. "
        "Give more clean data, allow a larger --allowed-drop, or say --repair none."
    )


def _untaught(data: ReportData) -> str | None:
    if not (data.changed and data.kept in _UNTAUGHT and _was_taught(data)):
        return None
    return (
        "No epoch of the repair stayed within the allowed drop. What is kept has its features bounded, but was taught "
        f"nothing, and a backdoor may well be open still. The repair ended because: {data.stopped}. Give more clean "
        "data, or allow a larger --allowed-drop."
    )


def _attack(data: ReportData) -> str | None:
    success = data.after.attack_success
    if success is None or success.rate < data.attack_success_goal:
        return None
    if not data.tried:
        return f"The attack succeeds on {success} of the attack samples. Try a --repair, with clean data to learn from."
    longer = "more --epochs, " if _was_taught(data) else ""
    return (
        f"The attack still succeeds on {success} of the attack samples; the goal is less than "
        f"{percent(data.attack_success_goal)}. The backdoor is not closed. Try {longer}more clean data, or another "
        "--repair."
    )


def _was_taught(data: ReportData) -> bool:
    return not {step.name for step in data.steps} <= _UNTAUGHT


def _guard(data: ReportData) -> str | None:
    accepted = data.false_acceptance
    if accepted is None or accepted.low <= HIGH_FAR:
        return None
    consensus = "" if data.calibration.detector == "consensus" else "--detector consensus, "
    return (
        f"The guard lets {accepted} of the attack samples pass (FAR): do not rely on it against this trigger. Try "
        f"{consensus}another --alpha, other overlays (--seed, --overlays), or a higher --target-frr."
    )


def _samples(data: ReportData) -> str | None:
    success = data.before.attack_success
    if success is None or success.high >= 0.5:
        return None
    return (
        f"The attack samples fool even the network as it came on no more than {percent(success.rate)} of them: they "
        "hardly carry its trigger, or are not labelled with its target, and what is measured on them says little."
    )


def _accuracy(data: ReportData) -> str | None:
    accuracy = data.before.clean_accuracy
    if accuracy.high >= LOW_ACCURACY:
        return None
    return (
        f"The network as it came is right on no more than {accuracy} of the clean images. If it should do better: "
        "are labels numbered as it was trained (classes.txt fixes the order of class folders), and is it fed as it was "
        "(--scale, --mean, --std)?"
    )
