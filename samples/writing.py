"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from detector.errors import InputError


def check_new_file(path: Path, suffix: str = "") -> None:
    """Raise InputError, before long work, where no new file could appear at `path`, or its name ends otherwise."""
    if not path.name.endswith(suffix):
        raise InputError(f"output: got {path}, expected a name that ends with {suffix}, by which it is known")
    if path.exists():
        raise InputError(f"output: {path} exists, expected a file that does not; choose another, or remove it")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"output: {path.parent} is no folder that can be written, expected one; choose another")


@contextmanager
def whole_file(path: Path, *, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """Yield a file that becomes `path` when the block ends, in place of one that is there, and vanishes if it raises.

    Args:
        path: the file to appear; its folder must exist.
        mode: its permissions.

    Raises:
        InputError: it cannot be written; the message says why, and what to do.
    """
    try:
        # A sibling, so that a rename is enough; hidden, so that nobody takes it for a result.
        descriptor, staged = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose a folder that you may write") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        Path(staged).replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); make room, or choose another folder"
        ) from error
    finally:
        Path(staged).unlink(missing_ok=True)
