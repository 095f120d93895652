"""With TLS everybody has the certificate that fits, and with the gateway nobody goes round it."""

from __future__ import annotations

import re

import pytest

from deploy.kubernetes import prometheusrule
from detector.live_metrics import CANARY_KEY
from tests.deploy.kubernetes.manifests import (
    OVERLAYS,
    ROOT,
    Document,
    Pod,
    is_monitor,
    literals,
    matches,
    of_kind,
    option,
    pods,
    ports,
    quantity,
    rendered,
    server,
)

WITH_TLS = [name for name in OVERLAYS if "+" in name]
RULES = prometheusrule.RULES.read_text()
GATE = (ROOT / "deploy" / "gateway" / "only_guarded.lua").read_text()


def certificates(name: str) -> dict[str, Document]:
    """Return the specifications of all certificates, by Secret."""
    return {one["spec"]["secretName"]: one["spec"] for one in of_kind(rendered(name), "Certificate")}


@pytest.mark.parametrize("name", WITH_TLS)
def test_all_certificates_are_of_one_authority_that_is_there(name: str) -> None:
    issuers = {one["metadata"]["name"]: one["spec"] for one in of_kind(rendered(name), "Issuer")}
    leaves = [spec for spec in certificates(name).values() if not spec.get("isCA", False)]
    assert len(leaves) == 2
    for spec in certificates(name).values():
        assert spec["issuerRef"]["kind"] == "Issuer"
    (issuer,) = {spec["issuerRef"]["name"] for spec in leaves}
    authority = certificates(name)[issuers[issuer]["ca"]["secretName"]]
    assert authority["isCA"] is True
    assert issuers[authority["issuerRef"]["name"]] == {"selfSigned": {}}
    assert authority["privateKey"]["rotationPolicy"] == "Never", "or all that it has signed is refused"
    (alarm,) = re.findall(r"stripwire_certificate_not_after_seconds - time\(\) < (\d+) \* 86400", RULES)
    for spec in leaves:
        lasts, renewed, authority_lasts = (
            int(text.removesuffix("h")) for text in (spec["duration"], spec["renewBefore"], authority["duration"])
        )
        assert int(alarm) * 24 < renewed < lasts < authority_lasts, "the alert comes where it was not renewed"
        assert spec["privateKey"]["rotationPolicy"] == "Always"


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_service_says_that_it_is_plaintext_where_it_is(name: str) -> None:
    for service in of_kind(rendered(name), "Service"):
        for port in service["spec"]["ports"]:
            if port["name"] == "grpc":
                assert port.get("appProtocol") == (None if name in WITH_TLS else "kubernetes.io/h2c")


@pytest.mark.parametrize("name", WITH_TLS)
def test_the_servers_certificate_has_every_name_that_it_is_asked_by(name: str) -> None:
    (shown,) = (spec for spec in certificates(name).values() if spec.get("usages") == ["server auth"])
    for service in of_kind(rendered(name), "Service"):
        if matches({"matchLabels": service["spec"]["selector"]}, server(name).labels):
            for domain in ("", ".stripwire", ".stripwire.svc", ".stripwire.svc.cluster.local"):
                assert service["metadata"]["name"] + domain in shown["dnsNames"]
    for pod in pods(rendered(name)):
        for container in filter(is_monitor, pod.containers):
            asked = literals(container)["STRIPWIRE_URL"].rpartition(":")[0]
            assert asked in {*shown["ipAddresses"], *shown["dnsNames"]}


def secrets_of(pod: Pod, container: Document) -> dict[str, str]:
    """Return the Secrets that a container mounts as files: name by folder."""
    sources = {volume["name"]: volume["secret"] for volume in pod.spec["volumes"] if "secret" in volume}
    for source in sources.values():
        assert source["defaultMode"] == 0o440, "of the group, which is the pod's fsGroup"
    return {
        mount["mountPath"]: sources[mount["name"]]["secretName"]
        for mount in container["volumeMounts"]
        if mount["name"] in sources
    }


def gateway_files(name: str) -> dict[str, str]:
    (files,) = (one["data"] for one in of_kind(rendered(name), "ConfigMap") if "envoy.yaml" in one["data"])
    return {str(key): str(text) for key, text in files.items()}


def told_of_tls(name: str, container: Document) -> str:
    """Return where a container may be told of certificates: a line each, `what: path`."""
    lines = [*container.get("args", []), *(f"{key}={value}" for key, value in literals(container).items())]
    if container["name"] == "gateway":
        lines += gateway_files(name).values()
    return "\n".join(lines).replace(": {filename", "").replace("=", ": ")


@pytest.mark.parametrize("name", WITH_TLS)
def test_who_asks_shows_the_clients_certificate_and_who_answers_the_servers(name: str) -> None:
    shown = set()
    for pod in pods(rendered(name)):
        for container in pod.containers:
            where = f"{pod.name}: {container['name']}"
            secrets = secrets_of(pod, container)
            files = re.findall(r"([\w-]+): (/tls)/([\w.]+)", told_of_tls(name, container))
            assert {folder for _, folder, _ in files} == secrets.keys(), where
            for what, _, file in files:
                words = set(re.split("[_-]", what.lower()))
                expected = "tls.key" if "key" in words else "ca.crt" if {"ca", "root"} & words else "tls.crt"
                assert file == expected, f"{where}: {what}"
            for secret in secrets.values():
                assert len(files) == 3, where
                asks = is_monitor(container)
                assert certificates(name)[secret]["usages"] == ["client auth" if asks else "server auth"], where
                shown.add((pod.component, container["name"]))
    plain = name.endswith("+gateway")  # in which its monitor asks Triton on 127.0.0.1
    inside = {("server", "gateway")} if plain else {("server", "monitor"), ("server", server(name).triton["name"])}
    assert shown == {("feedback", "monitor"), *inside}


@pytest.mark.parametrize("name", [name for name in WITH_TLS if name.endswith("+tls")])
def test_triton_asks_callers_for_a_certificate(name: str) -> None:
    assert {"--grpc-use-ssl=true", "--grpc-use-ssl-mutual=true"} <= set(server(name).triton["args"])


@pytest.mark.parametrize("name", WITH_TLS)
def test_who_reads_certificates_at_the_start_is_started_anew_for_new_ones(name: str) -> None:
    for deployment in of_kind(rendered(name), "Deployment"):
        (pod,) = (pod for pod in pods([deployment]))
        read = {
            secret
            for container in pod.containers
            if container["name"] != "gateway"  # Envoy reads new ones by itself
            for secret in secrets_of(pod, container).values()
        }
        annotations = deployment["metadata"].get("annotations", {})
        reloaded = annotations.get("secret.reloader.stakater.com/reload", "")
        assert set(filter(None, reloaded.split(","))) == read, pod.name


@pytest.mark.parametrize("name", [name for name in OVERLAYS if name.endswith("+gateway")])
def test_with_the_gateway_triton_is_reached_through_it_alone(name: str) -> None:
    pod = server(name)
    assert option(pod.triton, "grpc-address") == "127.0.0.1"
    envoy = pod.container("gateway")
    files = gateway_files(name)
    config = files["envoy.yaml"]
    for port, where in ((ports(pod)["grpc"], "0.0.0.0"), (int(option(pod.triton, "grpc-port")), "127.0.0.1")):  # noqa: S104
        assert f"socket_address: {{address: {where}, port_value: {port}}}" in config
    assert [port["containerPort"] for port in envoy["ports"]] == [ports(pod)["grpc"]]
    mounts = {mount["mountPath"]: mount["name"] for mount in envoy["volumeMounts"]}
    for path in [*re.findall(r"(?:path|filename): (/[\w./-]+)", "".join(files.values())), *envoy["args"]]:
        folder, _, file = path.rpartition("/")
        if path.startswith("/"):
            assert mounts[folder or path], path
            assert folder == "/tls" or path == "/tls" or file in files, path
    # Connections end as Triton's would.
    assert f"max_connection_duration: {int(option(pod.triton, 'grpc-max-connection-age')) // 1000}s" in config
    heap = re.search(r"max_heap_size_bytes: (\d+)", config)
    assert heap is not None
    assert int(heap[1]) < quantity(envoy["resources"]["limits"]["memory"])


def test_the_gateway_knows_the_monitors_by_their_certificate() -> None:
    (mark, subject) = re.findall(r'"([^"]*)"', next(line for line in GATE.splitlines() if "CANARY, MONITOR =" in line))
    assert mark == CANARY_KEY
    assert subject == f"CN={certificates('cpu+gateway')['stripwire-client-tls']['commonName']}"
