"""Asks a monitor, over HTTP."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from types import TracebackType
from typing import Any, TypeVar

import httpx

from client.connection import is_loopback
from detector.errors import (
    AccessDeniedError,
    InputError,
    RequestRejectedError,
    ServerError,
    ServerUnavailableError,
    StripwireError,
)

_TIMEOUT_SECONDS = 30.0
_Client = TypeVar("_Client", bound="MonitorClient")


class MonitorClient:
    """One monitor, for whoever knows its feedback token.

    Args:
        url: of the monitor, such as http://127.0.0.1:8003; https to another machine.
        token: the monitor's feedback token.

    Raises:
        InputError: the URL cannot be used, there is no token, or it would travel in plaintext to another machine.
    """

    absent = "is this a monitor of ours?"
    """What to ask whoever looks for something that is not there."""

    def __init__(self, url: str, token: str | None) -> None:
        try:
            address = httpx.URL(url)
        except httpx.InvalidURL:
            address = httpx.URL()
        if address.scheme not in ("http", "https") or not address.host:
            raise InputError(f"monitor: got {url!r}, expected a URL such as http://127.0.0.1:8003")
        if not token:
            raise InputError("feedback token: got none, expected the monitor's (STRIPWIRE_FEEDBACK_TOKEN)")
        if not re.fullmatch(r"[!-~]+", token):
            raise InputError("feedback token: expected printable ASCII characters without blanks")
        local = is_loopback(address.host)
        if address.scheme == "http" and not local:
            raise InputError(
                f"monitor: {url} is another machine and the connection is not encrypted, so anybody on the way could "
                "read token and images; use https, or forward the port to this machine"
            )
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {token}"}
        # A proxy that the environment names would be another machine.
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=_TIMEOUT_SECONDS, trust_env=not local)

    def __enter__(self: _Client) -> _Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def json(self, method: str, path: str, **given: Any) -> dict[str, Any]:
        """Return the JSON object that a request is answered with; raises as `ask` does."""
        answer = self.ask(method, path, **given)
        try:
            found: dict[str, Any] = answer.json()
        except ValueError as error:
            raise ServerError(f"monitor: {self.url} is no monitor of ours: it answers no JSON") from error
        return found

    def ask(self, method: str, path: str, *, fine: Collection[int] = (), **given: Any) -> httpx.Response:
        """Return the answer to a request.

        Args:
            method: of HTTP.
            path: on the monitor.
            fine: statuses that are no errors here.
            given: what else `httpx.Client.request` is given.

        Raises:
            InputError: the record says otherwise.
            ServerError: no usable answer; see the hierarchy in `detector.errors`.
        """
        try:
            answer = self._http.request(method, path, **given)
        except httpx.HTTPError as error:
            raise self._away(error) from error
        if not (answer.is_success or answer.status_code in fine):
            raise self._refusal(answer)
        return answer

    def lines(self, path: str) -> Iterator[str]:
        """Yield the lines of an answer as they come; an error where it breaks off. Raises as `ask` does."""
        try:
            with self._http.stream("GET", path) as answer:
                if not answer.is_success:
                    answer.read()
                    raise self._refusal(answer)
                yield from answer.iter_lines()
        except httpx.HTTPError as error:
            raise self._away(error) from error

    def _away(self, error: httpx.HTTPError) -> ServerUnavailableError:
        return ServerUnavailableError(
            f"monitor: {self.url} does not answer ({error}); is this where `stripwire monitor` listens?"
        )

    def _refusal(self, answer: httpx.Response) -> StripwireError:
        said = _error_in(answer)
        if answer.status_code in (401, 403):
            return AccessDeniedError(f"monitor: {said} (STRIPWIRE_FEEDBACK_TOKEN)")
        if answer.status_code == 404:
            return ServerError(f"monitor: {said}; {self.absent}")
        if answer.status_code == 409:
            return InputError(f"monitor: {said}")
        if answer.status_code == 422:
            return RequestRejectedError(f"monitor: {said}")
        return ServerError(f"monitor: {said}")


def _error_in(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return f"{answer.url.path} was answered with status {answer.status_code}"
