"""Whatever a manifest names, there is: in another manifest, in the guide, or in the code."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.deploy.kubernetes.manifests import (
    EVERYTHING,
    GUIDE,
    OVERLAYS,
    ROOT,
    Document,
    Pod,
    beside,
    is_monitor,
    literals,
    mappings,
    matches,
    of_kind,
    option,
    pods,
    ports,
    rendered,
    selected,
    server,
)


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


@functools.cache
def secrets_of_the_guide() -> dict[str, set[str]]:
    """Return the Secrets that the guide has people make, and their keys."""
    found: dict[str, set[str]] = {}
    (everybody,) = re.findall(r"(?m)^for who in (.+); do$", GUIDE)
    for command in re.findall(r"create secret generic ((?:\\\n|[^\n|])+)", GUIDE):
        name, keys = command.split()[0], set(re.findall(r"--from-(?:literal|file)=([\w.]+)", command))
        for who in everybody.split() if "$who" in name else ("",):
            secret = name.replace("$who", who)
            assert found.setdefault(secret, keys) == keys, f"{secret}: made anew with other keys"
    return found


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_config_map_secret_claim_and_account_that_a_pod_asks_for_is_there(name: str) -> None:
    there: dict[tuple[str, str], set[str]] = {
        (one["kind"], one["metadata"]["name"]): set(one.get("data", {})) for one in beside(name)
    }
    there |= {("Secret", one["spec"]["secretName"]): set() for one in of_kind(beside(name), "Certificate")}
    there |= {("Secret", secret): keys for secret, keys in secrets_of_the_guide().items() if "-tls" not in secret}
    for pod in pods(rendered(name)):
        for kind, wanted, key in references(pod.spec):
            assert (kind, wanted) in there, pod.name
            assert key is None or key in there[kind, wanted], f"{pod.name}: {kind} {wanted}"


def test_the_guide_makes_the_secrets_that_certificates_would() -> None:
    issued = {
        one["spec"]["secretName"] for one in of_kind(rendered("cpu+tls"), "Certificate") if "usages" in one["spec"]
    }
    made = {name: keys for name, keys in secrets_of_the_guide().items() if name.endswith("-tls")}
    assert made == {name: {"ca.crt", "tls.crt", "tls.key"} for name in issued}


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_token_is_that_of_its_variable(name: str) -> None:
    for pod in pods(rendered(name)):
        for container in pod.containers:
            for entry in container.get("env", []):
                if "secretKeyRef" in entry.get("valueFrom", {}):
                    key = entry["valueFrom"]["secretKeyRef"]["key"]
                    assert entry["name"] == f"STRIPWIRE_{key.upper()}_TOKEN", f"{pod.name}: {container['name']}"


@pytest.mark.parametrize("name", OVERLAYS)
def test_who_takes_feedback_cannot_load_models_and_no_server_takes_feedback(name: str) -> None:
    for pod in pods(rendered(name)):
        tokens = {
            entry["name"] for one in pod.containers for entry in one.get("env", []) if entry["name"].endswith("_TOKEN")
        }
        assert tokens == {f"STRIPWIRE_{'CONTROL' if pod.component == 'server' else 'FEEDBACK'}_TOKEN"}, pod.name


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_claim_is_made_and_mounted_under_its_own_name(name: str) -> None:
    for pod in pods(rendered(name)):
        for volume, claim in pod.claims.items():
            assert claim["claimName"] == f"stripwire-{volume}", pod.name
            mounts = [mount for one in pod.containers for mount in one["volumeMounts"] if mount["name"] == volume]
            assert {mount["mountPath"] for mount in mounts} == {f"/{volume}"}, f"{pod.name}: {volume}"
    used = {claim["claimName"] for pod in pods(beside(name)) for claim in pod.claims.values()}
    made = {
        one["metadata"]["name"]: one["spec"]["accessModes"] for one in of_kind(beside(name), "PersistentVolumeClaim")
    }
    assert used == made.keys()
    if name in OVERLAYS:
        shared = {claim["claimName"] for claim in server(name).claims.values()}
        assert made == {one: ["ReadWriteMany" if one in shared else "ReadWriteOnce"] for one in made}


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_path_in_a_container_lies_on_a_volume_of_the_pod(name: str) -> None:
    for pod in pods(rendered(name)):
        volumes = {volume["name"] for volume in pod.spec["volumes"]}
        used = set()
        for container in pod.containers:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            used |= set(mounts.values())
            assert set(mounts.values()) <= volumes, f"{pod.name}: {container['name']}"
            for text in [*container.get("args", []), *literals(container).values()]:
                for path in re.findall(r"(?:^|=)(/[a-z].*)", text):
                    assert any(f"{path}/".startswith(f"{mount}/") for mount in mounts), (
                        f"{pod.name}: {container['name']}: {path}"
                    )
        assert used == volumes, f"{pod.name}: mounts of what is not there, or volumes that nobody mounts"


def written(pod: Pod, container: Document) -> set[str]:
    """Return the folders, of volumes that outlive a pod, that a container's work is to write to."""
    if pod.component in ("server", "feedback"):
        variables = literals(container)
        found = [variables[name] for name in ("STRIPWIRE_QUARANTINE", "STRIPWIRE_RECORD") if name in variables]
        return {"/" + path.split("/")[1] for path in found}
    return {"/releases", "/data"} if pod.name == "stripwire-files" else {"/releases"}


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_container_can_write_where_its_work_is_and_nowhere_else(name: str) -> None:
    for pod in pods(rendered(name)):
        scratch = {volume["name"] for volume in pod.spec["volumes"] if "emptyDir" in volume}
        for container in pod.containers:
            mounts = container["volumeMounts"]
            writable = {mount["mountPath"] for mount in mounts if not mount.get("readOnly", False)}
            own = {mount["mountPath"] for mount in mounts if mount["name"] in scratch}
            assert writable == own | written(pod, container), f"{pod.name}: {container['name']}"
        for volume, claim in pod.claims.items():
            if claim.get("readOnly", False) or volume == "releases":
                writers = [one["name"] for one in pod.containers if f"/{volume}" in written(pod, one)]
                assert bool(writers) is not claim.get("readOnly", False), f"{pod.name}: {volume}: {writers}"


@pytest.mark.parametrize("name", OVERLAYS)
def test_people_see_what_servers_keep(name: str) -> None:
    (feedback,) = (pod for pod in pods(rendered(name)) if pod.component == "feedback")
    folders = [literals(one)["STRIPWIRE_QUARANTINE"] for one in (server(name).triton, *feedback.containers)]
    assert folders == ["/quarantine"] * 2


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_service_reaches_a_port_of_a_pod(name: str) -> None:
    services = of_kind(rendered(name), "Service")
    assert {one["metadata"]["name"] for one in services} == {"stripwire", "stripwire-headless", "stripwire-feedback"}
    for service in services:
        (pod,) = selected(rendered(name), {"matchLabels": service["spec"]["selector"]})
        assert (pod.component == "feedback") is (service["metadata"]["name"] == "stripwire-feedback")
        # Not of sidecars: not every Kubernetes finds their ports by name.
        own = {port["name"]: port["containerPort"] for port in pod.spec["containers"][0]["ports"]}
        for port in service["spec"]["ports"]:
            assert own.get(port["targetPort"], port["targetPort"]) == ports(pod)[port["name"]]
            assert port["port"] == {"grpc": 8001, "monitor": 8003}[port["name"]]
            # A headless one gives the pods' addresses: nobody maps a port to another then.
            assert service["spec"].get("clusterIP") != "None" or port["port"] == ports(pod)[port["name"]]
    headless = {one["metadata"]["name"] for one in services if one["spec"].get("clusterIP") == "None"}
    assert headless == {"stripwire-headless"}


def named_addresses(text: str) -> set[tuple[str, int]]:
    """Return service and port of each address in a text that is one of a Service of ours."""
    found = re.findall(r"\b(stripwire[\w-]*)(?:\.stripwire(?:\.svc)?)?:(\d{4})\b", text)
    return {(service, int(port)) for service, port in found}


def services(name: str) -> set[tuple[str, int]]:
    return {
        (service["metadata"]["name"], port["port"])
        for service in of_kind(rendered(name), "Service")
        for port in service["spec"]["ports"]
    }


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_monitor_asks_a_service_or_the_server_in_its_own_pod(name: str) -> None:
    for pod in pods(rendered(name)):
        for container in filter(is_monitor, pod.containers):
            url = literals(container)["STRIPWIRE_URL"]
            if pod.component == "server":
                assert url == f"127.0.0.1:{option(pod.triton, 'grpc-port')}"
                assert (
                    literals(container)["STRIPWIRE_METRICS_URL"] == f"http://127.0.0.1:{ports(pod)['metrics']}/metrics"
                )
            else:
                assert named_addresses(url) <= services(name)
                (asked,) = (
                    one
                    for one in of_kind(rendered(name), "Service")
                    if one["metadata"]["name"] == url.partition(":")[0]
                )
                assert matches({"matchLabels": asked["spec"]["selector"]}, server(name).labels)
    own = [port["containerPort"] for port in server(name).triton["ports"]]
    assert own == [int(option(server(name).triton, kind)) for kind in ("grpc-port", "metrics-port")]


def test_every_address_in_the_docs_is_one_of_a_service() -> None:
    for document in ("operate.md", "scaling.md"):
        addresses = named_addresses((ROOT / "docs" / document).read_text())
        assert addresses
        assert addresses <= services("cpu"), document
