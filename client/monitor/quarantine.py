"""The quarantine, as the monitor shows it: a page for people, and what is behind it as JSON and PNG."""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from client.monitor.access import Access, answer
from client.monitor.logs import log
from client.monitor.record import TRUTHS, FeedbackRecord
from detector.errors import DataError, RecordError
from detector.quarantine import quarantined, read_about, read_rejected, remove, request_id_of

_T = TypeVar("_T")

UNLABELLED = "unlabelled"
MOST_LISTED = 1000

_PAGE = resources.files("client.monitor") / "page"
_TYPES = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_HEADERS = {
    # Whatever might get into the page, nothing of it runs, and nothing leaves.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class QuarantineView:
    """Shows rejected inputs, and what people found out about them.

    What is known of an input goes by its key, which no other has. Callers choose the ids of their requests: were it to
    go by those, an input could be passed off as one that somebody has called clean.

    Args:
        folder: where `strip_verdict` keeps them, see `detector.quarantine`; there may be none yet.
        record: what is known of them.
    """

    def __init__(self, folder: Path, record: FeedbackRecord) -> None:
        self._folder = folder
        self._record = record

    def truths(self) -> dict[str, str | None]:
        """Return what each input really was, by its key, the newest first; None where nobody has said.

        Raises:
            RecordError: the record, or the folder, cannot be read.
        """
        try:
            keys = quarantined(self._folder)
        except FileNotFoundError:  # the server makes it when it starts
            return {}
        except OSError as error:
            raise RecordError(
                f"quarantine: {self._folder} cannot be read ({error.strerror}), expected a folder of the monitor's user"
            ) from error
        found = ((key, self._record.get(key)) for key in keys)
        return {key: None if feedback is None else feedback.truth for key, feedback in found}

    def listing(
        self,
        limit: int,
        labelled: bool,
        request_id: str | None = None,
        truth: str | None = None,
        before: str | None = None,
    ) -> dict[str, Any]:
        """Return the newest inputs, and how many there are.

        Args:
            limit: the most inputs.
            labelled: also those of which somebody has said what they are.
            request_id: those of this name alone; None for all.
            truth: those alone of which somebody has said this, one of `TRUTHS`; None for all.
            before: those alone that are older than the input of this key; None for all.

        Raises:
            RecordError: the record, or the folder, cannot be read.
        """
        truths = self.truths()
        inputs: list[dict[str, Any]] = []
        for key, said in truths.items():
            if len(inputs) == limit:
                break
            wanted = (
                (labelled or said is None)
                and request_id in (None, request_id_of(key))
                and truth in (None, said)
                and (before is None or key < before)
            )
            if wanted and (about := self._read(read_about, key)) is not None:
                bits = about.pop("entropy_bits")
                told = bits if math.isfinite(bits) else None  # JSON knows no other
                inputs.append({"key": key, "truth": said, "entropy_bits": told, **about})
        unlabelled = sum(said is None for said in truths.values())
        return {"kept": len(truths), "unlabelled": unlabelled, "inputs": inputs}

    def _read(self, read: Callable[[Path, str], _T | None], key: str) -> _T | None:
        """Return what is read of an input; None where it is there no more, or cannot be read, which is logged."""
        try:
            return read(self._folder, key)
        except (DataError, OSError) as error:
            log(logging.WARNING, "a rejected input cannot be read", key=key, why=str(error))
            return None

    def picture(self, key: str) -> bytes | None:
        """Return the image of an input as PNG, pixel by pixel; None where it is there no more.

        Of two channels, or more than four, the first is shown as grey.
        """
        rejected = self._read(read_rejected, key)
        if rejected is None:
            return None
        image = rejected.image
        file = io.BytesIO()
        Image.fromarray(image if image.shape[2] in (3, 4) else image[:, :, 0]).save(file, "PNG")
        return file.getvalue()

    def array(self, key: str) -> bytes | None:
        """Return the image of an input as `.npy`, (height, width, channels), uint8; None where it is there no more."""
        rejected = self._read(read_rejected, key)
        if rejected is None:
            return None
        file = io.BytesIO()
        np.save(file, rejected.image, allow_pickle=False)
        return file.getvalue()

    def remove(self, key: str) -> bool:
        """Remove an input for good; return whether it was there. What people said of it stays in the record.

        Raises:
            RecordError: it cannot be removed.
        """
        try:
            was_there = remove(self._folder, key)
        except OSError as error:
            raise RecordError(
                f"quarantine: {key} in {self._folder} cannot be removed ({error.strerror}), expected a folder that the "
                "monitor may write"
            ) from error
        if was_there:
            log(logging.INFO, "a rejected input was removed", key=key)
        return was_there


class QuarantineCollector(Collector):
    """Counts the inputs in the quarantine whenever it is asked."""

    def __init__(self, view: QuarantineView) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        """Yield `stripwire_quarantine_inputs`; nothing where they cannot be read."""
        counts = dict.fromkeys((UNLABELLED, *TRUTHS), 0)
        try:
            for truth in self._view.truths().values():
                counts[truth or UNLABELLED] += 1
        except RecordError as error:
            log(logging.WARNING, "the quarantine cannot be counted", why=str(error))
            return
        family = GaugeMetricFamily(
            "stripwire_quarantine_inputs", "Rejected inputs in the quarantine, by what they were.", labels=("truth",)
        )
        for name, count in counts.items():
            family.add_metric((name,), count)
        yield family


class QuarantineRoutes:
    """Answers requests about the quarantine.

    Args:
        view: what is shown.
        access: who may see it.
    """

    def __init__(self, view: QuarantineView, access: Access) -> None:
        self._view = view
        self._access = access
        self.routes = [
            Route("/quarantine", self._show_page),
            Route("/quarantine/{name}", self._show_page),
            Route("/v1/quarantine", self._list),
            Route("/v1/quarantine/{key}.png", self._show_image),
            Route("/v1/quarantine/{key}.npy", self._give_array),
            Route("/v1/quarantine/{key}", self._remove, methods=["DELETE"]),
        ]

    async def _show_page(self, request: Request) -> Response:
        name = request.path_params.get("name", "page.html")
        if name not in _TYPES:
            return answer(404, error=f"got {name!r}, expected one of {', '.join(_TYPES)}")
        return Response((_PAGE / name).read_bytes(), media_type=_TYPES[name], headers=_HEADERS)

    async def _list(self, request: Request) -> Response:
        if (refusal := self._access.refusal(request)) is not None:
            return refusal
        limit, labelled = (request.query_params.get(name, "")[:20] for name in ("limit", "labelled"))
        if limit and not (re.fullmatch(r"[0-9]{1,4}", limit) and 1 <= int(limit) <= MOST_LISTED):
            return answer(422, error=f"limit: got {limit!r}, expected 1 to {MOST_LISTED}")
        if labelled not in ("true", "false", ""):
            return answer(422, error=f"labelled: got {labelled!r}, expected true or false")
        request_id, truth, before = (request.query_params.get(name) for name in ("request_id", "truth", "before"))
        if truth not in (None, *TRUTHS):
            return answer(422, error=f"truth: got {truth[:20]!r}, expected one of {', '.join(TRUTHS)}")
        asked = int(limit or MOST_LISTED), labelled != "false", request_id, truth, before
        try:
            found = await run_in_threadpool(self._view.listing, *asked)
        except RecordError as error:
            log(logging.ERROR, "the quarantine could not be read", why=str(error))
            return answer(503, error=str(error))
        return answer(200, **found)

    async def _show_image(self, request: Request) -> Response:
        return await self._content(request, self._view.picture, "image/png")

    async def _give_array(self, request: Request) -> Response:
        return await self._content(request, self._view.array, "application/octet-stream")

    async def _content(self, request: Request, read: Callable[[str], bytes | None], media_type: str) -> Response:
        if (refusal := self._access.refusal(request)) is not None:
            return refusal
        key = request.path_params["key"]
        content = await run_in_threadpool(read, key)
        if content is None:
            return _absent(key)
        return Response(content, media_type=media_type, headers=_HEADERS)

    async def _remove(self, request: Request) -> Response:
        if (refusal := self._access.refusal(request)) is not None:
            return refusal
        key = request.path_params["key"]
        try:
            was_there = await run_in_threadpool(self._view.remove, key)
        except RecordError as error:
            log(logging.ERROR, "a rejected input could not be removed", why=str(error))
            return answer(503, error=str(error))
        return Response(status_code=204) if was_there else _absent(key)


def _absent(key: str) -> Response:
    return answer(404, error=f"key: there is no input {key!r}, or no more: the oldest go")
