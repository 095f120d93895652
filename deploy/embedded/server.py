"""Runs the real `tritonserver` of the nvidia-pytriton wheel on a model repository, for laptops, tests and CI.

The wheel brings the server and its Python backend. What it lacks, a backend `onnxruntime`, lies beside this file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

import psutil

from deploy.embedded.control_file import write_control_token
from deploy.embedded.installation import TritonInstallation, find_triton
from deploy.embedded.launch import bound_to_us
from deploy.embedded.leftovers import Leftovers
from deploy.embedded.tls import ServerTls
from detector.errors import InputError, ServerError, ServerStartError
from detector.quarantine import FOLDER_VARIABLE, prepare
from detector.serving import CONTROL_KEY, CONTROL_RULE, MODES, ON_THE_CPU, SENTINEL, is_control_token
from model_repository.manifest import verify_repository

_BACKENDS = Path(__file__).parent / "backends"
_WORK_PREFIX = "stripwire-triton-"
_LOOPBACK = "127.0.0.1"
_DRAIN_SECONDS = 10.0
_RESTRICTED = f"model-repository,logging,trace:{CONTROL_KEY}"


class EmbeddedTriton:
    """A `tritonserver` process serving one model repository, as a context manager.

    The repository is verified against its manifest first. Entering waits until every model is ready; leaving stops the
    server and its Python stubs. Should this process die, the kernel tells the server to stop, and an heir, a process
    that waits for nothing else, removes what it leaves. The kernel does so, too, when the thread ends that started the
    server: start it from one that outlives it.

    Args:
        repository: a model repository written by `stripwire export`.
        mode: `block` answers one past the last class for a trojaned input, `shadow` only reports the verdict.
        host: address to listen on. Anything but the loopback address lets other machines call the server.
        http_port: port of HTTP, 0 for a free one. Likewise `grpc_port` and `metrics_port`.
        grpc_port: port of gRPC.
        metrics_port: port of the Prometheus metrics.
        control_token: what a caller must know to have the server load another version; None for a random one. It is
            left in a file that this user alone can read, see `deploy.embedded.control_file`.
        tls: of gRPC; HTTP, which has none, then listens on the loopback address alone. None is plaintext.
        quarantine: folder where the server keeps what it rejects, see `detector.quarantine`; None leaves that to the
            environment, whose STRIPWIRE_QUARANTINE says the same.
        startup_timeout_seconds: how long the models may take to load.

    Raises:
        SetupError, RepositoryError, InputError: before anything is started.
        ServerStartError: with the server's own error lines.
    """

    def __init__(
        self,
        repository: Path,
        *,
        mode: str = "block",
        host: str = _LOOPBACK,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        control_token: str | None = None,
        tls: ServerTls | None = None,
        quarantine: Path | None = None,
        startup_timeout_seconds: float = 120.0,
    ) -> None:
        if mode not in MODES:
            raise InputError(f"mode: got {mode!r}, expected one of {', '.join(MODES)}")
        if not host:
            raise InputError("host: got nothing, expected an address of this machine such as 127.0.0.1")
        if control_token is not None and not is_control_token(control_token):
            raise InputError(f"control token: expected {CONTROL_RULE}")
        self.control_token = secrets.token_urlsafe(32) if control_token is None else control_token
        self.repository = repository.resolve()
        self.mode = mode
        self.host = host
        self._tls = tls
        self._http_host = host if tls is None else _LOOPBACK  # Triton speaks no HTTPS
        self._ports = choose_ports(host, {"HTTP": http_port, "gRPC": grpc_port, "metrics": metrics_port})
        self.quarantine = None if quarantine is None else quarantine.resolve()
        self._startup_timeout_seconds = startup_timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._token_file: Path | None = None
        self._heir: subprocess.Popen[bytes] | None = None
        self._leftovers = Leftovers(Path(tempfile.gettempdir()) / f"{_WORK_PREFIX}{os.getpid()}-{uuid4().hex[:12]}")

    @property
    def http_address(self) -> str:
        """`host:port` of HTTP."""
        return _address(self._http_host, self._ports["HTTP"])

    @property
    def grpc_address(self) -> str:
        """`host:port` of gRPC."""
        return _address(self.host, self._ports["gRPC"])

    @property
    def metrics_address(self) -> str:
        """`host:port` of the Prometheus metrics, path `/metrics`."""
        return _address(self.host, self._ports["metrics"])

    @property
    def process_id(self) -> int:
        """Process id of the running `tritonserver`."""
        if self._process is None:
            raise ServerError("the embedded Triton is not running")
        return self._process.pid

    @property
    def region_prefix(self) -> str:
        """How the names of its regions of shared memory begin."""
        return self._leftovers.region_prefix

    def __enter__(self) -> EmbeddedTriton:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Verify the repository, start the server, and wait until every model is ready."""
        verify_repository(self.repository)
        if self.quarantine is not None:
            try:
                prepare(self.quarantine)
            except OSError as error:
                raise InputError(
                    f"quarantine: {self.quarantine} cannot be written ({error.strerror or error}), expected a folder "
                    "of this user's, or none"
                ) from error
        triton = find_triton()
        _sweep_work_folders()
        self._leftovers.folder.mkdir(mode=0o700)
        try:
            self._token_file = write_control_token(self._ports["gRPC"], self.control_token)
            self._process = self._launch(triton, self._leftovers.folder)
            self._heir = self._leftovers.left_to_an_heir(self._process.pid, self._token_file)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def wait(self) -> None:
        """Block until the server ends by itself, which it is not meant to do.

        Raises:
            ServerError: it did; with its own error lines.
        """
        if self._process is None:
            raise ServerError("the embedded Triton is not running")
        status = self._process.wait()
        raise ServerError(f"tritonserver ended by itself with status {status}:\n{error_lines(self.server_log())}")

    def stop(self) -> None:
        """Stop the server and its stubs, and remove what they left in memory and on disk. Idempotent.

        Requests that it has are answered, for up to 10 seconds; meanwhile new ones are turned away.
        """
        process, self._process = self._process, None
        # First of all, or a monitor that finds the token takes the end for a fault, and loads models again.
        token_file, self._token_file = self._token_file, None
        if token_file is not None:
            token_file.unlink(missing_ok=True)
        if process is not None:
            self._drain(process)
            process.terminate()
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._leftovers.remove()
        heir, self._heir = self._heir, None
        if heir is not None:
            with heir:
                heir.kill()

    def _drain(self, process: subprocess.Popen[bytes]) -> None:
        """Have the server turn new requests away and answer those that it has, for as long as that may take.

        At SIGTERM Triton would fail a request to an ensemble at its next step. Unloading the ensemble alone leaves the
        models behind it to the requests that are under way.
        """
        deadline = time.monotonic() + _DRAIN_SECONDS
        # Where it is still starting, hangs or has ended there is nothing to wait for.
        with contextlib.suppress(OSError, HTTPException, ValueError):
            self._control("models/guarded/unload")
            while process.poll() is None and time.monotonic() < deadline:
                states = {model["name"]: model.get("state") for model in self._control("index")}
                if states.get("guarded") in (None, "UNAVAILABLE"):
                    return
                time.sleep(0.05)

    def _control(self, call: str) -> Any:
        """Return the answer of Triton's model repository API; None where it has no body."""
        url = f"http://{self.http_address}/v2/repository/{call}"
        request = urllib.request.Request(url, b"{}", {CONTROL_KEY: self.control_token}, method="POST")
        with urllib.request.urlopen(request, timeout=2) as answer:  # noqa: S310  HTTP, our own server
            body = answer.read()
        return json.loads(body) if body else None

    def server_log(self) -> str:
        """Return what the server has printed so far."""
        try:
            return (self._leftovers.folder / "server.log").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:  # it does not run
            return ""

    def misses_the_gpu(self) -> bool:
        """Say whether a network that a GPU was there for runs on the CPU, because onnxruntime could not load CUDA."""
        return ON_THE_CPU in self.server_log()

    def _launch(self, triton: TritonInstallation, work_folder: Path) -> subprocess.Popen[bytes]:
        backends = work_folder / "backends"
        shutil.copytree(_BACKENDS, backends, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(triton.python_backend, backends / "python", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy2(triton.stub, backends / "python" / triton.stub.name)
        # Triton starts its Python stubs by a command line in which a blank ends an argument.
        repository = work_folder / "repository"
        repository.symlink_to(self.repository, target_is_directory=True)
        command = bound_to_us(
            str(triton.executable),
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name={self.region_prefix}",
            "--disable-auto-complete-config",
            f"--http-address={self._http_host}",
            f"--http-port={self._ports['HTTP']}",
            f"--grpc-address={self.host}",
            f"--grpc-port={self._ports['gRPC']}",
            f"--metrics-address={self.host}",
            f"--metrics-port={self._ports['metrics']}",
            "--metrics-config=summary_latencies=true",
            "--metrics-config=summary_quantiles=0.5:0.05,0.99:0.001",  # with how far off each may be
            "--allow-gpu-metrics=false",
            "--exit-timeout-secs=10",
            # Versions are switched by asking for it. Whoever may load a model may run code: only with the token.
            "--model-control-mode=explicit",
            "--load-model=guarded",  # and what it consists of
            f"--load-model={SENTINEL}",  # which a fused graph holds inside, where nobody can ask it
            f"--grpc-restricted-protocol={_RESTRICTED}={self.control_token}",
            f"--http-restricted-api={_RESTRICTED}={self.control_token}",
        )
        if self._tls is not None:
            command += self._tls.options
        if self.mode != "block":
            command.append(f"--model-config-name={self.mode}")
        environment = triton.environment()
        if self.quarantine is not None:
            environment[FOLDER_VARIABLE] = str(self.quarantine)
        with (work_folder / "server.log").open("wb") as log:
            return subprocess.Popen(  # noqa: S603  our own command line, no shell
                command,
                cwd=work_folder,  # Python looks for modules where it is started: nobody else's are to be found there
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def _wait_until_ready(self) -> None:
        process = self._process
        assert process is not None  # noqa: S101  started just before
        hidden = False
        deadline = time.monotonic() + self._startup_timeout_seconds
        while time.monotonic() < deadline:
            if process.poll() is not None:
                status = process.returncode
                raise ServerStartError(
                    f"tritonserver ended with status {status} while starting:\n{error_lines(self.server_log())}"
                )
            if not hidden and self.server_log():  # it has read its options
                _hide_argument(process.pid, self.control_token)
                hidden = True
            if self._answers_ready():
                return
            time.sleep(0.1)
        waited = f"{self._startup_timeout_seconds:g} seconds"
        raise ServerStartError(
            f"tritonserver was not ready within {waited}; if its models take longer to load, allow more "
            f"(--startup-timeout):\n{error_lines(self.server_log())}"
        )

    def _answers_ready(self) -> bool:
        url = f"http://{self.http_address}/v2/models/guarded/ready"
        try:
            with urllib.request.urlopen(url, timeout=1) as answer:
                return int(answer.status) == 200
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False


def _address(host: str, port: int) -> str:
    host = {"0.0.0.0": _LOOPBACK, "::": "::1"}.get(host, host)  # noqa: S104  compared, not bound
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _hide_argument(process_id: int, secret: str) -> None:
    """Overwrite `secret` in a child's command line, which every user of the machine can read.

    Triton takes it in no other way. Where the kernel does not let us, the command line stays as it is.
    """
    with contextlib.suppress(OSError):
        after_name = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
        start, end = int(after_name[45]), int(after_name[46])  # arg_start and arg_end, proc(5)
        with Path(f"/proc/{process_id}/mem").open("r+b", buffering=0) as memory:
            memory.seek(start)
            arguments = memory.read(end - start)
            memory.seek(start)
            memory.write(arguments.replace(secret.encode(), b"*" * len(secret)))


def _sweep_work_folders() -> None:
    """Remove what processes of ours left behind that were killed, and their heirs, too."""
    for folder in Path(tempfile.gettempdir()).iterdir():
        name = re.fullmatch(rf"{_WORK_PREFIX}([0-9]{{1,9}})-\w+", folder.name, re.ASCII)
        if name is None or psutil.pid_exists(int(name[1])):
            continue
        with contextlib.suppress(OSError):  # another's sweep was first
            if folder.lstat().st_uid == os.getuid():
                Leftovers(folder).remove(patience_seconds=0)


def choose_ports(host: str, wanted: Mapping[str, int]) -> dict[str, int]:
    """Return `wanted`, a port for each protocol, with every 0 replaced by a free port of `host`, all different.

    Raises:
        InputError: a port is out of range, asked for twice, or in use; or `host` is not an address of this machine.
    """
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise InputError(
            f"host: got {host!r}, expected an address of this machine ({error.strerror or error})"
        ) from error
    ports: dict[str, int] = {}
    with contextlib.ExitStack() as held:
        for protocol, port in wanted.items():
            if not 0 <= port <= 65535:
                raise InputError(f"{protocol} port: got {port}, expected 0 (any free one) to 65535")
            if port in ports.values():
                raise InputError(
                    f"{protocol} port: got {port}, which another protocol has already; expected another, or 0"
                )
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            probe = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                probe.listen(1)
            except OSError as error:
                raise InputError(
                    f"{protocol} port: {port} of {host} cannot be used ({error.strerror or error}); choose another, or "
                    "0 for a free one. What a server had that was killed is free again within 20 seconds"
                ) from error
            ports[protocol] = int(probe.getsockname()[1])
    return ports


_ERROR_LINE = re.compile(r"^E\d{4} |error:|Error:|failed to load|UNAVAILABLE: |^terminate called|^  what\(\): ")


def error_lines(log: str, most: int = 20) -> str:
    """Return the lines of a Triton log that tell what went wrong; its last lines if none does."""
    lines = [line for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if _ERROR_LINE.search(line)]
    return "\n".join((telling or lines)[-most:]) or "(it printed nothing)"
