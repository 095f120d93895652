"""The export report: its numbers, by hand; its page, as a parser reads it; and what hostile names cannot do."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from detector.calibration import calibrate
from detector.statistics import Proportion
from exporter.report import Examples, Layer, Part, ReportData, Scores, Step

OVERLAYS = 10
FIGURES = {"repair", "histogram", "roc", "thresholds", "overlays"}
VOID = {"meta", "img", "br", "link", "hr", "input"}


def report_data(seed: int = 0, **changes: Any) -> ReportData:
    """Return a plausible report: a BadNet of 100 faces that the repair healed."""
    generator = np.random.default_rng(seed)

    def entropies(count: int, mean: float, spread: float) -> Any:
        image = generator.gamma((mean / spread) ** 2, spread**2 / mean, (count, 1))
        return (image * generator.gamma(4.0, 0.25, (count, OVERLAYS))).astype(np.float32)

    def examples(count: int, entropy: float) -> Examples:
        labels = generator.integers(1, 100, count)
        images = generator.integers(0, 256, (count, 55, 47, 3), dtype=np.uint8)
        return Examples(images, np.full(count, entropy), labels, labels, labels)

    calibration_entropies = entropies(598, 2.2, 0.7)
    steps = [Step("as received", 0.998, 0.997, 0.002, 0.0)]
    steps += [Step(f"round {n}", 0.995 - 0.001 * n, 0.9 / n, 0.9 - 0.8 / n, 0.02 * n * n) for n in range(1, 6)]
    steps += [Step(f"final epoch {n}", 0.998, 0.01 / n, 0.95, 0.5) for n in range(1, 13)]
    data = ReportData(
        model_name="bd_net.keras",
        version="3",
        layers=(
            Layer("input", "InputLayer", (55, 47, 3), 0, None),
            Layer("conv_1", "Conv2D", (52, 44, 20), 980, 0.513),
            Layer("pool_1", "MaxPooling2D", (26, 22, 20), 0, None),
            Layer("output", "Dense", (100,), 16_100, None),
        ),
        steps=tuple(steps),
        kept="final epoch 12",
        stopped="attack success fell under 1%",
        before=Scores(Proportion(449, 450), Proportion(987, 990), Proportion(2, 990)),
        after=Scores(Proportion(448, 450), Proportion(2, 990), Proportion(951, 990)),
        attack_success_goal=0.01,
        calibration=calibrate(calibration_entropies.mean(axis=1), 0.05),
        alpha=0.5,
        overlays=generator.integers(0, 256, (OVERLAYS, 55, 47, 3), dtype=np.uint8),
        calibration_entropies_bits=calibration_entropies,
        held_out_entropies_bits=entropies(448, 2.2, 0.7),
        trojaned_entropies_bits=entropies(990, 0.25, 0.3),
        clean_examples=examples(2, 2.3),
        trojaned_examples=examples(2, 0.1),
        parts=(Part("overlays", OVERLAYS, "0" * 64), Part("calibration", 598, "1" * 64)),
        commands=(("stripwire", "export", "my net.keras", "--clean", "clean.h5"), ("stripwire", "serve", "repository")),
        provenance={
            "created": "2026-01-01T00:00:00+00:00",
            "inputs": {"model": {"file": "bd_net.keras", "sha256": "a" * 64}},
            "options": {"scale": "unit", "threshold_bits": None, "repair": {"method": "magnitude"}},
            "versions": {"python": "3.11.2", "keras": "3.15.1"},
        },
    )
    return dataclasses.replace(data, **changes)
