"""The command that a report names repeats the export: the command line makes the same options of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from detector.calibration import ThresholdRule
from exporter.commands import commands
from exporter.options import Data, ExportOptions, RepairOptions
from exporter.preprocessing import Preprocessing
from exporter.splits import PARTS
from stripwire.app import app


class _CaughtError(Exception):
    """Ends the command line where the export would begin."""


@pytest.mark.parametrize(
    "options",
    [
        ExportOptions(),
        ExportOptions(
            preprocessing=Preprocessing("unit", (0.485, 0.456, 0.406), (0.229, 0.224, 1 / 3)),
            architecture="deepid",
            resize=True,
            repair=RepairOptions("magnitude", "none", 3, 0, 0.07, "sgd", 0.02, 16, True, seed=5),
            overlays=32,
            overlay_choice="greedy",
            alpha=0.6,
            rule=ThresholdRule("normal", 0.02),
            seed=5,
        ),
        ExportOptions(repair=RepairOptions("bounds", allowed_drop=0.01), rule=ThresholdRule(detector="strip")),
        ExportOptions(rule=ThresholdRule(threshold_bits=0.5), repair=RepairOptions("none")),
        ExportOptions(rule=ThresholdRule(None, 0.1, threshold_bits=0.5), overlay_choice="greedy"),
        ExportOptions(layout="fused"),
        ExportOptions(layout="fused", early_exit=False),
    ],
)
def test_it_says_all_that_shapes_the_result(
    options: ExportOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    useless = {"random": "selection"}.get(options.overlay_choice), {"none": "repair"}.get(options.repair.method)
    parts = {name: tmp_path / f"my {name}.npz" for name in PARTS if name not in useless}
    for path in (tmp_path / "net.keras", tmp_path / "clean.h5", tmp_path / "attack.h5", *parts.values()):
        path.touch()
    data = Data(tmp_path / "clean.h5", parts, tmp_path / "attack.h5")
    export, serve = commands(tmp_path / "net.keras", data, tmp_path / "out", options)
    assert serve == ("stripwire", "serve", str(tmp_path / "out"))
    caught: list[Any] = []

    def catch(*arguments: Any, **_: Any) -> None:
        caught.extend(arguments)
        raise _CaughtError

    monkeypatch.setattr("exporter.export.export", catch)
    with pytest.raises(_CaughtError):
        app(export[1:], standalone_mode=False)
    assert caught == [tmp_path / "net.keras", data, tmp_path / "out", options]
