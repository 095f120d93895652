"""Probes, scraping and scaling ask for what is there, and get the answers that they are for."""

from __future__ import annotations

import asyncio
import functools
import re
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client import CollectorRegistry

from client.monitor.access import Access
from client.monitor.app import MonitorApp
from client.monitor.health import Health, Status
from client.monitor.metrics import MonitorMetrics
from client.monitor.record import FeedbackRecord
from client.monitor.settings import MonitorSettings
from deploy.kubernetes import prometheusrule
from tests.client.monitor.conftest import canaries
from tests.deploy.grafana import board
from tests.deploy.kubernetes.manifests import (
    KUBERNETES,
    OVERLAYS,
    SECRETS,
    Document,
    Pod,
    environment,
    is_monitor,
    literals,
    of_kind,
    pods,
    ports,
    quantity,
    rendered,
    selected,
    server,
)

RULES = prometheusrule.RULES.read_text()
(ADAPTER,) = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
STATES = {
    "starting": Status(ready=False, live=True, why="no canary was sent yet"),
    "serving": Status(ready=True, live=True, why=""),
    "dead": Status(ready=False, live=False, why="canaries fail"),
}
"""What a monitor may think of its server."""


class Told(Health):
    """Thinks of a server as it is told to."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def status(self) -> Status:
        """Return what it was told."""
        return self._status


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return how the monitor answers on a path, in each of the states."""
    registry = CollectorRegistry()
    access = Access(None, MonitorMetrics(registry, canaries()))

    async def get(health: Health, record: FeedbackRecord, path: str) -> int:
        app = MonitorApp(health, record, access, registry).asgi
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://monitor") as http:
            return (await http.get(path)).status_code

    @functools.cache
    def ask(path: str) -> dict[str, bool]:
        with FeedbackRecord(tmp_path_factory.mktemp("record") / "record.sqlite") as record:
            return {
                state: asyncio.run(get(Told(status), record, path)) == httpx.codes.OK
                for state, status in STATES.items()
            }

    return ask


def probes(container: Document) -> dict[str, Document]:
    kinds = ("startup", "readiness", "liveness")
    return {kind: container[f"{kind}Probe"] for kind in kinds if f"{kind}Probe" in container}


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_probe_asks_a_port_of_its_pod_by_a_name_that_its_container_has(name: str) -> None:
    for pod in pods(rendered(name)):
        for container in pod.containers:
            own = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
            for probe in probes(container).values():
                port = (probe.get("httpGet") or probe["tcpSocket"])["port"]
                assert port in (own if isinstance(port, str) else ports(pod).values()), container["name"]


def asked(pod: Pod, container: Document, probe: Document) -> Document:
    """Return the container of a pod that a probe asks."""
    port = (probe.get("httpGet") or probe["tcpSocket"])["port"]
    own = {one["name"]: one["containerPort"] for one in container.get("ports", [])}
    (found,) = (
        one
        for one in pod.containers
        if own.get(port, port) in [opened["containerPort"] for opened in one.get("ports", [])]
    )
    return found


@pytest.mark.parametrize("name", OVERLAYS)
def test_triton_is_judged_by_canaries_and_a_monitor_by_nothing_that_its_server_does(name: str, answers: Any) -> None:
    for pod in pods(rendered(name)):
        for container in pod.containers:
            if is_monitor(container):
                for kind, probe in probes(container).items():
                    assert asked(pod, container, probe) == container, f"{pod.name}: {kind}"
                    assert all(answers(probe["httpGet"]["path"]).values()), f"{pod.name}: {kind}"
    judged = probes(server(name).triton)
    assert {kind: answers(probe["httpGet"]["path"]) for kind, probe in judged.items()} == {
        "startup": {"starting": False, "serving": True, "dead": False},
        "readiness": {"starting": False, "serving": True, "dead": False},
        "liveness": {"starting": True, "serving": True, "dead": False},
    }
    for probe in judged.values():
        assert asked(server(name), server(name).triton, probe) == server(name).container("monitor")


@pytest.mark.parametrize("name", OVERLAYS)
def test_nobody_is_killed_before_they_can_have_answered(name: str) -> None:
    for pod in pods(rendered(name)):
        for container in pod.containers:
            for kind, probe in probes(container).items():
                where = f"{pod.name}: {container['name']}: {kind}"
                assert probe.get("timeoutSeconds", 1) <= probe["periodSeconds"], where
                assert kind == "readiness" or probe["failureThreshold"] > 1, where
                if "terminationGracePeriodSeconds" in probe:
                    assert kind != "readiness", where
                    assert probe["terminationGracePeriodSeconds"] < pod.spec["terminationGracePeriodSeconds"], where
    patience = {
        kind: one["periodSeconds"] * one["failureThreshold"] for kind, one in probes(server(name).triton).items()
    }
    back = probes(server(name).container("monitor"))["startup"]
    assert patience["liveness"] >= back["periodSeconds"] * back["failureThreshold"], "killed for its monitor's sake"
    for deployment in of_kind(rendered(name), "Deployment"):
        assert patience["startup"] < deployment["spec"].get("progressDeadlineSeconds", 600)


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_setting_of_a_monitor_is_one_and_it_listens_where_the_kubelet_asks(name: str) -> None:
    for pod in pods(rendered(name)):
        for container in filter(is_monitor, pod.containers):
            variables = environment(name, container, SECRETS)
            given = {key.removeprefix("STRIPWIRE_").lower(): value for key, value in variables.items()}
            assert given.pop("release").isdigit()
            host, port = MonitorSettings.model_validate(given).address
            assert host == "0.0.0.0"  # noqa: S104  the pod's address
            assert [port] == [one["containerPort"] for one in container["ports"]]


@pytest.mark.parametrize("name", OVERLAYS)
def test_prometheus_scrapes_every_pod_under_the_jobs_of_the_rules(name: str, answers: Any) -> None:
    (monitor,) = of_kind(rendered(name), "PodMonitor")
    watched = selected(rendered(name), monitor["spec"]["selector"])
    assert sorted(pod.component for pod in watched) == ["feedback", "server"]
    jobs = {}
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        job, dropped = endpoint["relabelings"]
        jobs[endpoint["port"]] = job["replacement"]
        assert job["targetLabel"] == "job"
        assert dropped == {"action": "labeldrop", "regex": "container|endpoint"}
        # Triton has its page at the same path.
        assert endpoint.get("path", "/metrics") == "/metrics"
        assert all(answers("/metrics").values())
        shortest = min(int(minutes) * 60 for minutes in re.findall(r"\[(\d+)m\]", RULES + ADAPTER["metricsQuery"]))
        assert re.fullmatch(r"\d+s", endpoint["interval"])
        assert 4 * int(endpoint["interval"].removesuffix("s")) <= shortest, "a rate needs samples"
    assert set(jobs) == {"metrics", "monitor"}
    assert set(jobs.values()) == set(re.findall(r'up\{job="([\w-]+)"\}', RULES))
    for pod in watched:
        assert jobs.keys() & ports(pod).keys(), pod.name
    assert jobs["metrics"] == "stripwire-triton"


@pytest.mark.parametrize("name", OVERLAYS)
def test_triton_tells_the_quantiles_that_rules_and_dashboard_ask_for(name: str) -> None:
    expressions = RULES + "".join(target.expression for panel in board.panels() for target in board.targets(panel))
    wanted = set(re.findall(r'nv_\w*summary\w*\{[^}]*quantile="([\d.]+)"', expressions))
    assert wanted
    config = [text.partition("=")[2] for text in server(name).triton["args"] if text.startswith("--metrics-config=")]
    assert "summary_latencies=true" in config
    (quantiles,) = (one.partition("=")[2] for one in config if one.startswith("summary_quantiles="))
    told = dict(one.split(":") for one in quantiles.split(","))
    assert wanted <= told.keys()
    assert all(0 < float(error) < 0.1 for error in told.values())


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_autoscaler_goes_by_the_metric_that_the_adapter_makes_of_a_series(name: str) -> None:
    (scaler,) = of_kind(rendered(name), "HorizontalPodAutoscaler")
    (metric,) = (one["pods"] for one in scaler["spec"]["metrics"])
    assert metric["metric"] == {"name": ADAPTER["name"]["as"]}
    assert metric["target"]["type"] == "AverageValue"
    assert 0 < quantity(metric["target"]["averageValue"]) < 1, "seconds in a queue"
    series, _, chosen = ADAPTER["seriesQuery"].partition("{")
    assert re.search(ADAPTER["name"]["matches"], series)
    assert series in ADAPTER["metricsQuery"]
    # Whose series it is, is in the labels that Prometheus gives each pod's.
    resources = ADAPTER["resources"]["overrides"]
    assert resources == {"namespace": {"resource": "namespace"}, "pod": {"resource": "pod"}}
    assert all(f'{label}!=""' in chosen for label in resources)
    assert 1 < scaler["spec"]["minReplicas"] < scaler["spec"]["maxReplicas"]


def test_rejected_inputs_of_all_pods_together_fit_their_volume() -> None:
    (claim,) = (
        one
        for one in of_kind(rendered("cpu"), "PersistentVolumeClaim")
        if one["metadata"]["name"] == "stripwire-quarantine"
    )
    kept = literals(server("cpu").triton)["STRIPWIRE_QUARANTINE_BYTES"]
    assert int(kept) <= quantity(claim["spec"]["resources"]["requests"]["storage"]) / 2
