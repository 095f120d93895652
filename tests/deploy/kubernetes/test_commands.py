"""What containers run is there, is told nothing that it does not know, and leaves what others look for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

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
    is_monitor,
    literals,
    of_kind,
    option,
    parsed,
    pods,
    rendered,
    server,
    told,
)


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
