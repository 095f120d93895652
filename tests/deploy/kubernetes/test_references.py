"""Whatever a manifest names, there is: in another manifest, in the guide, or in the code."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from client.control import ENSEMBLE
from detector.serving import CONTROL_KEY, MODES, SENTINEL
from tests.deploy.kubernetes.manifests import (
    EVERYTHING,
    GUIDE,
    JOBS,
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
    parsed,
    pods,
    ports,
    rendered,
    selected,
    server,
    told,
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


# The words that a container runs with.


def containers(name: str, image: str) -> Iterator[tuple[Pod, Document]]:
    """Yield the containers of an image of ours, `monitor` for example, that run its entry point."""
    for pod in pods(rendered(name)):
        for container in pod.containers:
            if container["image"].startswith(f"stripwire.invalid/{image}:") and "command" not in container:
                yield pod, container


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_variable_is_one_that_an_argument_names_or_that_the_program_reads(name: str) -> None:
    code = "".join(path.read_text() for path in (ROOT / "detector").glob("*.py"))
    read = {*re.findall(r"\bSTRIPWIRE_\w+", code), "CUPY_CACHE_DIR", "HOME"}
    for pod in pods(rendered(name)):
        for container in pod.containers:
            # A monitor's own are held against its settings.
            variables = [entry["name"] for entry in container.get("env", []) if not is_monitor(container)]
            named = set(re.findall(r"\$\((\w+)\)", " ".join(container.get("args", []))))
            assert set(variables) <= read | named, f"{pod.name}: {container['name']}"
            assert len(variables) == len(set(variables))


COMMANDS = {"monitor": ("verify", "monitor"), "exporter": ("export", "calibrate", "canaries")}
"""What an image has the packages for."""


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_command_line_takes_every_argument(name: str, tmp_path: Path) -> None:
    for image, commands in COMMANDS.items():
        for pod, container in containers(name, image):
            arguments = told(name, container)
            assert arguments[0] in commands, f"{pod.name}: {container['name']}"
            parsed(arguments, tmp_path)


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_image_of_ours_is_built_and_of_this_version(name: str) -> None:
    built = re.findall(r"(?m)^FROM .* AS ([\w-]+)$", (ROOT / "deploy" / "docker" / "Dockerfile").read_text())
    for pod in pods(rendered(name)):
        for container in pod.containers:
            image, _, tag = container["image"].partition(":")
            if image.startswith("stripwire"):
                assert image.removeprefix("stripwire.invalid/") in built, f"{pod.name}: {container['name']}"
                assert tag == version("stripwire"), f"{pod.name}: {container['name']}"


def folders_of_a_server(release: str) -> set[str]:
    """Return what a server reads of a release, and the monitors."""
    monitors = (one for pod in pods(rendered("cpu")) for one in pod.containers if is_monitor(one))
    canaries = (literals(one)["STRIPWIRE_CANARIES"] for one in monitors)
    return {
        path.replace("$(RELEASE)", release) for path in (option(server("cpu").triton, "model-repository"), *canaries)
    }


@pytest.mark.parametrize("name", ["export", "calibrate"])
def test_a_job_writes_what_a_server_of_that_release_reads(name: str, tmp_path: Path) -> None:
    (job,) = pods(rendered(name))
    given = {one["name"]: parsed(told(name, one), tmp_path) for _, one in containers(name, "exporter")}
    repository, canaries = given["repository"], given["canaries"]
    made = repository["output"] if name == "export" else repository["repository"]
    assert canaries["repository"] == made
    (release,) = (one["data"]["release"] for one in of_kind(rendered(name), "ConfigMap"))
    assert {f"/{path.relative_to(tmp_path)}" for path in (made, canaries["output"])} == folders_of_a_server(release)
    assert canaries["clean"] != repository["clean"], "canaries that the export has seen"
    assert told(name, job.container("new")) == [f"/releases/{release}"]


@pytest.mark.parametrize(("name", "container"), [("calibrate", "copy"), ("fetch", "rclone")])
def test_a_copied_release_lies_where_a_server_looks(name: str, container: str) -> None:
    (data,) = (one["data"] for one in of_kind(rendered(name), "ConfigMap"))
    (pod,) = pods(rendered(name))
    *_, source, target = told(name, pod.container(container))
    assert target == f"/releases/{data['release']}" == told(name, pod.container("new"))[0]
    assert source in (f"/releases/{data['from']}", f"store:{data['from']}")
    assert source != target
    assert all(path.startswith(f"{target}/") for path in folders_of_a_server(data["release"]))


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_tried_once_and_then_goes(name: str) -> None:
    for job in of_kind(rendered(name), "Job"):
        assert job["spec"]["backoffLimit"] == 0
        assert 3600 <= job["spec"]["ttlSecondsAfterFinished"] <= 7 * 86400
    for pod in pods(rendered(name)):
        assert pod.spec["restartPolicy"] == "Never"
    for alone in of_kind(rendered(name), "Pod"):
        (container,) = alone["spec"]["containers"]
        assert container["command"] == ["sleep", str(alone["spec"]["activeDeadlineSeconds"])]


def test_every_mode_is_one_of_the_models_and_reaches_triton() -> None:
    for name in OVERLAYS:
        (mode,) = (one["data"]["mode"] for one in of_kind(rendered(name), "ConfigMap") if "mode" in one["data"])
        assert mode in MODES
        for argument in ("--mode", mode), (f"--model-config-name={mode}",):
            assert set(argument) <= {text for one in server(name).containers for text in told(name, one)}
    assert set(re.findall(r"\bmode=(\w+)", GUIDE)) == set(MODES)


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_repository_is_verified_before_anything_starts(name: str) -> None:
    first, second, *others = server(name).spec["initContainers"]
    assert all(one["restartPolicy"] == "Always" for one in others)
    assert first["args"][0] == "verify"
    assert "restartPolicy" not in first
    assert (second["name"], second["restartPolicy"]) == ("monitor", "Always")
    assert option(server(name).triton, "model-repository") == first["args"][1]


def test_model_control_is_restricted_and_plain_http_is_closed() -> None:
    for name in OVERLAYS:
        assert option(server(name).triton, "model-control-mode") == "explicit"
        protocols, _, key = option(server(name).triton, "grpc-restricted-protocol").partition(":")
        assert protocols == "model-repository,shared-memory,logging,trace"
        assert key == f"{CONTROL_KEY}=$(STRIPWIRE_CONTROL_TOKEN)"
        assert "--allow-http=false" in server(name).triton["args"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_memory_pools_are_of_a_gpu_that_the_pod_has_and_fit_its_memory(name: str) -> None:
    triton = server(name).triton
    gpus = int(triton["resources"]["limits"].get("nvidia.com/gpu", 0))
    fits = range(2**20, 2**32)
    pools = [text.partition("=")[2] for text in triton["args"] if text.startswith("--cuda-memory-pool-byte-size=")]
    assert bool(pools) is bool(gpus)
    for pool in pools:
        gpu, _, size = pool.partition(":")
        assert int(gpu) in range(gpus)
        assert int(size) in fits
    if gpus:
        assert int(option(triton, "pinned-memory-pool-byte-size")) in fits
    assert ("--allow-gpu-metrics=false" in triton["args"]) is not bool(gpus)


@pytest.mark.parametrize("name", OVERLAYS)
def test_triton_loads_what_callers_and_evaluate_ask(name: str) -> None:
    loaded = {text.partition("=")[2] for text in server(name).triton["args"] if text.startswith("--load-model=")}
    assert loaded == {ENSEMBLE, SENTINEL}


# Addresses.


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
