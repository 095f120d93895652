"""Nobody reaches what the guide does not name, and who gets there shows a certificate where one is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

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
    named,
    of_kind,
    option,
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


# Certificates.

WITH_TLS = [name for name in OVERLAYS if "+" in name]


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
    for spec in leaves:
        lasts, renewed, authority_lasts = (
            int(text.removesuffix("h")) for text in (spec["duration"], spec["renewBefore"], authority["duration"])
        )
        assert renewed < lasts < authority_lasts
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
    config = (ROOT / "deploy" / "gateway" / "envoy.yaml").read_text()
    for port, where in ((ports(pod)["grpc"], "0.0.0.0"), (int(option(pod.triton, "grpc-port")), "127.0.0.1")):  # noqa: S104
        assert f"socket_address: {{address: {where}, port_value: {port}}}" in config
    assert [port["containerPort"] for port in envoy["ports"]] == [ports(pod)["grpc"]]
    files = gateway_files(name)
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
    assert int(heap[1]) < 2**30
    assert envoy["resources"]["limits"]["memory"] == "1Gi"


def test_the_gateways_files_are_those_that_its_tests_run() -> None:
    for name in OVERLAYS:
        if name.endswith("+gateway"):
            for file, text in gateway_files(name).items():
                assert text == (ROOT / "deploy" / "gateway" / file).read_text()
