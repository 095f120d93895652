"""The autoscaler's metric on made-up series, by the real promtool; beside it the rule that is often copied."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from model_repository.manifest import MODELS
from tests.conftest import program
from tests.deploy.kubernetes.manifests import KUBERNETES, of_kind, rendered

(RULE,) = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
COPIED = (
    "avg(rate(nv_inference_queue_duration_us{<<.LabelMatchers>>}[30s])"
    "/(1+rate(nv_inference_request_success{<<.LabelMatchers>>}[30s]))) by (<<.GroupBy>>) / 1e6"
)


@pytest.fixture(scope="module")
def promtool() -> str:
    return program("promtool", "apt-get install prometheus")


def series(pod: str, queued_us: dict[str, int], requests: int) -> str:
    """Return two hours of a pod: by model how long each request waits, and how many requests come every 10 seconds."""
    lines = []
    for model, queued in {"guarded": 0, **queued_us}.items():
        labels = f'{{namespace="stripwire",pod="{pod}",model="{model}",version="1"}}'
        lines.append(f"  - {{series: 'nv_inference_queue_duration_us{labels}', values: '0+{queued * requests}x720'}}")
        lines.append(f"  - {{series: 'nv_inference_request_success{labels}', values: '0+{requests}x720'}}")
    return "\n".join(lines)


def asked(query: str) -> str:
    """Return a query as the adapter puts it to Prometheus."""
    return query.replace("<<.GroupBy>>", "pod").replace("<<.LabelMatchers>>", 'namespace="stripwire"')


def tells(promtool: str, folder: Path, query: str, pods: dict[str, int], given: str) -> None:
    """Assert what a query, in seconds, says of each pod: given in microseconds."""
    samples = "".join(f"      - {{labels: '{{pod=\"{pod}\"}}', value: {us}}}\n" for pod, us in pods.items())
    (folder / "test.yaml").write_text(
        f"tests:\n- interval: 10s\n  input_series:\n{given}\n  promql_expr_test:\n"
        f"  - expr: round(({asked(query)}) * 1e6)\n    eval_time: 1h\n    exp_samples:\n{samples}"
    )
    told = subprocess.run(
        [promtool, "test", "rules", folder / "test.yaml"], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stdout + told.stderr


QUEUED = {model: 2_000 for model in MODELS if model != "guarded"}
"""Two milliseconds in each of five queues: ten for a request."""


def test_it_is_how_long_a_request_waits_in_all_queues(promtool: str, tmp_path: Path) -> None:
    given = series("a", QUEUED, 1_000) + "\n" + series("b", {"fused": 3_000, "strip_verdict": 1_000}, 10)
    tells(promtool, tmp_path, RULE["metricsQuery"], {"a": 10_000, "b": 4_000}, given)


def test_it_does_not_depend_on_what_else_is_loaded(promtool: str, tmp_path: Path) -> None:
    given = series("a", {**QUEUED, "another": 0, "a_third": 50_000}, 1_000)
    tells(promtool, tmp_path, RULE["metricsQuery"], {"a": 10_000}, given)


def test_it_is_0_where_nobody_asks(promtool: str, tmp_path: Path) -> None:
    tells(promtool, tmp_path, RULE["metricsQuery"], {"a": 0}, series("a", QUEUED, 0))


def test_the_rule_that_is_often_copied_divides_by_the_number_of_models(promtool: str, tmp_path: Path) -> None:
    # 100 requests a second: of the ten milliseconds it sees 5/6 of two, and another 1 % is lost to the 1.
    tells(promtool, tmp_path, COPIED, {"a": 1_650}, series("a", QUEUED, 1_000))
    # Four idle models more, and it sees half of two.
    idle = {f"idle_{number}": 0 for number in range(4)}
    tells(promtool, tmp_path, COPIED, {"a": 990}, series("a", {**QUEUED, **idle}, 1_000))
    # One request a second: half of that is gone.
    tells(promtool, tmp_path, COPIED, {"a": 833}, series("a", QUEUED, 10))


def test_the_autoscaler_goes_by_it() -> None:
    for name in ("cpu", "gpu", "kserve"):
        (scaler,) = of_kind(rendered(name), "HorizontalPodAutoscaler")
        (metric,) = scaler["spec"]["metrics"]
        assert metric["pods"]["metric"]["name"] == RULE["name"]["as"]
