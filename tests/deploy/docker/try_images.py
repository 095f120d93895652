"""Builds the images `monitor` and `embedded` without a container engine, starts both, and has one watch the other.

    apt-get install buildah debootstrap
    python -m tests.deploy.docker.try_images                      # as root; further options go to `buildah build`

The base is no public image but a Debian bookworm made by debootstrap. Each image runs in namespaces of its own, as its
own user, on a root file system that is mounted read-only, with /tmp and /dev/shm in memory: what an engine would do for
`docker run --read-only`, less control groups and seccomp.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from samples.canaries import Canaries, write_canaries

ROOT = Path(__file__).parents[3]
BASE = "localhost/stripwire-base:bookworm"
USER = 10001
_SHAPE, _CLASSES = (8, 7, 3), 5
_PACKAGES = "python3,python3-venv,python3-pip,libpython3.11,ca-certificates"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# What an engine does before it starts the program: a read-only root, and what is mounted into it.
_ENTER = """
set -e
mount --bind {root} {root}
{binds}
mount -o remount,bind,ro {root}
mount -t proc proc {root}/proc
mount --rbind /dev {root}/dev
mount -t tmpfs -o size=256m,mode=1777 tmpfs {root}/dev/shm
mount -t tmpfs -o size=1g,mode=1777 tmpfs {root}/tmp
exec chroot --userspec={user}:{user} --groups= {root} env --ignore-environment {environment} \\
    sh -c 'cd {folder} && exec "$@"' sh {command}
"""


def main(options: list[str]) -> None:
    """Build, start, watch, stop, and say what was seen."""
    make_base()
    with tempfile.TemporaryDirectory(prefix="stripwire-images-") as folder:
        models, data = Path(folder) / "models", Path(folder) / "data"
        data.mkdir()
        _write_repository(models)
        images = np.random.default_rng(7).integers(0, 256, (6, *_SHAPE), dtype=np.uint8)
        write_canaries(data / "canaries.npz", Canaries(images, np.arange(6) >= 4, _CLASSES))
        subprocess.run(["chown", "--recursive", f"{USER}:{USER}", folder], check=True)  # noqa: S607
        for image in ("monitor", "embedded"):
            build(image, options)
        with container("embedded") as (embedded, healthy), embedded({models: "/models:ro"}) as server:
            wait_for("the server is healthy", lambda: healthy() == 0, 120)
            show_confinement(server)
            with container("monitor") as (monitor, watching):
                settings = {"STRIPWIRE_CANARIES": "/data/canaries.npz", "STRIPWIRE_CANARIES_PER_MINUTE": "600"}
                with monitor({data: "/data"}, settings) as process:
                    wait_for("the monitor is ready", lambda: _ready() == 200, 60)
                    print("  /readyz:", httpx.get("http://127.0.0.1:8003/readyz").text)
                    assert watching() == 0, "the health check of the monitor fails"
                    show_confinement(process)
                    metrics = httpx.get("http://127.0.0.1:8003/metrics").text
                    for line in metrics.splitlines():
                        if line.startswith("stripwire_canary_total"):
                            print(" ", line)


def make_base() -> None:
    """Make the image that stands in for `python:3.11-slim-bookworm`, unless there is one."""
    if buildah("images", "--quiet", BASE, check=False).strip():
        return
    with tempfile.TemporaryDirectory() as folder:
        told("making a base image by debootstrap")
        command = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        name = buildah("from", "scratch").strip()
        buildah("add", name, folder, "/")
        buildah("config", "--env", f"PATH={_PATH}", name)
        buildah("commit", "--rm", name, BASE)


def build(image: str, options: list[str]) -> None:
    """Build one target of the Dockerfile, and say how large it is."""
    told(f"building {image}")
    started = time.monotonic()
    arguments = ["--isolation", "chroot", "--format", "docker", "--build-arg", f"PYTHON_IMAGE={BASE}"]
    arguments += ["--target", image, "--tag", f"localhost/stripwire-{image}"]
    buildah("build", *arguments, *options, "--file", "deploy/docker/Dockerfile", ".")
    size = buildah("images", "--format", "{{.Size}}", f"localhost/stripwire-{image}").strip()
    print(f"  {size}, of which the base has {buildah('images', '--format', '{{.Size}}', BASE).strip()}", end="")
    print(f", in {time.monotonic() - started:.0f} s")


@contextmanager
def container(image: str) -> Iterator[tuple[Callable[..., Any], Callable[[], int]]]:
    """Yield what runs a built image with folders mounted (`/place` or `/place:ro`), and what runs its health check."""
    about = json.loads(buildah("inspect", "--type", "image", f"localhost/stripwire-{image}"))["Docker"]["config"]
    assert about["User"] == f"{USER}:{USER}", about["User"]
    name = buildah("from", f"localhost/stripwire-{image}").strip()
    root = Path(buildah("mount", name).strip())

    def enter(mounts: Mapping[Path, str], environment: Mapping[str, str], command: list[str]) -> list[str]:
        binds = []
        for folder, place in mounts.items():
            target = f"{root}{place.removesuffix(':ro')}"
            Path(target).mkdir(exist_ok=True)
            binds.append(f"mount --bind {folder} {target}")
            if place.endswith(":ro"):
                binds.append(f"mount -o remount,bind,ro {target}")
        script = _ENTER.format(
            root=root,
            user=USER,
            binds="\n".join(binds),
            environment=shlex.join([*about["Env"], *(f"{key}={value}" for key, value in environment.items())]),
            folder=about["WorkingDir"] or "/",
            command=shlex.join(command),
        )
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script]

    def start(mounts: Mapping[Path, str], environment: Mapping[str, str] | None = None) -> Any:
        return _running(image, enter(mounts, environment or {}, [*about["Entrypoint"], *about["Cmd"]]))

    def check() -> int:
        _, *command = about["Healthcheck"]["Test"]
        return subprocess.run(enter({}, {}, command), check=False, capture_output=True).returncode

    try:
        yield start, check
    finally:
        buildah("umount", name)
        buildah("rm", name)


@contextmanager
def _running(image: str, command: list[str]) -> Iterator[psutil.Process]:
    """Start a program in its namespaces; at the end send it SIGTERM, as an engine does, and have it end with 0."""
    told(f"starting {image}")
    outer = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    inner = None
    try:
        time.sleep(1)
        assert outer.poll() is None, f"{image} ended by itself with {outer.returncode}"
        (inner,) = psutil.Process(outer.pid).children()
        yield inner
        inner.send_signal(signal.SIGTERM)
        status = outer.wait(timeout=30)
        print(f"  {image} ended with {status} after SIGTERM")
        assert status == 0
    finally:
        if inner is not None and inner.is_running():
            inner.kill()  # process 1 of its namespace, so all of them
        outer.kill()
        outer.wait()


def show_confinement(process: psutil.Process) -> None:
    """Check that a program is nobody, that its root is read-only, and that it left nothing but in memory."""
    assert process.uids().real == process.uids().effective == USER
    (root,) = (mount for mount in _mounts(process) if mount[0] == "/")
    assert "ro" in root[1].split(",")
    places = sorted(place for place, options in _mounts(process) if "rw" in options.split(","))
    print(f"  user {process.uids().real}, root read-only, process 1: {' '.join(process.cmdline()[:3])}")
    shown = {place for place in places if place == "/dev/shm" or not place.startswith(("/dev", "/proc"))}  # noqa: S108
    print("  writable:", ", ".join(sorted(shown)))


def _mounts(process: psutil.Process) -> list[tuple[str, str]]:
    lines = Path(f"/proc/{process.pid}/mountinfo").read_text(encoding="utf-8").splitlines()
    return [(fields[4], fields[5]) for fields in map(str.split, lines)]


def wait_for(what: str, holds: Callable[[], bool], seconds: float) -> None:
    """Wait until something holds, and say so."""
    started = time.monotonic()
    while not holds():
        assert time.monotonic() < started + seconds, f"not within {seconds:g} s: {what}"
        time.sleep(0.5)
    print(f"  {what} after {time.monotonic() - started:.0f} s")


def _ready() -> int:
    try:
        return httpx.get("http://127.0.0.1:8003/readyz").status_code
    except httpx.TransportError:
        return 0


def buildah(*arguments: str, check: bool = True) -> str:
    """Run buildah, whose images are plain folders (driver vfs), and return what it prints on stdout."""
    command = ["buildah", "--storage-driver", "vfs", *arguments]
    answer = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=check)
    return answer.stdout


def told(what: str) -> None:
    """Say what is being done."""
    print(what, flush=True)


def _write_repository(folder: Path) -> None:
    from tests.networks import write_small_repository

    write_small_repository(folder, _SHAPE, _CLASSES)


if __name__ == "__main__":
    main(sys.argv[1:])
