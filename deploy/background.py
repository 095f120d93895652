"""Programs that run beside us: each writes its own log, is waited for, and ends when we do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from deploy.embedded.launch import bound_to_us
from detector.errors import ServerStartError, SetupError

_START_SECONDS = 60.0
_END_SECONDS = 60.0


def find_program(name: str, package: str) -> str:
    """Return the path of a program, of the virtual environment or of the machine.

    Args:
        name: of the program.
        package: that has it, and how to install that, for errors.

    Raises:
        SetupError: it is not installed.
    """
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        raise SetupError(f"there is no {name}, expected the one of {package}")
    return found


@contextmanager
def running(
    name: str,
    command: Sequence[str],
    log: Path,
    is_ready: Callable[[], bool],
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Run a program until the block ends, which begins when it is ready. Ctrl-C does not reach it.

    Args:
        name: of the program, for errors.
        command: an absolute path and its arguments.
        log: where all that it prints goes.
        is_ready: asked until it says so.
        folder: that it runs in; None for ours.
        environment: of it; None for ours.

    Raises:
        ServerStartError: it ended, or was not ready within a minute; with what it printed.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603  the caller's own command line, no shell
            bound_to_us(*command),
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    soon = Retrying(
        retry=retry_if_result(lambda waits: waits),
        wait=wait_fixed(0.1),
        stop=stop_after_delay(_START_SECONDS),
        retry_error_callback=lambda _: True,
    )
    try:
        too_late = soon(lambda: process.poll() is None and not is_ready())
        if too_late or process.poll() is not None:
            raise ServerStartError(f"{name} did not start:\n{log.read_text(errors='replace')}")
        yield
    finally:
        process.terminate()
        process.wait(timeout=_END_SECONDS)
