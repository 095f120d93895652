"""Rejected inputs, kept in a bounded folder for people to look at.

`strip_verdict` writes it: each input a file of its own that appears whole, the oldest go first. No request waits for
the disk, and none fails by it: what cannot be kept is dropped, and counted. The monitor reads it, see `client.monitor`.
"""

from __future__ import annotations

import io
import json
import os
import queue
import re
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.errors import DataError, SetupError

FOLDER_VARIABLE = "STRIPWIRE_QUARANTINE"
"""Of the server's environment: the folder; without it, nothing is kept."""

INPUTS_VARIABLE, BYTES_VARIABLE = "STRIPWIRE_QUARANTINE_INPUTS", "STRIPWIRE_QUARANTINE_BYTES"
"""Likewise: how many inputs there may be, and how many bytes they may take."""

DEFAULT_INPUTS, DEFAULT_BYTES = 1000, 2**28

DROPPED = ("busy", "too_large", "failed")
"""Why an input was not kept: others were waiting to be written, it is over the bound by itself, or the disk failed."""

REQUEST_ID = r"[A-Za-z0-9_.:-]{1,110}"
"""What the name of an input may be, `<request id>.<row>`: it is part of a file's name."""

_FILE = re.compile(rf"(?P<nanoseconds>\d{{20}})-(?P<request_id>{REQUEST_ID})\.npz")
_PARTIAL_PREFIX = ".partial-"
_WAITING = 64  # images, in memory


@dataclass(frozen=True, eq=False)
class Rejected:
    """An input that was rejected.

    Attributes:
        request_id: its name, `<id of its request>.<row>`, by which feedback names it; see `client.api.Verdict`.
        image: (height, width, channels), uint8.
        label: of the repaired network.
        entropy_bits: STRIP's mean entropy.
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


class Quarantine:
    """Keeps rejected inputs within both bounds.

    Several may share a folder, as two versions do while one replaces the other.

    Args:
        folder: where they are kept; made if there is none.
        most_inputs: how many there may be.
        most_bytes: how many bytes their files may have.

    Raises:
        SetupError: the folder cannot be written.
    """

    def __init__(self, folder: Path, most_inputs: int = DEFAULT_INPUTS, most_bytes: int = DEFAULT_BYTES) -> None:
        self._folder = folder
        self._most_inputs, self._most_bytes = most_inputs, most_bytes
        self.kept = self.removed = 0
        self.dropped = dict.fromkeys(DROPPED, 0)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for left in folder.glob(f"{_PARTIAL_PREFIX}*"):  # by a process that was killed
                left.unlink(missing_ok=True)
            self._make_room(0)
            tempfile.TemporaryFile(dir=folder).close()
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
        bounds = []
        for name, default in ((INPUTS_VARIABLE, DEFAULT_INPUTS), (BYTES_VARIABLE, DEFAULT_BYTES)):
            asked = environment.get(name) or str(default)
            if not re.fullmatch(r"[1-9]\d{0,17}", asked):
                raise SetupError(f"{name}: got {asked!r}, expected a whole number of at least 1")
            bounds.append(int(asked))
        return cls(Path(folder), *bounds)

    def offer(self, rejected: Rejected) -> None:
        """Hand in an input; returns at once, also where it cannot be kept."""
        try:
            self._waiting.put_nowait(rejected)
        except queue.Full:
            self.dropped["busy"] += 1

    def close(self) -> None:
        """Write what is waiting, and end."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (rejected := self._waiting.get()) is not None:
            self._keep(rejected)

    def _keep(self, rejected: Rejected) -> None:
        content = _written(rejected)
        if len(content) > self._most_bytes:
            self.dropped["too_large"] += 1
            return
        try:
            self._write(f"{time.time_ns():020d}-{rejected.request_id}.npz", content)
        except OSError as error:
            self.dropped["failed"] += 1
            print(f"stripwire: a rejected input was not kept: {error}", file=sys.stderr)
        else:
            self.kept += 1

    def _write(self, name: str, content: bytes) -> None:
        self._make_room(len(content))
        descriptor, partial = tempfile.mkstemp(prefix=_PARTIAL_PREFIX, dir=self._folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            Path(partial).rename(self._folder / name)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise

    def _make_room(self, needed: int) -> None:
        """Remove the oldest inputs until one more, of so many bytes, is within the bounds; with 0, until all are."""
        files = sorted(_files(self._folder), key=lambda file: file.name)
        sizes = [_size(file) for file in files]
        count, total = len(files) + bool(needed), sum(sizes) + needed
        for file, size in zip(files, sizes, strict=True):
            if count <= self._most_inputs and total <= self._most_bytes:
                return
            file.unlink(missing_ok=True)
            self.removed += 1
            count, total = count - 1, total - size


def quarantined(folder: Path) -> list[str]:
    """Return the keys of the inputs in a quarantine, the newest first; each is part of a file's name.

    Raises:
        OSError: the folder cannot be read.
    """
    return sorted((file.stem for file in _files(folder)), reverse=True)


def request_id_of(key: str) -> str:
    """Return the name of the input that has this key."""
    return key.partition("-")[2]


def read_rejected(folder: Path, key: str) -> Rejected | None:
    """Return an input in a quarantine; None where it is there no more, since the oldest go.

    Raises:
        DataError: its file is damaged, or none of ours.
    """
    path = folder / f"{key}.npz"
    if _FILE.fullmatch(path.name) is None:
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            image, about = stored["image"], json.loads(stored["about"].item())
        found = Rejected(request_id=request_id_of(key), image=image, **about | {"scores": tuple(about["scores"])})
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: is no rejected input of ours ({error}); remove it") from error
    if image.dtype != np.uint8 or image.ndim != 3:
        raise DataError(f"{path}: the image is {image.dtype} of shape {image.shape}, expected uint8 of three axes")
    return found


def _written(rejected: Rejected) -> bytes:
    about = {name: value for name, value in vars(rejected).items() if name not in ("request_id", "image")}
    content = io.BytesIO()
    np.savez(content, image=rejected.image, about=np.array(json.dumps(about)))
    return content.getvalue()


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in folder.iterdir() if _FILE.fullmatch(file.name))


def _size(file: Path) -> int:
    with suppress(FileNotFoundError):  # another one has removed it
        return file.stat().st_size
    return 0


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
            ("removed", "Rejected inputs that went, being the oldest, to make room", [{}]),
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
