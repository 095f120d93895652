"""Becomes a program that is told to stop when its parent dies: `python launch.py PARENT PROGRAM …`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def bound_to_us(*command: str) -> list[str]:
    """Return a command that runs `command`, an absolute path and its arguments, until this process dies."""
    return [sys.executable, __file__, str(os.getpid()), *command]


def main(arguments: list[str]) -> None:
    """Ask the kernel for SIGTERM at the parent's death, then replace this process by the program."""
    parent, *command = arguments
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it died before the kernel was asked
        sys.exit(1)
    os.execv(command[0], command)  # noqa: S606  the caller's own command line, no shell


if __name__ == "__main__":
    main(sys.argv[1:])
