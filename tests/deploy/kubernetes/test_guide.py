"""The operator's guide: what it has people write builds, and what it names is there."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from pathlib import Path

import pytest
import yaml

from deploy.kubernetes import prometheusrule
from tests.deploy.grafana import board
from tests.deploy.kubernetes.manifests import (
    EVERYTHING,
    GUIDE,
    KUBERNETES,
    ROOT,
    kustomize,
    named,
    of_kind,
    parsed,
    pods,
    ports,
    rendered,
    selected,
)
from tests.deploy.kubernetes.schemas import fault

RULES = prometheusrule.RULES.read_text()


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with all that the guide says to write, and the repository in it as `stripwire`."""
    folder = tmp_path_factory.mktemp("guided")
    shutil.copytree(ROOT / "deploy", folder / "stripwire" / "deploy")
    for indent, path, text in re.findall(r"(?sm)^( *)```yaml\n *# ([\w./-]+)\n(.*?)^ *```", GUIDE):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(textwrap.dedent(text) if indent else text)
    written = [*folder.glob("*.yaml"), *folder.glob("[!s]*/*.yaml"), *folder.glob("signs/*.yaml")]
    assert len(written) == GUIDE.count("```yaml")
    return folder


@pytest.mark.parametrize("place", [".", "files", "release", "fetched", "without-cert-manager", "signs", "rotation"])
def test_every_kustomization_of_the_guide_builds(guided: Path, place: str, tmp_path: Path) -> None:
    made = kustomize(guided / place)
    for document in made:
        assert fault(document) is None
    images = {container["image"] for pod in pods(made) for container in pod.containers}
    if place in (".", "files", "release", "fetched", "rotation"):
        assert not [image for image in images if "invalid" in image]
    if place == ".":
        assert [one["data"] for one in of_kind(made, "ConfigMap") if "mode" in one["data"]] == [
            {"release": "1", "mode": "shadow"}
        ]
        assert of_kind(made, "Certificate")
        assert "observability" in json.dumps(of_kind(made, "NetworkPolicy"))
        claims = {one["metadata"]["name"]: one["spec"] for one in of_kind(made, "PersistentVolumeClaim")}
        assert claims.pop("stripwire-record").keys() == {"accessModes", "resources"}
        assert [claim["storageClassName"] for claim in claims.values()] == ["many-readers"] * 2
    if place in ("release", "rotation"):
        (job,) = of_kind(made, "Job")
        (data,) = (one["data"] for one in of_kind(made, "ConfigMap"))
        assert job["metadata"]["name"] == f"stripwire-release-{data['release']}"
        (canaries,) = job["spec"]["template"]["spec"]["containers"]
        assert canaries["args"][:3] == ["canaries", "/data/test.h5", "/data/trojaned.h5"]
        for container in pods(made)[0].containers:
            if "command" not in container:
                parsed(container["args"], tmp_path)
    if place == "without-cert-manager":
        assert not [one for one in made if "cert-manager" in one["apiVersion"]]
        assert "stripwire-server-tls" in json.dumps(made)
    if place == "signs":
        assert {one["metadata"].get("namespace", "signs") for one in made} == {"signs"}
        assert not of_kind(made, "PrometheusRule")
        assert "grafana_dashboard" not in json.dumps(made)
        (names,) = (one["spec"]["dnsNames"] for one in of_kind(made, "Certificate") if "dnsNames" in one["spec"])
        assert {"stripwire.signs.svc", "stripwire-headless.signs.svc.cluster.local"} <= set(names)
        assert not [name for name in names if name.endswith("stripwire.svc")]


def test_the_ingress_of_the_guide_leads_to_the_page(guided: Path) -> None:
    ingress, policy = yaml.safe_load_all((guided / "page" / "ingress.yaml").read_text())
    for document in (ingress, policy):
        assert fault(document) is None
    ((path,),) = (rule["http"]["paths"] for rule in ingress["spec"]["rules"])
    wanted = path["backend"]["service"]
    (service,) = (one for one in of_kind(rendered("cpu"), "Service") if one["metadata"]["name"] == wanted["name"])
    assert wanted["port"]["name"] in [port["name"] for port in service["spec"]["ports"]]
    (pod,) = selected(rendered("cpu"), policy["spec"]["podSelector"])
    assert [port["port"] for port in policy["spec"]["ingress"][0]["ports"]] == [ports(pod)["monitor"]]


def test_every_resource_and_container_that_the_guide_has_kubectl_ask_for_is_there() -> None:
    there = {named(document).lower() for name in EVERYTHING for document in rendered(name)}
    asked = {f"{kind} {name}" for kind, name in re.findall(r"\b(deployment|pod)/([\w-]+)", GUIDE)}
    asked |= {f"{kind} {name}" for kind, name in re.findall(r"\b(Deployment|ConfigMap) `([\w-]+)`", GUIDE)}
    assert {one.lower() for one in asked} - {re.sub(r"-[0-9a-z]{10}$", "", one) for one in there} == set()
    containers = {one["name"] for name in EVERYTHING for pod in pods(rendered(name)) for one in pod.containers}
    assert set(re.findall(r"(?:kubectl [^`\n]*|`)-c (\w+)", GUIDE)) <= containers


ALERTS = {
    rule["alert"]: rule["annotations"]
    for group in yaml.safe_load(RULES)["groups"]
    for rule in group["rules"]
    if "alert" in rule
}


@pytest.mark.parametrize("alert", sorted(ALERTS))
def test_every_alert_links_its_section_of_the_guide(alert: str) -> None:
    assert ALERTS[alert]["runbook_url"] == f"docs/operate.md#{alert.lower()}"
    assert f"\n### {alert}\n" in GUIDE


def test_the_guide_has_no_section_on_an_alert_that_is_gone() -> None:
    assert set(re.findall(r"(?m)^### (Stripwire\w+)$", GUIDE)) == set(ALERTS)


def test_the_guide_reads_every_row_of_the_dashboard() -> None:
    for panel in board.load()["panels"]:
        if panel["type"] == "row":
            assert f"| {panel['title']} |" in GUIDE, panel["title"]


def test_every_file_and_metric_that_the_guide_names_exists() -> None:
    for path in re.findall(r"\bdeploy/[\w/.-]+", GUIDE):
        assert (ROOT / path.rstrip(".")).exists(), path
    known = RULES + (ROOT / "docs" / "monitoring.md").read_text() + (KUBERNETES / "prometheus-adapter.yaml").read_text()
    for metric in re.findall(r"`(stripwire[_:][\w:]+)", GUIDE):
        assert metric in known, metric
