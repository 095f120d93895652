"""What the images install is pinned, by version and by hash, and is what their programs need."""

from __future__ import annotations

import re
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.docker.test_images import IMAGES, inherited, stages

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deploy" / "docker" / "packages"
FILES = sorted(FOLDER.glob("*.txt"))
DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "deploy" / "docker" / "Dockerfile").read_text(encoding="utf-8"))


def requirements(file: Path) -> dict[str, tuple[Requirement, list[str]]]:
    """Return what a file of packages has for this Python, by name, with its hashes."""
    text = re.sub(r"(?m)^\s*#.*\n|\s*\\\n", "", file.read_text(encoding="utf-8"))
    found: dict[str, tuple[Requirement, list[str]]] = {}
    for line in text.splitlines():
        stated, *hashes = line.split("    --hash=")
        wanted = Requirement(stated)
        if wanted.marker is None or wanted.marker.evaluate():
            name = canonicalize_name(wanted.name)
            assert name not in found, line
            found[name] = (wanted, hashes)
    return found


def needed(package: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]] | None = None) -> set[str]:
    """Return the names of all that a package with extras needs on this machine, by the metadata of what it has."""
    seen = set() if seen is None else seen
    if (package, extras) not in seen:
        seen.add((package, extras))
        for line in requires(package) or ():
            wanted = Requirement(line)
            if any(wanted.marker is None or wanted.marker.evaluate({"extra": extra}) for extra in extras | {""}):
                needed(canonicalize_name(wanted.name), frozenset(wanted.extras), seen)
    return {name for name, _ in seen}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_package_has_one_version_that_the_tests_run_with_and_its_hashes(file: Path) -> None:
    tested = requirements(ROOT / "constraints.txt")
    assert requirements(file)
    for name, (wanted, hashes) in requirements(file).items():
        assert re.fullmatch(r"==[^*,]+", str(wanted.specifier)), wanted
        assert hashes, wanted
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes)
        assert wanted.specifier == tested[name][0].specifier


@pytest.mark.parametrize(
    ("image", "extras"), [("monitor", {"monitor"}), ("embedded", {"embedded"}), ("exporter", {"exporter", "client"})]
)
def test_an_image_has_what_its_programs_need_and_no_more(image: str, extras: set[str]) -> None:
    assert requirements(FOLDER / f"{image}.txt").keys() == needed("stripwire", frozenset(extras)) - {"stripwire"}


@pytest.mark.parametrize("file", [file for file in FILES if file.stem != "exporter"], ids=lambda file: file.stem)
def test_tensorflow_is_in_the_exporter_alone(file: Path) -> None:
    assert not {"tensorflow", "tensorflow-cpu"} & requirements(file).keys()
    assert "tensorflow-cpu" in (FOLDER / "exporter.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("cupy", ["cupy-cuda12x", "cupy-cuda13x"])
def test_the_server_has_numpy_and_a_cupy_that_it_can_use(cupy: str) -> None:
    found = requirements(FOLDER / f"server-{cupy}.txt")
    assert found.keys() == {"numpy", "fastrlock", cupy}
    assert int(next(iter(found[cupy][0].specifier)).version.split(".")[0]) < 14


def test_nothing_is_installed_without_its_hash_but_our_own_wheel() -> None:
    installs = re.findall(r"-m pip (?:--python \S+ )?install (.+?)(?= &&|\n)", DOCKERFILE)
    named = set()
    for arguments in installs:
        match = re.search(r'--require-hashes --requirement "?\S*packages/([^\s"]+)', arguments)
        if match is None:
            assert arguments == "--no-index /build/wheels/*.whl"
        else:
            named.add(match[1])
    assert len(installs) == 9
    assert named == {"build.txt", "monitor.txt", "embedded.txt", "exporter.txt", "server-${CUPY}.txt"}
    (default,) = re.findall(r"(?m)^ARG CUPY=(\S+)$", DOCKERFILE)
    assert FOLDER / f"server-{default}.txt" in FILES


@pytest.mark.parametrize("image", IMAGES)
def test_nothing_runs_that_a_package_brings_and_nothing_comes_that_is_not_listed(image: str) -> None:
    settings = "\n".join(line for line in inherited(f"{image}-packages") if line.startswith("ENV "))
    assert "PIP_ONLY_BINARY=:all:" in settings.split()
    assert "PIP_NO_DEPS=1" in settings.split()
    assert "PIP_PYTHON=/opt/stripwire/bin/python" in settings.split()
    (build,) = (line for line in stages()["wheel"][1] if "build.txt" in line)
    assert "--only-binary=:all:" in build
    assert "--no-deps" in build


def test_make_writes_every_file() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(re.findall(r"--output-file \$\(PACKAGES\)/(\S+)", makefile)) == {file.name for file in FILES}
