"""Prometheus rules: valid, tested one by one, and about metrics that exist."""

from __future__ import annotations

import re
import subprocess
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from client.api import GuardedClient, TlsOptions
from client.control import control_headers
from client.monitor.certificates import CertificateCollector
from client.monitor.control import ControlCheck
from client.monitor.metrics import FeedbackCollector, MonitorMetrics
from client.monitor.record import FeedbackRecord
from deploy.embedded.server import EmbeddedTriton
from tests.certificates import OpenSsl
from tests.client.monitor.conftest import canaries
from tests.conftest import program

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
TESTS = Path(__file__).parent / "prometheus" / "rules_test.yaml"

ALERTS = re.findall(r"- alert: (\w+)", RULES.read_text())
RECORDS = sorted(set(re.findall(r"- record: (\S+)", RULES.read_text())))


@pytest.fixture(scope="module")
def promtool() -> str:
    return program("promtool", "apt-get install prometheus")


def test_the_rules_are_valid(promtool: str) -> None:
    checked = subprocess.run([promtool, "check", "rules", RULES], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_rule_and_alert_does_what_its_tests_say(promtool: str) -> None:
    tested = subprocess.run([promtool, "test", "rules", TESTS], capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_rule_has_a_test() -> None:
    written = TESTS.read_text()
    assert [record for record in RECORDS if record not in written] == []


def with_every_alert(rules: str, expression: str) -> str:
    """Return the rules with another expression in every alert, and no waiting."""
    alert = r"(- alert: \w+\n)        expr: .*?\n        (?:for: \w+\n        )?labels:"
    changed, count = re.subn(alert, rf"\1        expr: {expression}\n        labels:", rules, flags=re.DOTALL)
    assert count == len(ALERTS)
    return changed


@pytest.mark.parametrize(
    ("expression", "query"),
    [
        ("vector(0) > 1", r"ALERTS{alertname=\"%s\",alertstate=\"firing\"}"),
        ("vector(1)", r"ALERTS{alertname=\"%s\"}"),
    ],
    ids=["never fires", "always fires"],
)
def test_the_tests_notice_an_alert_that(promtool: str, tmp_path: Path, expression: str, query: str) -> None:
    (tmp_path / "rules.yaml").write_text(with_every_alert(RULES.read_text(), expression))
    tests = re.sub(r"(?m)^rule_files: .*$", f"rule_files: [{tmp_path / 'rules.yaml'}]", TESTS.read_text())
    (tmp_path / "tests.yaml").write_text(tests)
    command: list[str | Path] = [promtool, "test", "rules", tmp_path / "tests.yaml"]
    tested = subprocess.run(command, capture_output=True, text=True, check=False)
    said = tested.stdout + tested.stderr
    assert [alert for alert in ALERTS if query % alert not in said] == []


def test_every_alert_says_what_is_wrong_and_what_to_do(promtool: str, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(with_every_alert(RULES.read_text(), "vector(1)"))
    expected = "".join(f"  - {{eval_time: 5m, alertname: {alert}, exp_alerts: []}}\n" for alert in ALERTS)
    (tmp_path / "tests.yaml").write_text(
        f"rule_files: [{tmp_path / 'rules.yaml'}]\ntests:\n- interval: 1m\n  alert_rule_test:\n{expected}"
    )
    command: list[str | Path] = [promtool, "test", "rules", tmp_path / "tests.yaml"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    said = told.stdout + told.stderr
    assert "error expanding" not in said
    for alert in ALERTS:
        (firing,) = re.findall(rf"alertname: {alert}, time: 5m.*?\n\s*got:(.*?)\]", said, flags=re.DOTALL)
        assert all(f'{annotation}="' in firing for annotation in ("summary", "description", "runbook")), alert
        assert 'severity="' in firing


def test_the_rules_are_about_metrics_that_exist(ensemble_metrics: str, server: EmbeddedTriton, tmp_path: Path) -> None:
    expressions = re.sub(r"#.*|(?s:annotations:.*?(?=\n      - |\Z))", "", RULES.read_text())
    used = set(re.findall(r"\b(?:stripwire|nv)_[a-z_]+\b(?!:)", expressions))
    registry = CollectorRegistry()
    MonitorMetrics(registry, canaries(calibrated_at=1.0, frr_upper=0.1, far_upper=0.1))
    OpenSsl(tmp_path).write_authority("own")
    tls = TlsOptions(private_key=tmp_path / "own.key", certificate_chain=tmp_path / "own.crt")
    registry.register(CertificateCollector(server.grpc_address, tls))
    headers = control_headers(server.control_token)
    control = ControlCheck(lambda: GuardedClient(server.grpc_address, headers=headers))
    control.try_now_and_then()
    registry.register(control)
    with FeedbackRecord(tmp_path / "record.sqlite") as record:
        registry.register(FeedbackCollector(record))
        shown = generate_latest(registry).decode()
    exist = set(re.findall(r"(?m)^(\w+)", shown + ensemble_metrics))
    assert used - exist == set()


@pytest.fixture(scope="module")
def ensemble_metrics(server: EmbeddedTriton) -> str:
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as answer:
        return str(answer.read().decode())
