"""Folders appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from detector.errors import InputError
from exporter.publishing import check_writable, locked, staged_folder


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "result"
    with staged_folder(target) as staged:
        (staged / "file").write_text("content")
        assert not target.exists()
    assert (target / "file").read_text() == "content"
    assert [path.name for path in target.parent.iterdir()] == ["result"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "result") as staged:  # noqa: PT012  the failure is the point
        (staged / "file").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "result"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(RuntimeError), staged_folder(target, replace=True):
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "result"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(InputError, match="exists and is not empty"), staged_folder(target):
        pass
    with staged_folder(target, replace=True) as staged:
        (staged / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "result").touch()
    with pytest.raises(InputError, match="result: is a file"), staged_folder(tmp_path / "result", replace=True):
        pass


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_leaves_no_half_written_folder(tmp_path: Path, stop: signal.Signals) -> None:
    code = (
        "import signal, sys, time; from pathlib import Path; from exporter.publishing import staged_folder\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in the background
        "with staged_folder(Path(sys.argv[1])) as staged:\n"
        "    (staged / 'file').touch(); print('writing', flush=True); time.sleep(60)"
    )
    target = tmp_path / "result"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    os.kill(process.pid, stop)
    process.wait()
    process.stdout.close()
    time.sleep(0.1)
    assert not target.exists()
    with staged_folder(target) as staged:
        (staged / "file").touch()
    assert [path.name for path in target.iterdir()] == ["file"]


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "result"
    with pytest.raises(InputError, match="appeared while"), staged_folder(target):  # noqa: PT012  two writers at once
        target.mkdir()
        (target / "other").touch()
    assert [path.name for path in target.iterdir()] == ["other"]
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


_REPLACES = """
import os, signal, sys
from pathlib import Path
from exporter import publishing

target, place, atomic = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "atomic"

def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

renames, rename = [], Path.rename

def counted(self, other):
    if place == f"rename {len(renames)}":
        killed()
    renames.append(other)
    return rename(self, other)

with publishing.locked(target):
    # From here on, for what is left by others is removed under the lock, too.
    Path.rename = counted
    if not atomic:
        publishing.ctypes.CDLL = lambda *_, **__: object()  # as on a system without renameat2
    if place == "written":
        publishing._publish = killed
    if place == "in place":
        publishing.shutil.rmtree = killed
    with publishing.staged_folder(target, replace=True) as staged:
        (staged / "new").touch()
"""


@pytest.mark.parametrize(
    ("place", "means", "there"),
    [
        ("written", "atomic", "old"),
        ("in place", "atomic", "new"),
        ("rename 1", "renames", "old"),
        ("rename 2", "renames", "old"),  # when nothing is in place at all
        ("rename 3", "renames", "new"),
        ("in place", "renames", "new"),
        ("nowhere", "renames", "new"),
    ],
)
def test_a_kill_while_a_folder_is_replaced_leaves_one_or_the_other(
    tmp_path: Path, place: str, means: str, there: str
) -> None:
    target = tmp_path / "re[1]sult"
    target.mkdir()
    (target / "old").touch()
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", _REPLACES, target, place, means], cwd=root, check=False)
    assert ended.returncode == (0 if place == "nowhere" else -signal.SIGKILL)
    with locked(target):
        assert [path.name for path in target.iterdir()] == [there]
        assert list(tmp_path.iterdir()) == [target]


def test_a_folder_whose_parent_is_not_there_yet_can_be_locked(tmp_path: Path) -> None:
    with locked(tmp_path / "deep" / "result"):
        assert list(tmp_path.iterdir()) == []


def refuse(code: int) -> Any:
    """Return a function that fails as the system does."""

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def publish(target: Path) -> None:
    """Replace `target` by a folder with one file."""
    with staged_folder(target, replace=True) as staged:
        (staged / "new").touch()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"deep: .*file cannot be written; choose a folder that you may write"):
        check_writable(tmp_path / "file" / "deep")
    monkeypatch.setattr("tempfile.mkdtemp", refuse(errno.EROFS))
    with pytest.raises(InputError, match=r"result: cannot be written \(Read-only file system\); choose a folder that"):
        publish(tmp_path / "result")


def test_a_mounted_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="/proc: is a mounted folder, which cannot be replaced in one step; choose a"):
        check_writable(Path("/proc"))
    monkeypatch.setattr(Path, "rename", refuse(errno.EBUSY))  # mounted meanwhile
    with pytest.raises(InputError, match=r"result: cannot be put in place \(Device or resource busy\); a mounted"):
        publish(tmp_path / "result")
    assert list(tmp_path.iterdir()) == []


class Libc:
    """A C library whose `renameat2` fails with one error."""

    def __init__(self, code: int) -> None:
        self._code = code

    def renameat2(self, *_: Any) -> int:
        ctypes.set_errno(self._code)
        return -1


@pytest.mark.parametrize("code", [errno.EBUSY, errno.ENOSYS])
def test_where_folders_cannot_be_exchanged_two_renames_do_or_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    target = tmp_path / "result"
    target.mkdir()
    (target / "old").touch()
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: Libc(code))
    if code == errno.ENOSYS:
        publish(target)
    else:
        with pytest.raises(InputError, match=r"result: cannot be replaced \(Device or resource busy\); a mounted"):
            publish(target)
    assert [path.name for path in target.iterdir()] == ["new" if code == errno.ENOSYS else "old"]
    assert list(tmp_path.iterdir()) == [target]


FULL = """
import sys
from pathlib import Path
import numpy as np
from detector.errors import InputError
from exporter.publishing import staged_folder
from samples.npz import write_npz
from samples.types import Samples

folder = Path(sys.argv[1])
images = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), dtype=np.uint8)
with staged_folder(folder / "out") as staged:
    (staged / "old").touch()
for write in (
    lambda staged: (staged / "new").write_bytes(bytes(500_000)),
    lambda staged: write_npz(staged / "new.npz", Samples(images, np.arange(64))),
    lambda staged: [(staged / str(number)).touch() for number in range(100)],
):
    try:
        with staged_folder(folder / "out", replace=True) as staged:
            write(staged)
    except InputError as error:
        print(error)
print(sorted(path.name for path in folder.rglob("*")))
"""


def test_a_full_disk_is_named_with_what_to_do_and_changes_nothing(tmp_path: Path) -> None:
    mounted = 'mount -t tmpfs -o size=200k,nr_inodes=50 tmpfs "$1" && exec "$2" -c "$3" "$1"'
    namespace = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
    if subprocess.run(
        [*namespace, mounted, "sh", str(tmp_path), "true", ""], capture_output=True, check=False
    ).returncode:
        pytest.skip("nothing can be mounted here, so there is no disk to fill")
    command = [*namespace, mounted, "sh", str(tmp_path), sys.executable, FULL]
    filled = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    lines = filled.stdout.splitlines()
    for line in lines[:3]:
        assert re.match(
            rf"{tmp_path}/out: the disk of {tmp_path} is full, after 0.[0-2] MB; what was there stays", line
        )
    assert (lines[3], filled.stderr) == ("['old', 'out']", "")


def test_a_quota_that_is_used_up_is_a_full_disk(tmp_path: Path) -> None:
    error = RuntimeError("library")
    error.__cause__ = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    with pytest.raises(InputError, match=r"is full, after 0\.0 MB"), staged_folder(tmp_path / "out"):
        raise error
    with pytest.raises(OSError, match="No space left"), staged_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # elsewhere: here there is room
