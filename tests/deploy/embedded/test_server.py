"""The embedded Triton: the real server, started, stopped, and refused with a reason."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton_grpc

from deploy.embedded.server import EmbeddedTriton, choose_ports, error_lines
from detector.errors import InputError, RepositoryError, ServerError, ServerStartError
from model_repository.manifest import read_manifest, write_manifest
from tests.networks import write_small_repository

SHAPE, CLASSES = (8, 7, 3), 5
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "repository"
    write_small_repository(folder, SHAPE, CLASSES)
    return folder


def classify(address: str) -> tuple[list[int], list[bool]]:
    image = triton_grpc.InferInput("image", [1, *SHAPE], "UINT8")
    image.set_data_from_numpy(np.zeros((1, *SHAPE), np.uint8))
    with triton_grpc.InferenceServerClient(address) as client:
        answer = client.infer("guarded", [image])
    return answer.as_numpy("label").ravel().tolist(), answer.as_numpy("trojaned").ravel().tolist()


def leftovers(prefix: str) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith(prefix)]  # noqa: PTH208, S108


def heirs() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if any("leftovers.py" in part for part in child.cmdline())]


def wait_until_gone(processes: list[psutil.Process], seconds: float = 20) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert alive == []


def test_it_serves_and_leaves_no_process_memory_or_file_behind(repository: Path) -> None:
    before, heirs_before = sorted(path.name for path in repository.rglob("*")), heirs()
    with EmbeddedTriton(repository) as server:
        family = psutil.Process(server.process_id).children(recursive=True)
        assert len(family) >= 5  # a stub for each Python-backed model
        assert len(heirs()) == len(heirs_before) + 1
        assert classify(server.grpc_address) == ([CLASSES], [True])
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as answer:
            assert b"nv_inference_count" in answer.read()
        listening = {
            c.laddr.ip for c in psutil.Process(server.process_id).net_connections("tcp") if c.status == "LISTEN"
        }
        assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    wait_until_gone(family)
    assert heirs() == heirs_before
    assert leftovers(server.region_prefix) == []
    assert sorted(path.name for path in repository.rglob("*")) == before


def test_a_folder_may_have_blanks_in_its_name(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository, tmp_path / "my own models")
    with EmbeddedTriton(tmp_path / "my own models") as server:
        labels, trojaned = classify(server.grpc_address)
    assert (labels, trojaned) == ([CLASSES], [True])


def test_in_shadow_mode_the_verdict_is_only_reported(repository: Path) -> None:
    with EmbeddedTriton(repository, mode="shadow") as server:
        labels, trojaned = classify(server.grpc_address)
    assert labels[0] < CLASSES
    assert trojaned == [True]


def test_an_altered_repository_is_not_served(repository: Path, tmp_path: Path) -> None:
    altered = tmp_path / "repository"
    subprocess.run(["cp", "-r", repository, altered], check=True)  # noqa: S607
    (altered / "strip_verdict" / "1" / "calibration.json").write_text('{"threshold_bits": 0.0}')
    with pytest.raises(RepositoryError, match="was altered"), EmbeddedTriton(altered):
        pass


def test_when_a_model_does_not_load_the_servers_own_error_lines_are_shown(repository: Path, tmp_path: Path) -> None:
    broken = tmp_path / "repository"
    subprocess.run(["cp", "-r", repository, broken], check=True)  # noqa: S607
    (broken / "strip_verdict" / "1" / "calibration.json").write_text("{}")
    write_manifest(broken, read_manifest(broken)["versions"], "1")
    server = EmbeddedTriton(broken)
    with pytest.raises(ServerStartError, match=r"calibration\.json: no usable calibration"):
        server.start()
    assert leftovers(server.region_prefix) == []


def test_a_server_that_dies_is_reported(repository: Path) -> None:
    with EmbeddedTriton(repository) as server:
        stubs = psutil.Process(server.process_id).children(recursive=True)
        os.kill(server.process_id, signal.SIGKILL)
        with pytest.raises(ServerError, match="ended by itself with status -9"):
            server.wait()
        assert any(stub.is_running() for stub in stubs)  # its Python processes live on
    wait_until_gone(stubs)
    assert leftovers(server.region_prefix) == []


@pytest.mark.parametrize(
    ("stop", "triton"),
    [
        (signal.SIGTERM, "obeys"),
        (signal.SIGTERM, "crashes"),
        (signal.SIGKILL, "obeys"),
        (signal.SIGKILL, "crashes"),
        (signal.SIGKILL, "hangs"),
    ],
)
def test_when_the_command_dies_the_server_dies_too_and_leaves_nothing(
    repository: Path, tmp_path: Path, stop: signal.Signals, triton: str
) -> None:
    command = [sys.executable, "-m", "stripwire", "serve", str(repository)]
    command += ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    environment = os.environ | {"TMPDIR": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if b"Ctrl-C stops it" in line:
            break
    family = psutil.Process(process.pid).children(recursive=True)
    assert len([*tmp_path.glob("stripwire-triton-*"), *tmp_path.glob("stripwire-*/control-*")]) == 2
    (server,) = (member for member in family if member.name() == "tritonserver")
    (prefix,) = re.findall(r"shm-region-prefix-name=(\S+)", " ".join(server.cmdline()))
    if triton == "hangs":
        server.suspend()
    os.killpg(process.pid, stop)  # as a shell does that ends its jobs
    if triton == "crashes":
        server.kill()
    process.wait()
    process.stdout.close()
    wait_until_gone(family, seconds=30 if triton == "hangs" else 20)
    assert leftovers(prefix) == []
    assert [*tmp_path.glob("stripwire-triton-*"), *tmp_path.glob("stripwire-*/control-*")] == []


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"gRPC port: {port} of 127\.0\.0\.1 cannot be used"):
            choose_ports("127.0.0.1", {"gRPC": port})


@pytest.mark.parametrize("port", [70000, -1])
def test_a_port_out_of_range_is_refused(port: int) -> None:
    with pytest.raises(InputError, match=f"HTTP port: got {port}"):
        choose_ports("127.0.0.1", {"HTTP": port})


def test_a_port_given_twice_is_refused() -> None:
    (free,) = choose_ports("127.0.0.1", {"HTTP": 0}).values()
    with pytest.raises(InputError, match=f"gRPC port: got {free}, which another protocol has already"):
        choose_ports("127.0.0.1", {"HTTP": free, "gRPC": free})


def test_a_host_that_is_none_is_named() -> None:
    with pytest.raises(InputError, match=r"host: got 'not\.a\.host'"):
        choose_ports("not.a.host", {"HTTP": 0})


LEAVING = """
import sys, time
from pathlib import Path
from deploy.embedded.leftovers import Leftovers

folder, token = map(Path, sys.argv[1:])
print(Leftovers(folder).left_to_an_heir(4194999, token).pid, flush=True)
time.sleep(600)
"""


def test_an_heir_leaves_a_new_servers_token_and_acts_before_anybody_asks_how_its_parent_ended(tmp_path: Path) -> None:
    token, folder = tmp_path / "control-8001", tmp_path / "work"
    token.write_text("of the first server")
    folder.mkdir()
    command = [sys.executable, "-c", LEAVING, str(folder), str(token)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as parent:
        assert parent.stdout is not None
        heir = psutil.Process(int(parent.stdout.readline()))
        token.unlink()
        token.write_text("of the second server")
        parent.kill()
        wait_until_gone([heir])
    assert token.read_text() == "of the second server"
    assert not folder.exists()


def test_the_folders_of_killed_servers_are_swept(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    nobody = 4194999  # beyond the largest process id
    dead, busy = tmp_path / f"stripwire-triton-{nobody}-left", tmp_path / f"stripwire-triton-{os.getpid()}-mine"
    others = [tmp_path / f"stripwire-triton-{name}" for name in (f"{nobody}-**", "²-x", f"{10**26}-x", "", "x")]
    foreign = tmp_path / f"stripwire-triton-{nobody}-foreign"
    for folder in (dead, busy, foreign, *others):
        folder.mkdir()
    if os.getuid() == 0:
        os.chown(foreign, 10001, 10001)
        others.append(foreign)
    regions = [Path("/dev/shm") / f"{folder.name}-region" for folder in (dead, busy)]  # noqa: S108
    for region in regions:
        region.touch()
    stub = dead / "stub"
    shutil.copy("/bin/sleep", stub)
    with subprocess.Popen([stub, "600"]) as left:
        with pytest.raises(ServerStartError):
            EmbeddedTriton(repository, startup_timeout_seconds=0.01).start()
        assert left.wait(timeout=20) == -signal.SIGKILL
    assert not dead.exists()
    assert all(folder.exists() for folder in (busy, *others))
    assert [region.exists() for region in regions] == [False, True]
    regions[1].unlink()


def test_free_ports_are_all_different() -> None:
    assert len(set(choose_ports("127.0.0.1", {"HTTP": 0, "gRPC": 0, "metrics": 0}).values())) == 3


def test_an_unknown_mode_is_refused(repository: Path) -> None:
    with pytest.raises(InputError, match="mode: got 'off', expected one of block, shadow"):
        EmbeddedTriton(repository, mode="off")


def test_error_lines_prefer_errors_over_chatter() -> None:
    log = "I1122 fine\nE1122 12:00 broken\nI1122 fine again\n"
    assert error_lines(log) == "E1122 12:00 broken"
    assert error_lines("one\ntwo\n") == "one\ntwo"
    assert "nothing" in error_lines("")


def test_starting_takes_only_as_long_as_it_is_allowed(repository: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ServerStartError, match=r"not ready within 0\.01 seconds"):
        EmbeddedTriton(repository, startup_timeout_seconds=0.01).start()
    assert time.monotonic() - started < 60


def test_addresses_are_written_as_clients_read_them(repository: Path) -> None:
    assert EmbeddedTriton(repository, host="0.0.0.0").grpc_address.startswith("127.0.0.1:")  # noqa: S104
    assert EmbeddedTriton(repository, host="::1").grpc_address.startswith("[::1]:")
    with pytest.raises(InputError, match="host: got nothing"):
        EmbeddedTriton(repository, host="")


def test_modules_where_the_command_is_started_are_not_those_of_the_server(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "detector").mkdir()
    (tmp_path / "detector" / "__init__.py").write_text("raise RuntimeError('somebody else has a package of that name')")
    monkeypatch.chdir(tmp_path)
    with EmbeddedTriton(repository) as server:
        assert classify(server.grpc_address) == ([CLASSES], [True])


def test_a_quarantine_that_cannot_be_written_is_refused_before_the_start(repository: Path) -> None:
    with pytest.raises(InputError, match="quarantine: /proc/quarantine cannot be written"):
        EmbeddedTriton(repository, quarantine=Path("/proc/quarantine")).start()
