"""What the dashboard asks, answered by a real Prometheus."""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from deploy.grafana import expressions as ask
from deploy.prometheus.local import LocalPrometheus
from tests.conftest import program, wait_for
from tests.deploy.grafana import board
from tests.deploy.grafana.scene import Scene, scene

NO_GPU = "the server of the tests has no GPU, and is told to export no metrics of any"
EXEMPT = dict.fromkeys((ask.GPU_UTILISATION, ask.GPU_MEMORY_USED, ask.GPU_MEMORY_TOTAL), NO_GPU)

TARGETS = [target for panel in board.panels() for target in board.targets(panel)]


@pytest.fixture(scope="module")
def running(repository: Path, badnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(repository, badnet, tmp_path_factory.mktemp("scene")) as ready:
        yield ready


def numbers(asked: LocalPrometheus, expression: str) -> list[float]:
    """Return the numbers that an expression is now; what is not a number is no answer."""
    values = [float(series["value"][1]) for series in asked.now(board.substituted(expression))]
    return [value for value in values if not math.isnan(value)]


def number(asked: LocalPrometheus, expression: str) -> float:
    (value,) = numbers(asked, expression)
    return value


def test_every_expression_has_an_answer(running: Scene) -> None:
    def unanswered() -> list[board.Target]:
        return [
            target
            for target in TARGETS
            if target.expression not in EXEMPT and not numbers(running.prometheus, target.expression)
        ]

    deadline = time.monotonic() + 90
    while unanswered() and time.monotonic() < deadline:
        time.sleep(1)
    assert unanswered() == []


def test_what_is_exempt_is_asked_and_cannot_be_answered(running: Scene) -> None:
    assert EXEMPT.keys() <= {target.expression for target in TARGETS}
    for expression in EXEMPT:
        assert "nv_gpu_" in expression
        assert numbers(running.prometheus, expression) == []


def test_legends_name_labels_that_there_are(running: Scene) -> None:
    for target in TARGETS:
        for series in running.prometheus.now(board.substituted(target.expression)):
            named = set(re.findall(r"{{(\w+)}}", target.legend)) - {"pod"}  # there is one in Kubernetes only
            assert named <= series["metric"].keys(), target


def test_there_is_one_series_for_each_verdict_bucket_and_model(running: Scene) -> None:
    def labels(expression: str, name: str) -> set[str]:
        return {series["metric"][name] for series in running.prometheus.now(board.substituted(expression))}

    assert labels(ask.INPUTS, "verdict") == {"accepted", "rejected"}
    assert "+Inf" in labels(ask.ENTROPIES, "le")
    assert len(labels(ask.ENTROPIES, "le")) > 10
    assert "guarded" in labels(ask.LATENCY_MICROSECONDS, "model")
    assert "strip_verdict" in labels(ask.QUEUE_MICROSECONDS, "model")
    assert "guarded" not in labels(ask.QUEUE_MICROSECONDS, "model")


def test_shares_and_intervals_are_in_their_bounds(running: Scene) -> None:
    asked = running.prometheus
    for counter in ("stripwire_canary_total", "stripwire_feedback_total"):
        for errors in (ask.frr(counter), ask.far(counter)):
            lower, rate, upper = (number(asked, each) for each in (errors.lower, errors.rate, errors.upper))
            # Prometheus scrapes between the three questions.
            assert 0 <= lower <= rate + 0.02
            assert rate <= upper + 0.02 <= 1.02
            assert upper - lower > 0.001
    # Of a few seconds of traffic, none may be trojaned.
    wait_for(lambda: 0 < number(asked, ask.REJECTION_RATE) < 1)
    assert 0 <= number(asked, ask.DRIFT) <= 1
    assert number(asked, ask.BLENDS_PER_INPUT) == pytest.approx(10)


def test_the_certificates_are_those_of_the_tests_and_the_control_token_is_taken(running: Scene) -> None:
    remaining = {
        series["metric"]["certificate"]: float(series["value"][1])
        for series in running.prometheus.now(board.substituted(ask.CERTIFICATE_DAYS))
    }
    assert remaining.keys() == {"server", "client"}
    assert all(1.9 < days < 2 for days in remaining.values())
    assert number(running.prometheus, ask.TAKES_CONTROL_TOKEN) == 1


def test_the_server_counts_the_monitors_canaries_by_themselves(running: Scene) -> None:
    assert number(running.prometheus, ask.added("stripwire_inputs_total", 'traffic="canary"')) > 0


@pytest.mark.parametrize(("part", "whole"), [(0, 1), (0, 50), (3, 100), (50, 50), (0.5, 20.5), (400, 1000)])
def test_the_interval_is_wilsons(running: Scene, part: float, whole: float) -> None:
    ends = [number(running.prometheus, ask.wilson(f"vector({part})", f"vector({whole})", end)) for end in "-+"]
    # scipy takes whole numbers only.
    expected = [_wilson(part, whole, sign) for sign in (-1, 1)]
    assert ends == pytest.approx(expected, abs=1e-4)
    if isinstance(part, int) and isinstance(whole, int):
        assert ends == pytest.approx([*binomtest(part, whole).proportion_ci(method="wilson")], abs=1e-4)


def _wilson(part: float, whole: float, sign: int) -> float:
    z, p = 1.959964, part / whole
    return (p + z * z / 2 / whole + sign * z * math.sqrt(p * (1 - p) / whole + (z / 2 / whole) ** 2)) / (
        1 + z * z / whole
    )


def test_where_nothing_was_counted_nothing_is_answered(running: Scene) -> None:
    for expression in (
        ask.share("vector(0)", "vector(0)"),
        ask.wilson("vector(0)", "vector(0)", "-"),
        ask.wilson("vector(0)", "vector(0)", "+"),
    ):
        assert running.prometheus.now(expression) == []


def entropies(**labels: str) -> list[dict[str, str]]:
    """Return ten live inputs a minute, of which 1, 8 and 10 are at or under 0.5, 1 and 2 bits; half of them blended."""
    named = "".join(f', {name}="{value}"' for name, value in labels.items())
    grown = {
        f'stripwire_entropy_bits_bucket{{traffic="live", le="0.5"{named}}}': 1,
        f'stripwire_entropy_bits_bucket{{traffic="live", le="1"{named}}}': 8,
        f'stripwire_entropy_bits_bucket{{traffic="live", le="2"{named}}}': 10,
        f'stripwire_entropy_bits_bucket{{traffic="live", le="+Inf"{named}}}': 10,
        f'stripwire_entropy_bits_count{{traffic="live"{named}}}': 10,
        f'stripwire_entropy_bits_count{{traffic="canary"{named}}}': 1000,
        f'stripwire_perturbations_total{{traffic="live"{named}}}': 50,
        f'stripwire_inputs_total{{traffic="live", verdict="accepted", mode="block"{named}}}': 8,
        f'stripwire_inputs_total{{traffic="live", verdict="rejected", mode="block"{named}}}': 2,
        f'stripwire_inputs_total{{traffic="canary", verdict="rejected", mode="block"{named}}}': 1000,
    }
    shares = {"0.5": 0.1, "1": 0.5, "2": 0.9}
    fixed = {f'stripwire_calibration_entropy_share{{le="{le}"{named}}}': share for le, share in shares.items()}
    return [{"series": name, "values": f"0+{step}x60"} for name, step in grown.items()] + [
        {"series": name, "values": f"{value}x60"} for name, value in fixed.items()
    ]


def answers(folder: Path, series: list[dict[str, str]], expected: list[tuple[str, Any]], **variables: str) -> None:
    """Have promtool compare what expressions are after half an hour; None is no answer at all."""
    chosen = {**board.EVERYTHING, "window": "10m", "__rate_interval": "5m", **variables}
    questions = [
        {
            "expr": board.substituted(expression, chosen),
            "eval_time": "30m",
            "exp_samples": [] if value is None else [{"labels": "{}", "value": value}],
        }
        for expression, value in expected
    ]
    test = {"interval": "1m", "input_series": series, "promql_expr_test": questions}
    (folder / "test.yml").write_text(json.dumps({"evaluation_interval": "1m", "tests": [test]}))
    promtool = program("promtool", "apt-get install prometheus")
    ended = subprocess.run(
        [promtool, "test", "rules", "test.yml"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_drift_is_the_greatest_difference_and_canaries_are_no_traffic(tmp_path: Path) -> None:
    expected = [
        (f"round({ask.DRIFT}, 0.001)", 0.3),  # at 1 bit: 0.8 of live inputs, 0.5 of those that calibrated
        (f"round({ask.CHANCE}, 0.001)", 0.136),
        (f"round({ask.REJECTION_RATE}, 0.001)", 0.2),
        (f"round({ask.BLENDS_PER_INPUT}, 0.001)", 5),
    ]
    answers(tmp_path, entropies(), expected)


def test_without_traffic_there_is_no_rate_and_no_drift(tmp_path: Path) -> None:
    idle = [{**each, "values": each["values"].replace("0+", "7+").replace("x60", "x1")} for each in entropies()]
    idle = [{**each, "values": re.sub(r"\+\d+x1", "+0x60", each["values"])} for each in idle]
    expected = [(each, None) for each in (ask.DRIFT, ask.CHANCE, ask.REJECTION_RATE, ask.BLENDS_PER_INPUT)]
    answers(tmp_path, idle, expected)


def test_pods_are_chosen_by_their_labels_and_all_of_them_where_there_are_none(tmp_path: Path) -> None:
    series = entropies() + entropies(namespace="faces", pod="guard-0") + entropies(namespace="signs", pod="guard-0")
    inputs = f"round(sum({ask.INPUTS}) * 60, 0.001)"
    answers(tmp_path, series, [(inputs, 30), (f"round({ask.DRIFT}, 0.001)", 0.3)])
    answers(tmp_path, series, [(inputs, 10)], namespace="faces", pod=".*")
    answers(tmp_path, series, [(inputs, 20)], namespace="(faces|signs)", pod="guard-0")
