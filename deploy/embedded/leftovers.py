"""What a server has on this machine beside itself, and who removes it should we be killed.

Triton does not always end in order: told to stop while it has a request it may crash, and its Python processes, which
hold a model each, then live on for ever. We remove them when we stop a server. An heir does where we no longer can: a
process that does nothing but wait for our death.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  the place where Triton's Python backend keeps its regions, not a temp file
_SERVER_SECONDS = 15.0
_STUB_SECONDS = 5.0
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Leftovers:
    """What a server has on this machine.

    Attributes:
        folder: that it works in. Its name begins those of its regions of shared memory, and its Python processes run
            from there.
    """

    folder: Path

    @property
    def region_prefix(self) -> str:
        """How the names of its regions of shared memory begin."""
        return f"{self.folder.name}-"

    def remove(self, *, patience_seconds: float = _STUB_SECONDS) -> None:
        """Remove all of it; its Python processes may take so long to end by themselves."""
        stubs = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, IndexError):
                if process.cmdline()[0].startswith(f"{self.folder}/"):
                    stubs.append(process)
        _end(stubs, patience_seconds)
        for region in _SHARED_MEMORY.iterdir():
            if region.name.startswith(self.region_prefix):
                with contextlib.suppress(OSError):  # another user's
                    region.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)

    def left_to_an_heir(self, server_id: int, token_file: Path) -> subprocess.Popen[bytes]:
        """Start the process that removes all of it should we die, and return it; whoever calls `remove` then kills it.

        Args:
            server_id: process id of the server, which the heir waits for.
            token_file: that the server's control token is in, which goes with it.
        """
        arguments = (os.getpid(), self.folder, server_id, token_file, _identity(token_file))
        return subprocess.Popen(  # noqa: S603  our own interpreter and code
            [sys.executable, "-I", __file__, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )


def _end(processes: list[psutil.Process], patience_seconds: float) -> None:
    """Wait for processes, then kill those that go on."""
    _, alive = psutil.wait_procs(processes, timeout=patience_seconds)
    for survivor in alive:
        with contextlib.suppress(psutil.Error):  # gone, or another user's
            survivor.kill()


def _inherit(parent: str, folder: str, server_id: str, token_file: str, token_identity: str) -> None:
    """Wait for the death of who started us; the kernel then tells the server to stop, and we remove what it leaves."""
    servers = []
    with contextlib.suppress(psutil.NoSuchProcess):  # now, or its number may be another's by then
        servers.append(psutil.Process(int(server_id)))
    while os.getppid() == int(parent):  # who is dead has no children, even before anybody asks how it ended
        time.sleep(_LOOK_SECONDS)
    token = Path(token_file)
    if _identity(token) == token_identity:
        token.unlink(missing_ok=True)
    _end(servers, _SERVER_SECONDS)
    Leftovers(Path(folder)).remove()


def _identity(file: Path) -> str:
    """Return what tells a file from one that takes its name later: another server's, say."""
    try:
        status = file.stat()
    except OSError:
        return "absent"
    return f"{status.st_ino}-{status.st_mtime_ns}"


if __name__ == "__main__":
    _inherit(*sys.argv[1:])
