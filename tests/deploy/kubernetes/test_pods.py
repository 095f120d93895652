"""How pods run: with no more rights and no less room than they need, in the right places, and until all is answered."""

from __future__ import annotations

import copy
import json
import re

import pytest

from client.monitor.service import _DRAIN_SECONDS
from tests.deploy.kubernetes.manifests import (
    COMPONENTS,
    EVERYTHING,
    OVERLAYS,
    ROOT,
    Document,
    Pod,
    mappings,
    of_kind,
    option,
    pods,
    quantity,
    rendered,
    selected,
    server,
)


@pytest.mark.parametrize("name", EVERYTHING)
def test_no_container_may_more_than_it_must(name: str) -> None:
    for account in of_kind(rendered(name), "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    for pod in pods(rendered(name)):
        assert pod.spec["automountServiceAccountToken"] is False
        assert pod.spec["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & pod.spec.keys()
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, f"{pod.name}: {container['name']}"


@pytest.mark.parametrize("name", EVERYTHING)
def test_all_pods_are_the_user_of_the_images_so_that_each_reads_what_another_wrote(name: str) -> None:
    dockerfile = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    (user,) = {(int(user), int(group)) for user, group in re.findall(r"(?m)^USER (\d+):(\d+)$", dockerfile)}
    assert user[0] > 0
    for pod in pods(rendered(name)):
        assert pod.spec["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": user[0],
            "runAsGroup": user[1],
            "fsGroup": user[1],
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        }, pod.name


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_container_says_its_version_and_what_it_needs(name: str) -> None:
    for pod in pods(rendered(name)):
        for container in pod.containers:
            where = f"{pod.name}: {container['name']}"
            assert re.fullmatch(r"[a-z/.]+:(distroless-v)?[0-9.]+(@sha256:[0-9a-f]{64})?", container["image"]), where
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            for kind in ("cpu", "memory", "ephemeral-storage"):
                assert 0 < quantity(requests[kind]) <= quantity(limits[kind]), f"{where}: {kind}"


@pytest.mark.parametrize("name", EVERYTHING)
def test_what_a_container_keeps_in_scratch_space_is_less_than_what_it_may_have(name: str) -> None:
    for pod in pods(rendered(name)):
        scratch = {volume["name"]: volume["emptyDir"] for volume in pod.spec["volumes"] if "emptyDir" in volume}
        for container in pod.containers:
            limits = container["resources"]["limits"]
            for mount in container["volumeMounts"]:
                if mount["name"] in scratch:
                    space = scratch[mount["name"]]
                    limit = limits["memory" if space.get("medium") == "Memory" else "ephemeral-storage"]
                    assert quantity(space["sizeLimit"]) < quantity(limit), f"{pod.name}: {mount['name']}"


def test_the_python_backend_has_shared_memory_in_every_overlay() -> None:
    for name in OVERLAYS:
        pod = server(name)
        (mount,) = (one for one in pod.triton["volumeMounts"] if one["mountPath"] == "/dev/shm")  # noqa: S108
        (volume,) = (one for one in pod.spec["volumes"] if one["name"] == mount["name"])
        assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}


def test_only_the_gpu_overlay_asks_for_a_gpu_and_goes_where_one_is() -> None:
    for name in OVERLAYS:
        pod = server(name)
        asks = {kind for kind in pod.triton["resources"]["limits"] if "nvidia.com" in kind}
        assert asks == ({"nvidia.com/gpu"} if name.startswith("gpu") else set())
        assert {one["key"] for one in pod.spec.get("tolerations", [])} == asks
        assert "nodeSelector" not in pod.spec  # the scheduler knows which nodes have one


@pytest.mark.parametrize("name", OVERLAYS)
def test_onnx_runtime_has_as_many_threads_as_the_container_has_cores(name: str) -> None:
    triton = server(name).triton
    told = dict(
        text.partition(",")[2].split("=") for text in triton["args"] if text.startswith("--backend-config=onnxruntime,")
    )
    assert told["enable-global-threadpool"] == "1", "the number of threads would be no one's"
    assert float(told["intra_op_thread_count"]) == quantity(triton["resources"]["limits"]["cpu"])


WELL_KNOWN = {"kubernetes.io/hostname", "topology.kubernetes.io/zone", "topology.kubernetes.io/region"}
"""Labels that Kubernetes puts on nodes."""


@pytest.mark.parametrize("name", OVERLAYS)
def test_budget_spread_and_autoscaler_are_about_the_server(name: str) -> None:
    documents, pod = rendered(name), server(name)
    (budget,) = of_kind(documents, "PodDisruptionBudget")
    assert selected(documents, budget["spec"]["selector"]) == [pod]
    (scaler,) = of_kind(documents, "HorizontalPodAutoscaler")
    assert scaler["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": pod.name}
    assert scaler["spec"]["minReplicas"] > budget["spec"]["maxUnavailable"] > 0
    assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"  # who serves nobody holds up no drain
    (spread,) = pod.spec["topologySpreadConstraints"]
    (apart,) = pod.spec["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    for selector in (spread["labelSelector"], apart["podAffinityTerm"]["labelSelector"]):
        assert selected(documents, selector) == [pod]
    assert {mapping["topologyKey"] for _, mapping in mappings(pod.spec) if "topologyKey" in mapping} <= WELL_KNOWN
    assert spread["matchLabelKeys"] == ["pod-template-hash"], "which Kubernetes puts on a Deployment's pods"
    assert all(
        "replicas" not in one["spec"] for one in of_kind(documents, "Deployment") if one["metadata"]["name"] == pod.name
    )


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_rollout_takes_no_server_before_another_is_ready_unless_that_takes_a_gpu(name: str) -> None:
    deployments = {one["metadata"]["name"]: one["spec"] for one in of_kind(rendered(name), "Deployment")}
    strategies = {deployment: spec["strategy"] for deployment, spec in deployments.items()}
    for service in of_kind(rendered(name), "InferenceService"):
        strategies["stripwire-predictor"] = service["spec"]["predictor"]["deploymentStrategy"]
    strategy = strategies.pop(server(name).name)
    surge, fewer = (0, 1) if name.startswith("gpu") else (1, 0)
    assert strategy == {"rollingUpdate": {"maxSurge": surge, "maxUnavailable": fewer}}
    # One process holds the record, on a volume of one node.
    assert strategies == {"stripwire-feedback": {"type": "Recreate"}}
    assert deployments["stripwire-feedback"]["replicas"] == 1


def test_a_change_of_release_is_a_rollout() -> None:
    first, second = (of_kind(rendered(name), "ConfigMap") for name in ("cpu", "cpu+tls"))
    names = [
        next(one["metadata"]["name"] for one in maps if one["data"].get("release") == release)
        for maps, release in ((first, "1"), (second, "2"))
    ]
    assert len(set(names)) == 2
    for name, overlay in zip(names, ("cpu", "cpu+tls"), strict=True):
        assert name in json.dumps(server(overlay).spec)


DNS_SECONDS = 30
"""How long CoreDNS keeps an answer, by default."""


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_drain_lasts_until_callers_have_gone_and_requests_are_answered(name: str) -> None:
    pod = server(name)
    preparing = pod.triton["lifecycle"]["preStop"]["sleep"]["seconds"]
    age = int(option(pod.triton, "grpc-max-connection-age")) / 1000
    answering = int(option(pod.triton, "exit-timeout-secs"))
    # gRPC adds up to a tenth, and everybody must hear that the pod is leaving: also who asks DNS, which keeps answers.
    assert preparing > DNS_SECONDS + 1.1 * age + 5
    assert pod.spec["terminationGracePeriodSeconds"] > preparing + answering
    (feedback,) = (pod for pod in pods(rendered(name)) if pod.component == "feedback")
    assert feedback.spec["terminationGracePeriodSeconds"] > _DRAIN_SECONDS


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
    (runtime,) = of_kind(rendered(f"kserve{component}"), "ServingRuntime")
    formats = {one["name"] for one in runtime["spec"]["supportedModelFormats"]}
    assert predictor["model"]["modelFormat"]["name"] in formats
    assert service["metadata"]["labels"]["networking.kserve.io/visibility"] == "cluster-local"
    assert service["metadata"]["annotations"] == {
        "serving.kserve.io/deploymentMode": "RawDeployment",
        "serving.kserve.io/autoscalerClass": "external",
    }
