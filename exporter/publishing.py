"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from detector.errors import InputError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NEARLY_NOTHING_BYTES = 1 << 20


@contextlib.contextmanager
def staged_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends, and vanishes if it raises.

    Args:
        target: the folder to appear; its parents are made.
        replace: let `target` exist, and be replaced in one step.

    Raises:
        InputError: `target` exists (without `replace`), is no folder, or cannot be written; also where its disk is full
            before the block ends, whichever error that raises.
    """
    target = target.resolve()
    if replace:
        check_writable(target)
    else:
        check_new(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A sibling, so that a rename is enough; hidden, so that nobody takes it for a result.
        staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written ({error.strerror}); choose a folder that you may write"
        ) from error
    try:
        staged.chmod(0o755)
        yield staged
        _publish(staged, target, replace)
    except Exception as error:
        if _wants_room(error, target.parent):
            raise InputError(_no_room(staged, target)) from error
        raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def check_writable(target: Path) -> None:
    """Raise InputError, before long work, where `staged_folder` could not put `target` in place."""
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: is a file, expected a folder that Stripwire may write")
    if os.path.ismount(target):
        raise InputError(
            f"{target}: is a mounted folder, which cannot be replaced in one step; choose a folder inside it"
        )
    parent = next(folder for folder in target.parents if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise InputError(f"{target}: {parent} cannot be written; choose a folder that you may write")


def check_new(target: Path) -> None:
    """Raise InputError, before long work, where `staged_folder` could not make `target` as a new folder."""
    target = target.resolve()
    check_writable(target)
    if target.exists() and any(target.iterdir()):
        raise InputError(f"{target}: exists and is not empty, expected a new folder; choose another or remove it")


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Let only one process at a time change `target`, or tell a server of it; others wait.

    What a killed process left is put right first: `target` comes back if it was just being replaced, and nothing
    half-written stays beside it.
    """
    target = target.resolve()
    descriptor = os.open(next(folder for folder in target.parents if folder.exists()), os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        aside = _aside(target)
        if aside.exists() and not target.exists():
            aside.rename(target)
        for left in (aside, *target.parent.glob(f".{glob.escape(target.name)}.partial-*")):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)


def _wants_room(error: BaseException | None, folder: Path) -> bool:
    """Return whether a full disk, the one of that folder, is behind an error; libraries keep of it what they like."""
    while error is not None:
        if getattr(error, "errno", None) == errno.EDQUOT:
            return True
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            disk = os.statvfs(folder)
            return disk.f_bavail * disk.f_frsize < _NEARLY_NOTHING_BYTES or disk.f_favail == 0 < disk.f_files
        error = error.__cause__ or error.__context__
    return False


def _no_room(staged: Path, target: Path) -> str:
    megabytes = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file()) / 1e6
    return (
        f"{target}: the disk of {target.parent} is full, after {megabytes:.1f} MB; what was there stays as it was. "
        "Make room for the whole folder once more, or choose one on another disk"
    )


def _publish(staged: Path, target: Path, replace: bool) -> None:
    """Move `staged` to `target` in one step; what was there lies at `staged` afterwards."""
    for path in staged.rglob("*"):
        _flush(path)
    _flush(staged)
    try:
        staged.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise InputError(
                f"{target}: cannot be put in place ({error.strerror}); a mounted folder cannot be replaced, "
                "choose a folder inside it"
            ) from error
        if not replace:
            raise InputError(f"{target}: appeared while its content was made; nothing was written there") from error
        _exchange(staged, target)
    _flush(target.parent)


def _exchange(first: Path, second: Path) -> None:
    """Swap two folders atomically, Linux `renameat2(RENAME_EXCHANGE)`; in two renames where that is not to be had."""
    with contextlib.suppress(AttributeError):
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
            return
        if ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL):
            code = ctypes.get_errno()
            raise InputError(
                f"{second}: cannot be replaced ({os.strerror(code)}); a mounted folder cannot be, choose a folder "
                "inside it"
            )
    aside = _aside(second)  # from where `locked` brings it back, should we be killed before the next line is through
    second.rename(aside)
    first.rename(second)
    aside.rename(first)


def _aside(target: Path) -> Path:
    """Return where `target` lies while it is replaced in two renames."""
    return target.with_name(f".{target.name}.old")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
