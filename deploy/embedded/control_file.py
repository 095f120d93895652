"""Where a server leaves its control token, so that commands of the same user on the same machine find it."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from detector.errors import SetupError


def control_file(grpc_port: int | str) -> Path:
    """Return the file for the server at `grpc_port` of this machine."""
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    return folder / f"stripwire-{os.getuid()}" / f"control-{grpc_port}"


def write_control_token(grpc_port: int, token: str) -> Path:
    """Write the token to a file that its owner alone can read, and return the file.

    Raises:
        SetupError: the folder belongs to somebody else, or cannot be written.
    """
    path = control_file(grpc_port)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(path.parent)
        path.unlink(missing_ok=True)  # of a server that was killed
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(token)
    except OSError as error:
        raise SetupError(f"{path}: the control token cannot be left there ({error.strerror or error})") from error
    return path


def read_control_token(grpc_port: int | str) -> str | None:
    """Return the token of the server at `grpc_port` of this machine; None where we have none.

    Raises:
        SetupError: the folder belongs to somebody else, or the file cannot be read.
    """
    path = control_file(grpc_port)
    try:
        _check_private(path.parent)
        return path.read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SetupError(f"{path}: the control token cannot be read ({error}); give --control-token") from error


def _check_private(folder: Path) -> None:
    """Raise SetupError where others could read or replace what is in `folder`."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise SetupError(
            f"{folder}: is open to others, and no place for a secret; expected a folder of yours with mode 700: remove "
            "it, or set XDG_RUNTIME_DIR"
        )
