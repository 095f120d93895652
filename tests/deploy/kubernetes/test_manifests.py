"""The manifests: what kubectl makes of them fits the schemas, and whatever one of them names, there is."""

from __future__ import annotations

import copy
import functools
import importlib.resources
import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from referencing import Registry, Resource

from deploy.kubernetes import prometheusrule
from tests.conftest import program
from tests.deploy.grafana import board
from tests.deploy.kubernetes.manifests import (
    COMPONENTS,
    EVERYTHING,
    KUBERNETES,
    OVERLAYS,
    ROOT,
    Document,
    Pod,
    kustomize,
    mappings,
    of_kind,
    pods,
    ports,
    rendered,
    server,
)

RULES = prometheusrule.RULES.read_text()
GUIDE = (ROOT / "docs" / "operate.md").read_text()
CUSTOM = json.loads((Path(__file__).parent / "crds.json").read_text())
VERSIONS = ("1.30", kubernetes_validate.latest_version())
"""The oldest Kubernetes that has all we ask of it by default, and the newest that there is a schema of."""


def custom_schema(document: Document) -> str | None:
    """Return the name of a custom resource's schema; None for what Kubernetes itself knows."""
    name: str | None = CUSTOM["kinds"].get(f"{document['apiVersion']} {document['kind']}")
    return name


@functools.cache
def custom_validator(name: str) -> Any:
    """Return what checks a custom resource; what it embeds of Kubernetes is as strict."""
    schemas = importlib.resources.files(kubernetes_validate) / "kubernetes-json-schema"
    strict = schemas / f"v{kubernetes_validate.latest_version()}-local-strict" / "_definitions.json"
    registry = Resource.from_contents(json.loads(strict.read_text())) @ Registry()
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$ref": f"#/$defs/{name}",
        "$defs": CUSTOM["$defs"],
    }
    return jsonschema.Draft202012Validator(schema, registry=registry)


@functools.cache
def fault(text: str, version: str) -> str | None:
    """Return what is wrong with a document, given as JSON, to the last key; None where nothing is."""
    document = json.loads(text)
    name = custom_schema(document)
    try:
        if name is not None:
            custom_validator(name).validate(document)
        else:
            kubernetes_validate.validate(document, version, strict=True)
    except jsonschema.ValidationError as error:
        return f"{named(document)}: {error.json_path}: {error.message}"
    return None


def named(document: Document) -> str:
    return f"{document['kind']} {document['metadata']['name']}"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", EVERYTHING)
def test_every_manifest_fits_its_schema(name: str, version: str) -> None:
    for document in rendered(name):
        assert fault(json.dumps(document), version) is None


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
    return fault(json.dumps(changed), VERSIONS[-1]) is not None


def test_the_rules_are_those_of_prometheus() -> None:
    written = prometheusrule.FILE.read_text()
    assert written == prometheusrule.prometheus_rule(RULES), "run `make prometheusrule`"
    (rule,) = of_kind(rendered("cpu"), "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(RULES)


COPY = "https://git.example/stripwire/blob/main"


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


def test_the_dashboard_is_that_of_grafana() -> None:
    (config,) = (one for one in of_kind(rendered("cpu"), "ConfigMap") if "stripwire.json" in one["data"])
    assert json.loads(config["data"]["stripwire.json"]) == board.load()
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"


@pytest.mark.parametrize("name", EVERYTHING)
def test_everything_is_in_one_namespace(name: str) -> None:
    for document in rendered(name):
        if document["kind"] != "Namespace":
            assert document["metadata"]["namespace"] == "stripwire", named(document)


def test_a_change_of_release_is_a_rollout() -> None:
    first, second = (of_kind(rendered(name), "ConfigMap") for name in ("cpu", "cpu+tls"))
    names = [
        next(one["metadata"]["name"] for one in maps if one["data"].get("release") == release)
        for maps, release in ((first, "1"), (second, "2"))
    ]
    assert len(set(names)) == 2
    for name, overlay in zip(names, ("cpu", "cpu+tls"), strict=True):
        assert name in json.dumps(server(overlay).spec)


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


@pytest.mark.parametrize("place", [".", "files", "release", "without-cert-manager", "signs", "rotation"])
def test_every_kustomization_of_the_guide_builds(guided: Path, place: str) -> None:
    made = kustomize(guided / place)
    for document in made:
        assert fault(json.dumps(document), VERSIONS[-1]) is None
    images = {container["image"] for pod in pods(made) for container in pod.containers}
    if place in (".", "files", "release", "rotation"):
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
    if place == "without-cert-manager":
        assert not [one for one in made if "cert-manager" in one["apiVersion"]]
        assert "stripwire-server-tls" in json.dumps(made)
    if place == "signs":
        assert {one["metadata"].get("namespace", "signs") for one in made} == {"signs"}
        assert not of_kind(made, "PrometheusRule")
        (names,) = (one["spec"]["dnsNames"] for one in of_kind(made, "Certificate") if "dnsNames" in one["spec"])
        assert {"stripwire.signs.svc", "stripwire-headless.signs.svc.cluster.local"} <= set(names)
        assert not [name for name in names if name.endswith("stripwire.svc")]


def test_the_ingress_of_the_guide_leads_to_the_page(guided: Path) -> None:
    ingress, policy = yaml.safe_load_all((guided / "page" / "ingress.yaml").read_text())
    for document in (ingress, policy):
        assert fault(json.dumps(document), VERSIONS[-1]) is None
    ((path,),) = (rule["http"]["paths"] for rule in ingress["spec"]["rules"])
    wanted = path["backend"]["service"]
    (service,) = (one for one in of_kind(rendered("cpu"), "Service") if one["metadata"]["name"] == wanted["name"])
    assert wanted["port"]["name"] in [port["name"] for port in service["spec"]["ports"]]
    (pod,) = selected(rendered("cpu"), policy["spec"]["podSelector"])
    assert [port["port"] for port in policy["spec"]["ingress"][0]["ports"]] == [ports(pod)["monitor"]]


def references(node: Any) -> Iterator[tuple[str, str, str | None]]:
    """Yield what a pod asks for: kind, name and, where it asks for one, key."""
    for _, mapping in mappings(node):
        for key, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
            if key in mapping:
                yield kind, mapping[key]["name"], mapping[key]["key"]
        if "persistentVolumeClaim" in mapping:
            yield "PersistentVolumeClaim", mapping["persistentVolumeClaim"]["claimName"], None
        if "configMap" in mapping:
            yield "ConfigMap", mapping["configMap"]["name"], None
        if "secretName" in mapping:
            yield "Secret", mapping["secretName"], None
        if "secretRef" in mapping:
            yield "Secret", mapping["secretRef"]["name"], None
        if "serviceAccountName" in mapping:
            yield "ServiceAccount", mapping["serviceAccountName"], None


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_config_map_secret_claim_and_account_that_a_pod_asks_for_is_there(name: str) -> None:
    documents = [*rendered(name), *rendered("cpu")]  # Jobs are applied beside an overlay
    issued = {one["spec"]["secretName"] for one in of_kind(documents, "Certificate")}
    for pod in pods(rendered(name)):
        for kind, wanted, key in references(pod.spec):
            if kind == "Secret":
                told = f"secret generic {wanted}" in GUIDE and (key is None or f"--from-literal={key}=" in GUIDE)
                assert wanted in issued or told, f"{pod.name}: {wanted}, {key}"
                continue
            found = [one for one in of_kind(documents, kind) if one["metadata"]["name"] == wanted]
            assert found, f"{pod.name}: {kind} {wanted}"
            assert key is None or key in found[0]["data"], f"{pod.name}: {kind} {wanted}, {key}"


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_path_in_a_container_lies_on_a_volume_of_the_pod(name: str) -> None:
    for pod in pods(rendered(name)):
        volumes = {volume["name"] for volume in pod.spec["volumes"]}
        used = set()
        for container in pod.containers:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            used |= set(mounts.values())
            assert set(mounts.values()) <= volumes, f"{pod.name}: {container['name']}"
            values = [entry.get("value", "") for entry in container.get("env", [])]
            for text in [*container.get("args", []), *values]:
                for path in re.findall(r"(?:^|=)(/[a-z].*)", text):
                    assert path.startswith(tuple(mounts)), f"{pod.name}: {container['name']}: {path}"
        assert used == volumes, f"{pod.name}: mounts of what is not there, or volumes that nobody mounts"


def test_nothing_but_the_jobs_can_write_a_release() -> None:
    for name in OVERLAYS:
        for pod in pods(rendered(name)):
            (volume,) = (one for one in pod.spec["volumes"] if one["name"] == "releases")
            assert volume["persistentVolumeClaim"]["readOnly"] is True, f"{name}: {pod.name}"


def matches(selector: Document, labels: dict[str, str]) -> bool:
    """Return whether a label selector picks those labels."""
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", [])
    )


def selected(documents: list[Document], selector: Document) -> list[Pod]:
    found = [pod for pod in pods(documents) if matches(selector, pod.labels)]
    assert found, f"{selector} picks no pod"
    return found


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_service_reaches_a_port_of_a_pod(name: str) -> None:
    services = of_kind(rendered(name), "Service")
    assert {one["metadata"]["name"] for one in services} == {"stripwire", "stripwire-headless", "stripwire-feedback"}
    for service in services:
        for pod in selected(rendered(name), {"matchLabels": service["spec"]["selector"]}):
            # Not of sidecars: not every Kubernetes finds their ports by name.
            own = {port["name"]: port["containerPort"] for port in pod.spec["containers"][0]["ports"]}
            for port in service["spec"]["ports"]:
                assert own.get(port["targetPort"], port["targetPort"]) == ports(pod)[port["name"]]
                assert port["port"] == {"grpc": 8001, "monitor": 8003}[port["name"]]
    (headless,) = (one for one in services if one["metadata"]["name"] == "stripwire-headless")
    assert headless["spec"]["clusterIP"] == "None"


@pytest.mark.parametrize("name", OVERLAYS)
def test_budget_spread_and_autoscaler_are_about_the_server(name: str) -> None:
    documents, pod = rendered(name), server(name)
    (budget,) = of_kind(documents, "PodDisruptionBudget")
    assert selected(documents, budget["spec"]["selector"]) == [pod]
    (scaler,) = of_kind(documents, "HorizontalPodAutoscaler")
    assert scaler["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": pod.name}
    assert scaler["spec"]["minReplicas"] > budget["spec"]["maxUnavailable"]
    (spread,) = pod.spec["topologySpreadConstraints"]
    (apart,) = pod.spec["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    for selector in (spread["labelSelector"], apart["podAffinityTerm"]["labelSelector"]):
        assert selected(documents, selector) == [pod]
    assert all(
        "replicas" not in one["spec"] for one in of_kind(documents, "Deployment") if one["metadata"]["name"] == pod.name
    )


@pytest.mark.parametrize("name", OVERLAYS)
def test_network_policies_open_ports_that_exist_and_no_way_out_of_the_server(name: str) -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind(rendered(name), "NetworkPolicy")}
    assert policies["nothing-by-default"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    (pod,) = selected(rendered(name), policies["server"]["podSelector"])
    assert pod == server(name)
    assert policies["server"]["egress"] == []
    assert policies["server"]["policyTypes"] == ["Ingress", "Egress"]
    (grpc,) = policies["server"]["ingress"]
    assert [port["port"] for port in grpc["ports"]] == [ports(pod)["grpc"]]
    (feedback,) = selected(rendered(name), grpc["from"][1]["podSelector"])
    assert feedback.name == "stripwire-feedback"
    assert selected(rendered(name), policies["feedback"]["podSelector"]) == [feedback]
    (opened,) = policies["feedback"]["ingress"]
    assert [port["port"] for port in opened["ports"]] == [ports(feedback)["monitor"]]
    (asks,) = policies["feedback"]["egress"]
    assert selected(rendered(name), asks["to"][0]["podSelector"]) == [pod]
    assert [port["port"] for port in asks["ports"]] == [ports(pod)["grpc"]]
    (metrics,) = policies["prometheus"]["ingress"]
    assert [port["port"] for port in metrics["ports"]] == [ports(pod)["metrics"], ports(pod)["monitor"]]
    assert selected(rendered(name), policies["prometheus"]["podSelector"]) == [feedback, pod] or [pod, feedback]
    assert selected(rendered(name), policies["dns"]["podSelector"]) == [feedback]
    assert policies["dns"]["policyTypes"] == ["Egress"]
    (fetching,) = pods(rendered("fetch"))
    assert matches(policies["dns"]["podSelector"], fetching.labels)
    for rule in (grpc, opened, metrics):
        for peer in rule["from"]:
            assert peer["podSelector"], "everybody in that namespace"


@pytest.mark.parametrize("name", OVERLAYS)
def test_prometheus_scrapes_every_pod_under_the_jobs_of_the_rules(name: str) -> None:
    (monitor,) = of_kind(rendered(name), "PodMonitor")
    watched = selected(rendered(name), monitor["spec"]["selector"])
    assert sorted(pod.labels["app.kubernetes.io/component"] for pod in watched) == ["feedback", "server"]
    jobs = {}
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        job, dropped = endpoint["relabelings"]
        jobs[endpoint["port"]] = job["replacement"]
        assert job["targetLabel"] == "job"
        assert dropped == {"action": "labeldrop", "regex": "container|endpoint"}
    assert set(jobs) == {"metrics", "monitor"}
    assert set(jobs.values()) == set(re.findall(r'up\{job="([\w-]+)"\}', RULES))
    for pod in watched:
        assert jobs.keys() & ports(pod).keys(), pod.name
    assert jobs["metrics"] == "stripwire-triton"


@pytest.mark.parametrize("name", OVERLAYS)
def test_triton_is_judged_by_the_monitor_beside_it(name: str) -> None:
    pod = server(name)
    triton = pod.triton
    asked = {kind: triton[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    assert {kind: get["path"] for kind, get in asked.items()} == {
        "startup": "/readyz",
        "readiness": "/readyz",
        "liveness": "/livez",
    }
    environment = {entry["name"]: entry.get("value") for entry in pod.container("monitor")["env"]}
    host, _, port = str(environment["STRIPWIRE_LISTEN"]).rpartition(":")
    assert host == "0.0.0.0"  # noqa: S104  the kubelet asks the pod's address
    assert {get["port"] for get in asked.values()} == {int(port)} == {ports(pod)["monitor"]}
    grpc = number(triton["args"], "grpc-port")
    assert environment["STRIPWIRE_URL"] == f"127.0.0.1:{grpc}"
    assert environment["STRIPWIRE_METRICS_URL"] == f"http://127.0.0.1:{ports(pod)['metrics']}/metrics"


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_repository_is_verified_before_anything_starts(name: str) -> None:
    first, second, *others = server(name).spec["initContainers"]
    assert all(one["restartPolicy"] == "Always" for one in others)
    assert first["args"][0] == "verify"
    assert "restartPolicy" not in first
    assert (second["name"], second["restartPolicy"]) == ("monitor", "Always")
    (served,) = (text for text in server(name).triton["args"] if text.startswith("--model-repository="))
    assert served == f"--model-repository={first['args'][1]}"


def number(arguments: list[str], option: str) -> int:
    (value,) = (text.partition("=")[2] for text in arguments if text.startswith(f"--{option}="))
    return int(value)


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_drain_lasts_until_callers_have_gone_and_requests_are_answered(name: str) -> None:
    pod = server(name)
    preparing = pod.triton["lifecycle"]["preStop"]["sleep"]["seconds"]
    age = number(pod.triton["args"], "grpc-max-connection-age") / 1000
    answering = number(pod.triton["args"], "exit-timeout-secs")
    assert preparing > 1.1 * age + 5  # gRPC adds up to a tenth, and everybody must hear that the pod is leaving
    assert pod.spec["terminationGracePeriodSeconds"] > preparing + answering


@pytest.mark.parametrize("name", EVERYTHING)
def test_no_container_may_more_than_it_must(name: str) -> None:
    for pod in pods(rendered(name)):
        assert pod.spec["securityContext"]["runAsNonRoot"] is True
        assert pod.spec["securityContext"]["runAsUser"] > 0
        assert pod.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod.spec["automountServiceAccountToken"] is False
        assert pod.spec["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys()
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, f"{pod.name}: {container['name']}"


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_container_says_its_version_and_what_it_needs(name: str) -> None:
    for pod in pods(rendered(name)):
        for container in pod.containers:
            assert re.fullmatch(r"[a-z/.]+:(distroless-v)?[0-9.]+", container["image"]), (
                f"{pod.name}: {container['image']}"
            )
            for kind in ("requests", "limits"):
                assert container["resources"][kind].keys() >= {"cpu", "memory", "ephemeral-storage"}


def test_the_python_backend_has_shared_memory_in_every_overlay() -> None:
    for name in OVERLAYS:
        pod = server(name)
        (mount,) = (one for one in pod.triton["volumeMounts"] if one["mountPath"] == "/dev/shm")  # noqa: S108
        (volume,) = (one for one in pod.spec["volumes"] if one["name"] == mount["name"])
        assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}


def test_only_the_gpu_overlay_asks_for_a_gpu() -> None:
    for name in OVERLAYS:
        asks = "nvidia.com/gpu" in server(name).triton["resources"]["limits"]
        assert asks == name.startswith("gpu")


def without_place(pod: Pod) -> tuple[Document, Document]:
    """Return a pod's container of Triton and the rest of it, without what must differ in KServe."""
    spec = copy.deepcopy(pod.spec)
    for key in ("labels", "minReplicas", "maxReplicas", "deploymentStrategy", "containers"):
        spec.pop(key, None)
    return {key: value for key, value in pod.triton.items() if key != "name"}, spec


@pytest.mark.parametrize("component", ["", *(f"+{one}" for one in COMPONENTS)])
def test_kserve_runs_the_very_pod_that_the_deployment_runs(component: str) -> None:
    ours, theirs = (without_place(server(f"{name}{component}")) for name in ("cpu", "kserve"))
    ours_text, theirs_text = (json.dumps(one, sort_keys=True) for one in (ours, theirs))
    assert json.loads(theirs_text) == json.loads(ours_text)
    (service,) = of_kind(rendered(f"kserve{component}"), "InferenceService")
    (scaler,) = of_kind(rendered(f"kserve{component}"), "HorizontalPodAutoscaler")
    predictor = service["spec"]["predictor"]
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (
        scaler["spec"]["minReplicas"],
        scaler["spec"]["maxReplicas"],
    )


@pytest.mark.parametrize("name", [name for name in OVERLAYS if "+" in name])
def test_with_tls_both_sides_show_certificates_that_fit(name: str) -> None:
    documents, pod = rendered(name), server(name)
    if name.endswith("+tls"):
        arguments = set(pod.triton["args"])
        assert {"--grpc-use-ssl=true", "--grpc-use-ssl-mutual=true", "--allow-http=false"} <= arguments
    certificates = {one["spec"]["secretName"]: one["spec"] for one in of_kind(documents, "Certificate")}
    issuers = {one["metadata"]["name"]: one["spec"] for one in of_kind(documents, "Issuer")}
    for spec in certificates.values():
        assert spec["issuerRef"]["name"] in issuers
    for spec in issuers.values():
        assert "selfSigned" in spec or certificates[spec["ca"]["secretName"]]["isCA"]
    shown = certificates["stripwire-server-tls"]
    asked = {
        entry["value"].rpartition(":")[0]
        for one in pods(documents)
        for container in one.containers
        for entry in container.get("env", [])
        if entry["name"] == "STRIPWIRE_URL"
    }
    assert asked == {"127.0.0.1", "stripwire"}
    assert asked <= {*shown["ipAddresses"], *shown["dnsNames"]}
    for service in ("stripwire", "stripwire-headless"):
        assert f"{service}.stripwire.svc" in shown["dnsNames"]
    for one in pods(documents):
        environment = {entry["name"] for entry in one.container("monitor")["env"]}
        if name.endswith("+gateway") and one == pod:  # its monitor asks Triton in plaintext, on 127.0.0.1
            assert not {entry for entry in environment if "TLS" in entry}
            continue
        assert {"STRIPWIRE_TLS_CA", "STRIPWIRE_TLS_CERT", "STRIPWIRE_TLS_KEY"} <= environment


@pytest.mark.parametrize("name", [name for name in OVERLAYS if name.endswith("+gateway")])
def test_with_the_gateway_triton_is_reached_through_it_alone(name: str) -> None:
    pod = server(name)
    assert "--grpc-address=127.0.0.1" in pod.triton["args"]
    envoy = pod.container("gateway")
    config = (ROOT / "deploy" / "gateway" / "envoy.yaml").read_text()
    for port, where in ((ports(pod)["grpc"], "0.0.0.0"), (number(pod.triton["args"], "grpc-port"), "127.0.0.1")):  # noqa: S104
        assert f"socket_address: {{address: {where}, port_value: {port}}}" in config
    (files,) = (one["data"] for one in of_kind(rendered(name), "ConfigMap") if "envoy.yaml" in one["data"])
    mounts = {mount["mountPath"]: mount["name"] for mount in envoy["volumeMounts"]}
    for path in re.findall(r"(?:path|filename): (/[\w./-]+)", "".join(files.values())):
        folder, _, file = path.rpartition("/")
        assert mounts[folder or path], path
        assert folder == "/tls" or path == "/tls" or file in files, path
    # Connections end as Triton's would.
    assert f"max_connection_duration: {number(pod.triton['args'], 'grpc-max-connection-age') // 1000}s" in config
    heap = re.search(r"max_heap_size_bytes: (\d+)", config)
    assert heap is not None
    assert int(heap[1]) < 2**30
    assert envoy["resources"]["limits"]["memory"] == "1Gi"


def test_model_control_is_restricted_and_plain_http_is_closed() -> None:
    for name in OVERLAYS:
        (restricted,) = (text for text in server(name).triton["args"] if "restricted" in text)
        assert restricted.startswith("--grpc-restricted-protocol=model-repository,shared-memory,logging,trace:")
        assert "--allow-http=false" in server(name).triton["args"]


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
