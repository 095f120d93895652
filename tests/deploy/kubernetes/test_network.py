"""Nobody reaches, or is reached by, whom the guide does not name."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.deploy.kubernetes.manifests import (
    EVERYTHING,
    GUIDE,
    JOBS,
    OVERLAYS,
    Document,
    Pod,
    beside,
    mappings,
    matches,
    named,
    of_kind,
    pods,
    ports,
    rendered,
    selected,
    server,
)


def selectors(document: Document) -> Iterator[tuple[str, Document]]:
    """Yield every selector of pods of ours in a document, with where it stands."""
    if document["kind"] == "Service":
        yield ".spec.selector", {"matchLabels": document["spec"]["selector"]}
    for path, mapping in mappings(document):
        ours = {
            key: value for key, value in mapping.items() if key != "podSelector" or "namespaceSelector" not in mapping
        }
        for key in ("selector", "podSelector", "labelSelector"):
            if {"matchLabels", "matchExpressions"} & set(ours.get(key, {})):
                yield f"{path}.{key}", ours[key]


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_selector_picks_a_pod_by_each_of_its_values(name: str) -> None:
    everybody = [*beside(name), *(one for job in JOBS for one in rendered(job))]
    for document in rendered(name):
        for path, selector in selectors(document):
            # A Job's policy is for that Job; an overlay's may be for Jobs that come later.
            picked = selected(rendered(name) if name in JOBS else everybody, selector)
            for one in selector.get("matchExpressions", []):
                assert set(one["values"]) <= {pod.labels.get(one["key"]) for pod in picked}, f"{named(document)}{path}"


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_deployment_knows_its_own_pods_by_their_labels(name: str) -> None:
    for deployment in of_kind(rendered(name), "Deployment"):
        (pod,) = selected(rendered(name), deployment["spec"]["selector"])
        assert pod.name == deployment["metadata"]["name"]


def rules(name: str, pod: Pod, way: str) -> list[Document]:
    """Return the rules, for `Ingress` or `Egress`, of all policies that pick a pod."""
    policies = [one["spec"] for one in of_kind(beside(name), "NetworkPolicy")]
    picking = [one for one in policies if way in one["policyTypes"] and matches(one["podSelector"], pod.labels)]
    assert picking, f"{pod.name}: everything is open"
    return [rule for one in picking for rule in one.get(way.lower(), [])]


def who(name: str, peer: Document) -> str:
    """Return what one side of a rule is: a pod of ours, people of the guide, or part of the cluster."""
    if "ipBlock" in peer:
        return str(peer["ipBlock"]["cidr"])
    assert peer.get("podSelector"), f"everybody there: {peer}"
    pods_there = peer["podSelector"]["matchLabels"]
    if "namespaceSelector" not in peer:
        (pod,) = selected(beside(name), peer["podSelector"])
        return pod.component
    return f"{labels(pods_there)} in {labels(peer['namespaceSelector']['matchLabels'])}"


def labels(wanted: dict[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in wanted.items())


def opened(name: str, pod: Pod, way: str) -> set[tuple[str, str]]:
    """Return what a pod may be asked by whom, or whom it may ask for what: (port, other side)."""
    other = {"Ingress": "from", "Egress": "to"}[way]
    found = set()
    for rule in rules(name, pod, way):
        assert {"ports", other} <= rule.keys(), f"{pod.name}: everything, or everybody: {rule}"
        for port in rule["ports"]:
            for peer in rule[other]:
                found.add((f"{port['port']}/{port.get('protocol', 'TCP')}", who(name, peer)))
    return found


def people(label: str) -> str:
    """Return the pods that the guide has people label so, in the namespaces that it has them label, as `who` does."""
    assert f'`{label}: "true"`' in GUIDE
    (namespace,) = re.findall(r"`kubectl label namespace [A-Z]+ ([\w-]+=\w+)`", GUIDE)
    return f"{label}=true in {namespace}"


PROMETHEUS = "app.kubernetes.io/name=prometheus in kubernetes.io/metadata.name=monitoring"
DNS = "k8s-app=kube-dns in kubernetes.io/metadata.name=kube-system"


@pytest.mark.parametrize("name", OVERLAYS)
def test_nobody_reaches_a_port_but_whom_the_guide_names(name: str) -> None:
    callers, reviewers = people("stripwire-caller"), people("stripwire-reviewer")
    allowed = {
        "server": {"grpc": {callers, "feedback"}, "metrics": {PROMETHEUS}, "monitor": {PROMETHEUS}},
        "feedback": {"monitor": {reviewers, PROMETHEUS}},
    }
    for pod in pods(rendered(name)):
        numbers = {f"{number}/TCP": port for port, number in ports(pod).items()}
        reached: dict[str, set[str]] = {}
        for port, by in opened(name, pod, "Ingress"):
            if port in numbers:  # nobody listens on others
                reached.setdefault(numbers[port], set()).add(by)
        assert reached == allowed[pod.component]


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_port_of_a_policy_is_one_of_a_pod_that_it_is_about(name: str) -> None:
    for policy in of_kind(rendered(name), "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            there = {
                number
                for pod in selected(beside(name), policy["spec"]["podSelector"])
                for number in ports(pod).values()
            }
            assert {port["port"] for port in rule["ports"]} <= there, named(policy)


@pytest.mark.parametrize("name", EVERYTHING)
def test_nobody_gets_out_but_to_the_server_to_names_and_one_job_to_its_store(name: str) -> None:
    names = {("53/UDP", DNS), ("53/TCP", DNS)}
    grpc = ports(server("cpu" if name in JOBS else name))["grpc"]
    allowed = {
        "server": set(),
        "feedback": {(f"{grpc}/TCP", "server"), *names},
        "exporter": set(),
        "fetch": {("443/TCP", "0.0.0.0/0"), ("443/TCP", "::/0"), *names},
    }
    for pod in pods(rendered(name)):
        assert opened(name, pod, "Egress") == allowed[pod.component], pod.name
        if name in JOBS:
            assert opened(name, pod, "Ingress") == set(), pod.name


def test_the_namespace_refuses_pods_that_may_more_than_restricted_ones() -> None:
    for name in OVERLAYS:
        (namespace,) = of_kind(rendered(name), "Namespace")
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
