"""Reads the dashboard as Grafana does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[3] / "deploy" / "grafana" / "stripwire.json"

EVERYTHING = {"namespace": ".*", "pod": ".*", "window": "1m", "__rate_interval": "10s"}
"""Values of the variables: all pods, and intervals for a test that lasts a minute."""


@dataclass(frozen=True)
class Target:
    """One expression of a panel, and how a series of its answer is called."""

    panel: str
    expression: str
    legend: str


def load() -> dict[str, Any]:
    """Return the committed dashboard."""
    board: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return board


def panels() -> list[dict[str, Any]]:
    """Return its panels, without rows."""
    return [panel for panel in load()["panels"] if panel["type"] != "row"]


def targets(panel: Mapping[str, Any]) -> list[Target]:
    """Return what a panel asks."""
    return [Target(panel["title"], target["expr"], target["legendFormat"]) for target in panel["targets"]]


def substituted(text: str, variables: Mapping[str, str] = EVERYTHING) -> str:
    """Return text with the values of variables in it."""
    for name, value in variables.items():
        text = text.replace(f"${name}", value)
    return text
