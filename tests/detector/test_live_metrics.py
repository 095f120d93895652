"""What `strip_verdict` counts, and what it counts where."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detector.errors import RepositoryError
from detector.live_metrics import CANARY_KEY, LiveMetrics
from detector.scores import SCORES, Thresholds
from detector.serving import verdict_stage
from tests.detector.test_serving import arguments, opinions, write_detector
from tests.detector.triton import MetricFamily, PbUtils, request

Found = Callable[[str], dict[tuple[str, ...], float]]


@pytest.fixture
def found() -> Iterator[Found]:
    """Return what a family counts: by the values of its labels, what is not 0."""
    MetricFamily.made.clear()

    def values(name: str) -> dict[tuple[str, ...], float]:
        metrics = MetricFamily.made[f"stripwire_{name}"].metrics
        return {tuple(metric.labels.values()): metric.value for metric in metrics if metric.value}

    yield values
    MetricFamily.made.clear()


def metrics_of(**changes: Any) -> LiveMetrics:
    values: dict[str, Any] = {
        "mode": "block",
        "thresholds": Thresholds(0.5, 1e-9, 2.0),
        "clean": {0.25: 0.25, 0.5: 0.75, 1.0: 1.0},
        "calibration": {"repository_version": "7", "sha256": "ab"},
        "created": 1e9,
    }
    return LiveMetrics(PbUtils(), **(values | changes))


def test_every_series_is_there_before_the_first_input(found: Found) -> None:
    metrics = metrics_of(classes=2)
    labels = [tuple(metric.labels.values()) for metric in MetricFamily.made["stripwire_inputs_total"].metrics]
    assert labels == [(traffic, v, "block") for traffic in ("live", "canary") for v in ("accepted", "rejected")]
    assert len(MetricFamily.made["stripwire_entropy_bits_bucket"].metrics) == 2 * 4
    assert len(MetricFamily.made["stripwire_labels_total"].metrics) == 2 * 3
    assert found("calibration_info") == {("7", "ab"): 1}
    assert found("calibration_timestamp_seconds") == {(): 1e9}
    assert found("calibration_entropy_share") == {("0.25",): 0.25, ("0.5",): 0.75, ("1",): 1.0}
    thresholds = [found(f"threshold_{name}")[()] for name in ("bits", "plain_bits", "nll")]
    assert thresholds == [0.5, 1e-9, 2.0]
    # The next version's process shares these gauges: what is true no more is taken back.
    metrics.close()
    assert found("calibration_info") == {}
    assert np.isnan(found("threshold_bits")[()])


def test_what_plays_no_part_has_no_threshold(found: Found) -> None:
    metrics = metrics_of(thresholds=Thresholds(0.5))
    assert "stripwire_threshold_nll" not in MetricFamily.made
    assert "stripwire_labels_total" not in MetricFamily.made
    assert found("threshold_bits") == {(): 0.5}
    MetricFamily.made["stripwire_threshold_bits"].metrics[0].set(0.7)  # by the version before, which was not yet gone
    time.sleep(3)
    assert found("threshold_bits") == {(): 0.5}
    metrics.close()


def test_inputs_are_counted_by_hand(found: Found) -> None:
    metrics = metrics_of(classes=2)
    metrics.count(
        canary=np.array([False, False, False, True]),
        trojaned=np.array([True, False, True, False]),
        rejecting={
            "entropy": np.array([True, False, False, False]),
            "plain_entropy": np.array([True, False, False, False]),
            "nll": np.array([False, False, False, False]),
            "not_finite": np.array([False, False, True, False]),
        },
        bits=np.array([0.5, 0.75, np.nan, 3.0], np.float32),
        perturbations=np.array([10, 6, 10, 6], np.int32),
        labels=np.array([2, 0, 2, 1], np.int32),
    )
    metrics.close()
    assert found("inputs_total") == {
        ("live", "accepted", "block"): 1,
        ("live", "rejected", "block"): 2,
        ("canary", "accepted", "block"): 1,
    }
    assert found("rejections_total") == {
        ("live", "entropy"): 1,
        ("live", "plain_entropy"): 1,
        ("live", "not_finite"): 1,
    }
    buckets = {("live", "0.5"): 1, ("live", "1"): 2, ("live", "+Inf"): 2, ("canary", "+Inf"): 1}
    assert found("entropy_bits_bucket") == buckets
    assert found("entropy_bits_sum") == {("live",): 1.25, ("canary",): 3.0}
    assert found("entropy_bits_count") == {("live",): 2, ("canary",): 1}
    assert found("perturbations_total") == {("live",): 26, ("canary",): 6}
    assert found("labels_total") == {("live", "0"): 1, ("live", "2"): 2, ("canary", "1"): 1}


def test_the_verdict_stage_tells_canaries_from_live_traffic(found: Found, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    write_detector(tmp_path, "strip")
    stage = verdict_stage(arguments(tmp_path), PbUtils())
    two, one = (
        opinions(rows) | {"repaired_probabilities": np.ones((len(rows), 3))} for rows in ([[0.3], [0.9]], [[0.2]])
    )
    canary = f'{{"{CANARY_KEY}": true}}'
    stage.execute([request(["label"], **two), request(["label"], canary, **one), request(["label"], '{"a": 1}', **one)])
    stage.close()
    assert found("inputs_total") == {
        ("live", "accepted", "block"): 1,
        ("live", "rejected", "block"): 2,
        ("canary", "rejected", "block"): 1,
    }
    assert "stripwire_labels_total" not in MetricFamily.made


def test_what_could_not_be_handed_over_is_kept(found: Found, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = metrics_of()
    counter = MetricFamily.made["stripwire_perturbations_total"].metrics[0]
    increment, tries = counter.increment, []

    def fails_first(value: float) -> None:
        tries.append(value)
        if len(tries) == 1:
            raise RuntimeError("the server is busy")
        increment(value)

    counter.increment = fails_first  # type: ignore[method-assign]
    no, ran, label = np.zeros(1, bool), np.array([7], np.int32), np.zeros(1, np.int32)
    metrics.count(no, no, dict.fromkeys(SCORES, no), np.ones(1), ran, label)
    time.sleep(0.6)
    metrics.close()
    assert found("perturbations_total") == {("live",): 7}
    assert found("inputs_total") == {("live", "accepted", "block"): 1}
    assert "the server is busy" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "classes"), [("1", 3), ("1", 1001), ("yes", 3)])
def test_labels_are_counted_if_asked_and_if_they_are_not_too_many(
    monkeypatch: pytest.MonkeyPatch, found: Found, tmp_path: Path, value: str, classes: int
) -> None:
    monkeypatch.setenv("STRIPWIRE_COUNT_LABELS", value)
    (tmp_path / "1").mkdir()
    write_detector(tmp_path, "strip")
    given = arguments(tmp_path)
    given["model_config"] = given["model_config"].replace("[3]", f"[{classes}]")
    if (value, classes) == ("1", 3):
        verdict_stage(given, PbUtils()).close()
        assert len(MetricFamily.made["stripwire_labels_total"].metrics) == 2 * 4
        assert not found("labels_total")
        return
    with pytest.raises(RepositoryError, match="STRIPWIRE_COUNT_LABELS: got"):
        verdict_stage(given, PbUtils())
