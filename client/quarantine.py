"""Asks a monitor about the inputs that were rejected, and tells it what they were."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from client.monitor_client import MonitorClient
from detector.errors import InputError, ServerError

_PAGE = 1000  # the most inputs that a monitor tells at once


@dataclass(frozen=True, eq=False)
class Evidence:
    """Inputs out of the quarantine.

    Attributes:
        images: (count, height, width, channels), uint8, pixel by pixel what came; no two are alike.
        labels: (count,), int64: what the repaired network answered.
        notes: what was left out.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    notes: tuple[str, ...]


class QuarantineClient(MonitorClient):
    """The quarantine behind one monitor; see `MonitorClient`."""

    absent = "was it started with --quarantine?"

    def listing(self, *, limit: int = 1000, labelled: bool = True) -> dict[str, Any]:
        """Return the newest inputs, and how many there are; see `client.monitor.quarantine.QuarantineView.listing`.

        Args:
            limit: the most inputs, 1..1000.
            labelled: also those of which somebody has said what they are.

        Raises:
            InputError, ServerError: no usable answer.
        """
        return self.json("GET", "/v1/quarantine", params={"limit": limit, "labelled": str(labelled).lower()})

    def marked(self, truth: str) -> list[dict[str, Any]]:
        """Return what is known of all inputs of which somebody has said that they were `clean`, or `trojaned`.

        Raises:
            InputError, ServerError: no usable answer.
        """
        found: list[dict[str, Any]] = []
        asked: dict[str, Any] = {"truth": truth, "limit": _PAGE}
        while True:
            page = self.json("GET", "/v1/quarantine", params=asked)["inputs"]
            found += page
            if len(page) < _PAGE:
                return found
            asked["before"] = page[-1]["key"]

    def named(self, request_id: str) -> list[dict[str, Any]]:
        """Return what is known of all inputs of a name; raises as `find` does."""
        return self._named(request_id, limit=_PAGE)

    def find(self, request_id: str) -> dict[str, Any]:
        """Return what is known of an input, the newest of that name.

        Raises:
            InputError: there is none of that name, or no more.
            ServerError: no usable answer.
        """
        return self._named(request_id, limit=1)[0]

    def picture(self, key: str) -> bytes:
        """Return the image of an input as PNG; raises as `listing` does."""
        return self.ask("GET", f"/v1/quarantine/{quote(key, safe='')}.png").content

    def image(self, key: str) -> NDArray[np.uint8] | None:
        """Return the image of an input, (height, width, channels), uint8; None where it is there no more.

        Raises:
            InputError, ServerError: no usable answer.
        """
        answer = self.ask("GET", f"/v1/quarantine/{quote(key, safe='')}.npy", fine=(404,))
        if answer.status_code == 404:
            return None
        try:
            image: NDArray[np.uint8] = np.load(io.BytesIO(answer.content), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ServerError(f"monitor: {self.url} gives no image of {key} ({error})") from error
        if image.dtype != np.uint8 or image.ndim != 3:
            raise ServerError(
                f"monitor: {self.url} gives {image.dtype} of shape {image.shape} as the image of {key}, expected "
                "uint8 of shape (height, width, channels)"
            )
        return image

    def evidence(
        self, truth: str, request_ids: Sequence[str] = (), on_progress: Callable[[int, int], None] | None = None
    ) -> Evidence:
        """Return the inputs that people have marked, in the order in which they came.

        Args:
            truth: what they were, `clean` or `trojaned`.
            request_ids: names of inputs, of which nobody need have said what they were; none for all that are marked.
            on_progress: called with (images fetched, images in all).

        Raises:
            InputError: there are none, one of a name is marked otherwise, or they have several shapes.
            ServerError: no usable answer.
        """
        abouts = self._to_collect(truth, request_ids)
        images: dict[bytes, NDArray[np.uint8]] = {}
        labels, gone, first = [], 0, ""
        for done, about in enumerate(abouts, start=1):
            image = self.image(about["key"])
            if on_progress is not None:
                on_progress(done, len(abouts))
            if image is None:
                gone += 1
                continue
            first = first or about["request_id"]
            shape = next(iter(images.values()), image).shape
            if image.shape != shape:
                raise InputError(
                    f"images: {about['request_id']} has shape {image.shape} and {first} {shape}, expected one shape, "
                    "which a network takes; name inputs of one"
                )
            digest = hashlib.sha256(image.tobytes()).digest()
            if digest not in images:
                images[digest] = image
                labels.append(about["label"])
        if not images:
            raise InputError("request id: the inputs went while they were fetched, expected some that are kept")
        notes = [f"{gone} of {len(abouts)} inputs went while they were fetched: the oldest go"] if gone else []
        if copies := len(abouts) - gone - len(images):
            notes.append(f"{copies} of {len(abouts)} inputs are left out: copies of others, pixel by pixel")
        return Evidence(np.stack([*images.values()]), np.array(labels, np.int64), tuple(notes))

    def _to_collect(self, truth: str, request_ids: Sequence[str]) -> list[dict[str, Any]]:
        """Return what is known of the inputs of these names, or of all that are marked, the oldest first."""
        found = [about for name in request_ids for about in self.named(name)] if request_ids else self.marked(truth)
        for about in found:
            if about["truth"] not in (None, truth):
                raise InputError(
                    f"request id: {about['request_id']} is marked {about['truth']}, expected {truth}; leave it out, or "
                    f"give --truth {about['truth']}"
                )
        if not found:
            raise InputError(
                f"truth: no input in the quarantine is marked {truth}, expected some; mark them on the page or by "
                f"`stripwire quarantine label {truth}`, or name inputs"
            )
        by_key = {about["key"]: about for about in found}
        return [by_key[key] for key in sorted(by_key)]

    def label(self, key: str, truth: str) -> bool:
        """Record what the input of a key was, `clean` or `trojaned`; return whether that is new.

        Raises:
            InputError: the record says otherwise, and stays as it is.
            ServerError: it was not recorded.
        """
        feedback = {"request_id": key, "truth": truth, "verdict": "rejected"}
        return self.ask("POST", "/v1/feedback", json=feedback).status_code == 201

    def remove(self, *request_ids: str) -> int:
        """Remove the inputs of all these names for good; return how many there were. What was recorded of them stays.

        Raises:
            InputError: there is none of one of the names, or no more; then nothing is removed.
            ServerError: no usable answer, or the monitor may not write the folder.
        """
        keys = {about["key"] for request_id in request_ids for about in self.named(request_id)}
        for key in keys:
            # Where it has gone meanwhile, what was wanted holds.
            self.ask("DELETE", f"/v1/quarantine/{quote(key, safe='')}", fine=(404,))
        return len(keys)

    def _named(self, request_id: str, limit: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.json(
            "GET", "/v1/quarantine", params={"request_id": request_id, "limit": limit}
        )["inputs"]
        if not found:
            raise InputError(
                f"request id: {request_id!r} is not in the quarantine, or no more: the oldest inputs go. `stripwire "
                "quarantine list --all` shows those that are"
            )
        return found
