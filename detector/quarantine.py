"""Rejected inputs, kept in a bounded folder for people to look at.

`strip_verdict` writes it: each input a file of its own that appears whole, the oldest go first. No request waits for
the disk, and none fails by it: what cannot be kept is dropped, and counted. The monitor reads it, see `client.monitor`.
"""

from __future__ import annotations

import io
import json
import math
import os
import queue
import re
import sys
import tempfile
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from detector.errors import DataError, SetupError

_T = TypeVar("_T")

FOLDER_VARIABLE = "STRIPWIRE_QUARANTINE"
"""Of the server's environment: the folder; without it, nothing is kept."""

INPUTS_VARIABLE, BYTES_VARIABLE = "STRIPWIRE_QUARANTINE_INPUTS", "STRIPWIRE_QUARANTINE_BYTES"
"""Likewise: how many inputs there may be, and how many bytes they may take."""

DAYS_VARIABLE = "STRIPWIRE_QUARANTINE_DAYS"
"""Likewise: how many days an input is kept; without it, until others need its room."""

DEFAULT_INPUTS, DEFAULT_BYTES = 1000, 2**28

DROPPED = ("busy", "too_large", "failed")
"""Why an input was not kept: others were waiting to be written, it is over the bound by itself, or the disk failed."""

REQUEST_ID = r"[A-Za-z0-9_.:-]{1,107}"
"""What the name of an input may be, `<request id>.<row>`: it is part of a file's name, and of what feedback names."""

_FILE = re.compile(rf"(?P<nanoseconds>\d{{20}})-(?P<request_id>{REQUEST_ID})\.npz")
_PARTIAL_PREFIX = ".partial-"
_ABANDONED_SECONDS = 60.0  # after so long, nobody writes a file any more
_LISTED_SECONDS = 5.0  # how long what is known of the folder is taken to be true
_AGED_SECONDS = 60.0  # after so long without a rejected input, those that are too old are looked for
_CLOSE_SECONDS = 10.0
_DAY_NANOSECONDS = 24 * 3600 * 10**9
_WAITING = 64  # images, in memory


@dataclass(frozen=True, eq=False)
class Rejected:
    """An input that was rejected.

    Attributes:
        request_id: its name, `<id of its request>.<row>`, by which feedback names it; see `client.api.Verdict`.
        image: (height, width, channels), uint8.
        label: of the repaired network.
        entropy_bits: STRIP's mean entropy; not a number where a network's answer was none.
        p_value: how often a clean input looks at least as suspicious, 0..1.
        scores: which were at or beyond their thresholds, of `detector.scores.SCORES`.
        version: of the model repository that rejected it.
        rejected_at: seconds since 1970 (UTC).
    """

    request_id: str
    image: NDArray[np.uint8]
    label: int
    entropy_bits: float
    p_value: float
    scores: tuple[str, ...]
    version: str
    rejected_at: float


_FIELDS = {field.name for field in fields(Rejected)} - {"request_id", "image"}


class Quarantine:
    """Keeps rejected inputs within both bounds.

    Several may share a folder, as two versions do while one replaces the other; they learn of each other's files every
    five seconds.

    Args:
        folder: where they are kept; made if there is none.
        most_inputs: how many there may be.
        most_bytes: how many bytes their files may have.
        most_days: how many days one is kept; None for as long as there is room.

    Raises:
        SetupError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        most_inputs: int = DEFAULT_INPUTS,
        most_bytes: int = DEFAULT_BYTES,
        most_days: float | None = None,
    ) -> None:
        self._folder = folder
        self._most_inputs, self._most_bytes, self._most_days = most_inputs, most_bytes, most_days
        self.kept = self.removed = 0
        self.dropped = dict.fromkeys(DROPPED, 0)
        try:
            prepare(folder)
            for left in folder.glob(f"{_PARTIAL_PREFIX}*"):  # by a process that was killed
                if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                    left.unlink(missing_ok=True)
            self._listed_at = -math.inf
            self._known: deque[tuple[str, int]] = deque()
            self._make_room(0)
        except OSError as error:
            raise SetupError(
                f"{FOLDER_VARIABLE}: {folder} cannot be written ({error.strerror or error}), expected a folder that "
                "the server may write, or no such variable"
            ) from error
        self._waiting: queue.Queue[Rejected | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="stripwire-quarantine", daemon=True)
        self._thread.start()

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Quarantine | None:
        """Return the quarantine that the environment asks for; None where it asks for none.

        Raises:
            SetupError: it cannot be had as asked.
        """
        if not (folder := environment.get(FOLDER_VARIABLE)):
            return None
        bounds = {"most_inputs": INPUTS_VARIABLE, "most_bytes": BYTES_VARIABLE, "most_days": DAYS_VARIABLE}
        given = {argument: (name, environment[name]) for argument, name in bounds.items() if environment.get(name)}
        for name, asked in given.values():
            if not re.fullmatch(r"[1-9]\d{0,17}", asked):
                raise SetupError(f"{name}: got {asked!r}, expected a whole number of at least 1")
        return cls(Path(folder), **{argument: int(asked) for argument, (_, asked) in given.items()})

    def offer(self, rejected: Rejected) -> None:
        """Hand in an input; returns at once, also where it cannot be kept."""
        try:
            self._waiting.put_nowait(rejected)
        except queue.Full:
            self.dropped["busy"] += 1

    def close(self) -> None:
        """Write what is waiting, and end; a disk that hangs is not waited for."""
        with suppress(queue.Full):
            self._waiting.put(None, timeout=_CLOSE_SECONDS)
            self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while True:
            try:
                rejected = self._waiting.get(timeout=None if self._most_days is None else _AGED_SECONDS)
            except queue.Empty:
                self._remove_aged()
                continue
            if rejected is None:
                return
            self._keep(rejected)

    def _keep(self, rejected: Rejected) -> None:
        try:
            content = _written(rejected)
            if len(content) > self._most_bytes:
                self.dropped["too_large"] += 1
                return
            self._write(rejected.request_id, content)
        except Exception as error:  # noqa: BLE001  whatever it is, the next one may do, and serving goes on
            self._listed_at = -math.inf
            self.dropped["failed"] += 1
            print(f"stripwire: a rejected input was not kept: {error!r}", file=sys.stderr)
        else:
            self.kept += 1

    def _remove_aged(self) -> None:
        try:
            self._make_room(0)
        except Exception as error:  # noqa: BLE001  whatever it is, later it may do, and serving goes on
            self._listed_at = -math.inf
            print(f"stripwire: rejected inputs that are too old were not removed: {error!r}", file=sys.stderr)

    def _write(self, request_id: str, content: bytes) -> None:
        self._make_room(len(content))
        # A clock that was set back does not make the newest the oldest.
        newest = int(self._known[-1][0].partition("-")[0]) if self._known else 0
        name = f"{max(time.time_ns(), newest + 1):020d}-{request_id}.npz"
        descriptor, partial = tempfile.mkstemp(prefix=_PARTIAL_PREFIX, dir=self._folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            Path(partial).rename(self._folder / name)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
        self._known.append((name, len(content)))

    def _make_room(self, needed: int) -> None:
        """Remove the oldest inputs until one more, of so many bytes, is within the bounds; with 0, until all are.

        Inputs that are too old go in any case.
        """
        if time.monotonic() - self._listed_at > _LISTED_SECONDS:
            self._known = deque(sorted(_files(self._folder)))
            self._listed_at = time.monotonic()
        total = sum(size for _, size in self._known) + needed
        aged = 0 if self._most_days is None else time.time_ns() - int(self._most_days * _DAY_NANOSECONDS)
        while self._known:
            name, size = self._known[0]
            fits = len(self._known) + bool(needed) <= self._most_inputs and total <= self._most_bytes
            if fits and int(name.partition("-")[0]) >= aged:
                return
            (self._folder / name).unlink(missing_ok=True)
            self._known.popleft()
            self.removed += 1
            total -= size


def prepare(folder: Path) -> None:
    """Make the folder of a quarantine, if there is none.

    Raises:
        OSError: it cannot be made or written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def quarantined(folder: Path) -> list[str]:
    """Return the keys of the inputs in a quarantine, the newest first; each is part of a file's name.

    Raises:
        OSError: the folder cannot be read.
    """
    return sorted((name.removesuffix(".npz") for name, _ in _files(folder)), reverse=True)


def request_id_of(key: str) -> str:
    """Return the name of the input that has this key."""
    return key.partition("-")[2]


def read_about(folder: Path, key: str) -> dict[str, Any] | None:
    """Return what is known of an input, the fields of `Rejected` but for its image; None where it is there no more.

    Raises:
        DataError: its file is damaged, or none of ours.
        OSError: it cannot be read.
    """
    return _read(folder, key, lambda stored: _about(stored, key))


def read_rejected(folder: Path, key: str) -> Rejected | None:
    """Return an input; None where it is there no more, since the oldest go; raises as `read_about` does."""
    return _read(folder, key, lambda stored: Rejected(image=_image(stored), **_about(stored, key)))


def remove(folder: Path, key: str) -> bool:
    """Remove an input for good; return whether it was there.

    Raises:
        OSError: it cannot be removed.
    """
    name = f"{key}.npz"
    if _FILE.fullmatch(name) is None:
        return False
    try:
        (folder / name).unlink()
    except FileNotFoundError:
        return False
    return True


def _read(folder: Path, key: str, read: Callable[[Any], _T]) -> _T | None:
    name = f"{key}.npz"
    if _FILE.fullmatch(name) is None:
        return None
    try:
        with (folder / name).open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return read(stored)
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{folder / name}: is no rejected input of ours ({error}); remove it") from error


def _about(stored: Any, key: str) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(stored["about"].item())
    if about.keys() != _FIELDS:
        raise ValueError(f"it tells {sorted(about)}, expected {sorted(_FIELDS)}")
    return {"request_id": request_id_of(key), **about, "scores": tuple(about["scores"])}


def _image(stored: Any) -> NDArray[np.uint8]:
    image: NDArray[np.uint8] = stored["image"]
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError(f"the image is {image.dtype} of shape {image.shape}, expected uint8 of three axes")
    return image


def _written(rejected: Rejected) -> bytes:
    about = {name: getattr(rejected, name) for name in _FIELDS}
    content = io.BytesIO()
    np.savez(content, image=rejected.image, about=np.array(json.dumps(about)))
    return content.getvalue()


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield name and size of each input's file."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if _FILE.fullmatch(entry.name):
                with suppress(FileNotFoundError):  # another one has removed it
                    yield entry.name, entry.stat().st_size


class QuarantineMetrics:
    """Tells Triton what became of rejected inputs.

    Args:
        pb_utils: Triton's `triton_python_backend_utils`.
        quarantine: what is counted.
    """

    def __init__(self, pb_utils: Any, quarantine: Quarantine) -> None:
        self._quarantine = quarantine
        family = pb_utils.MetricFamily
        self._families: list[Any] = []  # a metric ends with its family
        self._metrics: list[Any] = []
        for name, description, labels in (
            ("kept", "Rejected inputs that were kept", [{}]),
            ("removed", "Rejected inputs that went to make room, being the oldest, or for their age", [{}]),
            ("dropped", "Rejected inputs that were not kept, by why", [{"reason": reason} for reason in DROPPED]),
        ):
            made = family(name=f"stripwire_quarantine_{name}_total", description=description, kind=family.COUNTER)
            self._families.append(made)
            self._metrics += [made.Metric(labels=each) for each in labels]
        self._told = [0] * len(self._metrics)

    def tell(self) -> None:
        """Hand over what was counted since."""
        counts = [self._quarantine.kept, self._quarantine.removed, *self._quarantine.dropped.values()]
        for index, count in enumerate(counts):
            if more := count - self._told[index]:
                self._metrics[index].increment(float(more))
                self._told[index] = count
