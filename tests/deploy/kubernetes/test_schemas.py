"""What kubectl makes of the manifests fits the schemas, to the last key."""

from __future__ import annotations

import copy
import json
import re

import pytest

from tests.deploy.grafana import board
from tests.deploy.kubernetes.manifests import EVERYTHING, Document, mappings, named, of_kind, rendered
from tests.deploy.kubernetes.schemas import CUSTOM, VERSIONS, fault


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", EVERYTHING)
def test_every_manifest_fits_its_schema(name: str, version: str) -> None:
    for document in rendered(name):
        assert fault(document, version) is None


FREE = re.compile(r"\.(labels|annotations|matchLabels|selector|limits|requests|selfSigned)$")
"""Where any key may stand."""


@pytest.mark.parametrize("kind", CUSTOM["kinds"])
def test_an_unknown_key_in_a_custom_resource_is_refused_wherever_it_stands(kind: str) -> None:
    found = [one for one in rendered("kserve+tls") if f"{one['apiVersion']} {one['kind']}" == kind]
    assert found
    places = [(one, path) for one in found for path, _ in mappings(one) if not FREE.search(path)]
    for document, path in places[:200]:  # there are hundreds of rules
        assert refused(document, path), path


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("Deployment", ".spec"),
        ("Deployment", ".spec.template.spec"),
        ("Deployment", ".spec.template.spec.containers[0]"),
        ("Deployment", ".spec.template.spec.containers[0].livenessProbe.httpGet"),
        ("Deployment", ".spec.template.spec.containers[0].securityContext"),
        ("HorizontalPodAutoscaler", ".spec.metrics[0].pods"),
        ("NetworkPolicy", ".spec"),
        ("PodDisruptionBudget", ".spec"),
        ("Service", ".spec.ports[0]"),
    ],
)
def test_an_unknown_key_in_what_kubernetes_knows_is_refused(kind: str, path: str) -> None:
    assert refused(of_kind(rendered("cpu"), kind)[0], path)


def refused(document: Document, path: str) -> bool:
    """Return whether one more key at a place of a document is a fault."""
    changed = copy.deepcopy(document)
    (place,) = (mapping for where, mapping in mappings(changed) if where == path)
    place["noSuchKey"] = "x"
    return fault(changed) is not None


@pytest.mark.parametrize("name", EVERYTHING)
def test_everything_is_in_one_namespace(name: str) -> None:
    for document in rendered(name):
        if document["kind"] != "Namespace":
            assert document["metadata"]["namespace"] == "stripwire", named(document)


def test_the_dashboard_is_that_of_grafana() -> None:
    (config,) = (one for one in of_kind(rendered("cpu"), "ConfigMap") if "stripwire.json" in one["data"])
    assert json.loads(config["data"]["stripwire.json"]) == board.load()
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
