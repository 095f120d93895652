"""The PrometheusRule is the rules of Prometheus, with runbooks where they can be read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deploy.kubernetes import prometheusrule
from tests.conftest import program
from tests.deploy.kubernetes.manifests import ROOT, of_kind, rendered

RULES = prometheusrule.RULES.read_text()
COPY = "https://git.example/stripwire/blob/main"


def test_the_rules_are_those_of_prometheus() -> None:
    assert prometheusrule.FILE.read_text() == prometheusrule.prometheus_rule(RULES), "run `make prometheusrule`"
    (rule,) = of_kind(rendered("cpu"), "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(RULES)


@pytest.mark.parametrize("end", ["", "/"])
def test_runbooks_are_links_where_it_is_said_where_they_can_be_read(end: str) -> None:
    linked = yaml.safe_load(prometheusrule.prometheus_rule(prometheusrule.with_links(RULES, f"{COPY}{end}")))
    alerts = [rule for group in linked["spec"]["groups"] for rule in group["rules"] if "alert" in rule]
    assert alerts
    for alert in alerts:
        annotations = alert["annotations"]
        assert annotations["runbook_url"] == f"{COPY}/docs/operate.md#{alert['alert'].lower()}"
        annotations["runbook_url"] = annotations["runbook_url"].removeprefix(f"{COPY}/")
    assert linked["spec"] == yaml.safe_load(RULES)  # and nothing else has changed


def test_a_prometheus_without_the_operator_gets_a_file_of_rules(tmp_path: Path) -> None:
    committed = prometheusrule.FILE.read_text()
    command = [sys.executable, "-m", "deploy.kubernetes.prometheusrule", "--plain", str(tmp_path / "rules.yaml")]
    subprocess.run([*command, "--runbooks", COPY], cwd=ROOT, check=True)
    assert (tmp_path / "rules.yaml").read_text() == prometheusrule.with_links(RULES, COPY)
    promtool = program("promtool", "apt-get install prometheus")
    subprocess.run([promtool, "check", "rules", tmp_path / "rules.yaml"], check=True, capture_output=True)
    assert prometheusrule.FILE.read_text() == committed


@pytest.mark.parametrize(
    "runbooks", ["docs", "ftp://git.example/", "https://git.example/a b", "https://git.example/#top"]
)
def test_what_is_no_place_for_runbooks_is_refused(runbooks: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deploy.kubernetes.prometheusrule", "--plain", str(tmp_path / "rules.yaml")]
    ended = subprocess.run([*command, "--runbooks", runbooks], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "expected one such as https://git.example/stripwire/blob/main/" in ended.stderr
    assert not (tmp_path / "rules.yaml").exists()
