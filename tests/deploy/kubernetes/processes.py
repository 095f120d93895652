"""Containers as processes of this machine: their arguments and variables, with files and ports where they are here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy import embedded
from deploy.embedded.installation import find_triton
from tests.deploy.kubernetes.manifests import Document, environment, expanded, server

TOKENS = {key: f"the-token-for-{key}" for key in ("control", "feedback")}
STRIPWIRE = [sys.executable, "-m", "stripwire"]


@dataclass(frozen=True)
class Place:
    """Where the containers' files and ports are on this machine.

    Attributes:
        folder: has a folder for each volume.
        ports: of this machine, by those of the pods.
    """

    folder: Path
    ports: Mapping[str, int]

    def here(self, container: Document, text: str) -> str:
        """Return an argument or the value of a variable as it must be here."""
        mounts = {mount["mountPath"]: str(self.folder / mount["name"]) for mount in container["volumeMounts"]}
        text = re.sub(rf"(?<![\w.])({'|'.join(mounts)})(?=/|$)", lambda match: mounts[match[1]], text)
        for there, port in self.ports.items():
            text = re.sub(rf"\b{there}\b", str(port), text)
        return text.replace("0.0.0.0:", "127.0.0.1:")

    def arguments(self, name: str, container: Document) -> list[str]:
        variables = environment(name, container, TOKENS)
        return [self.here(container, expanded(argument, variables)) for argument in container["args"]]

    def environment(self, name: str, container: Document) -> dict[str, str]:
        variables = environment(name, container, TOKENS)
        return {key: self.here(container, value) for key, value in variables.items() if key != "HOME"}

    def run(self, name: str, container: Document, *more: str) -> subprocess.CompletedProcess[str]:
        """Run a container of ours to its end, with further arguments."""
        return subprocess.run(
            [*container.get("command", STRIPWIRE), *self.arguments(name, container), *more],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "COLUMNS": "1000", **self.environment(name, container)},
        )


@contextmanager
def running(command: list[str], variables: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for as long as the block lasts."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(timeout=60)


@contextmanager
def serving(
    place: Place, name: str, log: Path, changes: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the server of an overlay; `changes` has other arguments for some that it has."""
    installed = find_triton()
    backends = place.folder / "backends"
    if not backends.exists():  # in NVIDIA's image they are where Triton looks
        shutil.copytree(Path(embedded.__file__).parent / "backends", backends)
        shutil.copytree(installed.python_backend, backends / "python")
        shutil.copy2(installed.stub, backends / "python")
    container = server(name).triton
    arguments = place.arguments(name, container)
    for before, after in (changes or {}).items():
        arguments[arguments.index(before)] = after
    command = [str(installed.executable), f"--backend-directory={backends}", *arguments]
    variables = {**installed.environment(), **place.environment(name, container)}
    with running(command, variables, log) as process:
        yield process
