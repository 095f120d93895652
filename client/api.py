"""Ask a running Stripwire server for labels and verdicts, over gRPC.

    with GuardedClient("127.0.0.1:8001") as client:
        for verdict in client.classify(images):
            ...

    async with AsyncGuardedClient("127.0.0.1:8001") as client:
        for verdict in await client.classify(images):
            ...

Importing this module loads neither TensorFlow nor SciPy.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_aio
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from tritonclient.utils import InferenceServerException

from client.connection import TlsOptions, triton_options
from client.core import ClientCore, ClientOptions, OnProgress, Steps, Transport
from client.messages import ModelMetadata, Verdict, Verdicts
from client.statuses import ERROR_OF_STATUS
from detector.errors import InputError
from detector.serving import SENTINEL

__all__ = [
    "ERROR_OF_STATUS",
    "AsyncGuardedClient",
    "GuardedClient",
    "ModelMetadata",
    "OnProgress",
    "TlsOptions",
    "Verdict",
    "Verdicts",
]

_T = TypeVar("_T")
_TransportT = TypeVar("_TransportT", bound=Transport)


class _Client(Generic[_TransportT]):
    """What both clients are made of; `GuardedClient` describes the options."""

    _transport_type: type[_TransportT]

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        *,
        model: str = "guarded",
        sentinel: str = SENTINEL,
        timeout_seconds: float = 30.0,
        retries: int = 4,
        window: int = 4,
        tls: TlsOptions | None = None,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        allow_plaintext_secrets: bool = False,
        registry: CollectorRegistry | None = None,
        sleep: Callable[[float], Any] | None = None,
    ) -> None:
        options = ClientOptions(
            url=url,
            model=model,
            sentinel=sentinel,
            timeout_seconds=timeout_seconds,
            retries=retries,
            window=window,
            tls=tls,
            token=token,
            headers=headers or {},
            allow_plaintext_secrets=allow_plaintext_secrets,
            registry=registry,
        )
        self._transport = self._transport_type(triton_options(options.target, tls), sleep)
        self._core = ClientCore(options, self._transport)


class _BlockingTransport:
    """Talks to the server and waits in the calling thread. What its methods return has a `result()`."""

    def __init__(self, options: Mapping[str, Any], sleep: Callable[[float], Any] | None) -> None:
        self._triton = triton_grpc.InferenceServerClient(**options)
        self._sleep = sleep or time.sleep

    def infer(self, **arguments: Any) -> Future[tuple[Any, float]]:
        answer: Future[tuple[Any, float]] = Future()

        def deliver(result: Any, error: Exception | None) -> None:
            if not answer.set_running_or_notify_cancel():
                return
            if error is None:
                answer.set_result((result, time.monotonic()))
            else:
                answer.set_exception(error)

        call = self._triton.async_infer(callback=deliver, **arguments)
        answer.add_done_callback(lambda done: call.cancel() if done.cancelled() else None)
        return answer

    def ask(self, call: Callable[..., Any], **options: Any) -> _Later:
        return _Later(lambda: call(self._triton, **options))

    def sleep(self, seconds: float) -> _Later:
        return _Later(lambda: self._sleep(seconds))

    def close(self) -> None:
        self._triton.close()


@dataclass(frozen=True)
class _Later:
    """What is done when it is waited for."""

    result: Callable[[], Any]


def _run(steps: Steps[_T]) -> _T:
    """Take steps one after another, waiting in this thread, and return what comes of them."""
    try:
        waited_for = next(steps)
        while True:
            try:
                came = waited_for.result()
            except BaseException as error:  # noqa: BLE001, PERF203  for the steps to handle or to let pass
                waited_for = steps.throw(error)
            else:
                waited_for = steps.send(came)
    except StopIteration as end:
        answer: _T = end.value
        return answer


class GuardedClient(_Client[_BlockingTransport]):
    """Asks one server, or several in turns. Safe to share between threads.

    Connects when first used, and again when the connection was lost.

    Args:
        url: `host:port` of the server's gRPC endpoint, `[address]:port` for IPv6, or `unix:/path`. Of several servers,
            which take turns, `dns:///name:port`, where the name has an address for each, or all addresses,
            `ipv4:address:port,address:port` and `ipv6:[address]:port,…`.
        model: name of the guarded model.
        sentinel: name of the model that holds the untouched original network.
        timeout_seconds: longest wait for the answer to one request (one batch), retries included.
        retries: how often a request is sent again while the server is unavailable, or has no version of the model
            ready, as when it stops; nothing else is retried.
        window: the most requests in flight at once.
        tls: encrypt the connection; None is plaintext.
        token: sent as `authorization: Bearer <token>`.
        headers: sent along with every request, such as the key of a restricted Triton protocol. Secret like the token.
        allow_plaintext_secrets: send token and headers unencrypted even to another machine.
        registry: where requests, verdicts and times are counted for Prometheus; None counts nothing.
        sleep: waits that many seconds between attempts; None is `time.sleep`, or `asyncio.sleep`.

    Raises:
        InputError: an option cannot be used, or a secret would travel in plaintext to another machine.
    """

    _transport_type = _BlockingTransport

    def __enter__(self) -> GuardedClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the client cannot be used any more."""
        self._core.close()
        self._transport.close()

    def is_ready(self) -> bool:
        """Say whether the server answers and holds the guarded model ready; asks once, without retries.

        Triton may call a model ready whose process has died; only a real inference proves more.

        Raises:
            ServerError: the server answers, but with a failure (such as AccessDeniedError).
        """
        return _run(self._core.is_ready())

    def metadata(self) -> ModelMetadata:
        """Return what the server says about the guarded model; asked once, then remembered.

        Raises:
            ServerError: the server does not answer, or the model breaks the contract of Stripwire.
        """
        return _run(self._core.metadata())

    def classify(
        self,
        images: NDArray[np.uint8],
        *,
        probabilities: bool = False,
        shared_memory: bool = False,
        canary: bool = False,
        request_id: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Verdicts:
        """Classify images and get a verdict on each.

        Args:
            images: (batch, height, width, channels) or one (height, width, channels), uint8, 0..255. Any number: what
                is more than the server takes at once is split.
            probabilities: ask for the repaired network's probabilities as well; M numbers per image travel back.
            shared_memory: hand the images to a server on this machine in system shared memory (/dev/shm) instead of
                sending them. Of a call that fails, or is cancelled, the server keeps that memory until it ends.
            canary: the images are sent to watch the guard, not for their answers: the server counts them by themselves.
            request_id: id of the request, 1 to 100 letters, digits or any of `_ . : -`; where images are split into
                several requests, `-0`, `-1`, … is put behind it. None has a random one for each request.
            on_progress: called with (images done, images in all).

        Raises:
            DataError: the images are not what the model takes.
            InputError: the request id cannot be used; or shared memory is asked for, and the server is on another
                machine, or there is too little.
            ServerError: no usable answer; see the hierarchy in `detector.errors`.
        """
        return _run(
            self._core.classify(
                images,
                probabilities=probabilities,
                shared_memory=shared_memory,
                canary=canary,
                request_id=request_id,
                on_progress=on_progress,
            )
        )

    def original_probabilities(
        self, images: NDArray[np.uint8], *, on_progress: OnProgress | None = None
    ) -> NDArray[np.float32]:
        """Return what the untouched, backdoored network says of the plain images: (batch, M), float32.

        Args:
            images: as for `classify`.
            on_progress: called with (images done, images in all).

        Raises:
            DataError: the images are not what the network takes.
            ServerError: no usable answer, or the server does not serve the original network by itself.
        """
        return _run(self._core.original_probabilities(images, on_progress=on_progress))

    def ask(self, model: str, call: Callable[..., _T]) -> _T:
        """Return `call(triton, headers=…, client_timeout=…)`: whatever else Triton's own client can do.

        Args:
            model: the model that it is about.
            call: gets the `tritonclient.grpc.InferenceServerClient` and what to pass on to its method; called again
                while the server is unavailable.

        Raises:
            ServerError: no usable answer; see the hierarchy in `detector.errors`.
        """
        answer: _T = _run(self._core.ask(model, call))
        return answer


class _AsyncTransport:
    """Talks to the server from one event loop. What its methods return can be awaited."""

    def __init__(self, options: Mapping[str, Any], sleep: Callable[[float], Any] | None) -> None:
        self._options = options
        self.sleep: Callable[[float], Awaitable[Any]] = sleep or asyncio.sleep
        self._connected: tuple[asyncio.AbstractEventLoop, Any] | None = None
        self._closed = False

    @property
    def _triton(self) -> Any:
        """Triton's client, which belongs to the event loop that it is made in."""
        loop = asyncio.get_running_loop()
        if self._connected is None:
            self._connected = (loop, triton_aio.InferenceServerClient(**self._options))
        if self._connected[0] is not loop:
            raise InputError("client: it belongs to another event loop; open one in each")
        return self._connected[1]

    def infer(self, **arguments: Any) -> asyncio.Task[tuple[Any, float]]:
        async def answer() -> tuple[Any, float]:
            return await triton.infer(**arguments), time.monotonic()

        triton = self._triton
        task = asyncio.get_running_loop().create_task(self._told_of_close(answer()))
        # One that failed before it was given up is nobody's business.
        task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        return task

    async def ask(self, call: Callable[..., Awaitable[Any]], **options: Any) -> Any:
        return await self._told_of_close(call(self._triton, **options))

    async def close(self) -> None:
        self._closed = True
        if self._connected is not None:
            await self._triton.close()

    async def _told_of_close(self, call: Awaitable[_T]) -> _T:
        """Wait for a call; gRPC cancels it when the connection is closed, but nobody cancelled who waits for it."""
        try:
            return await call
        except asyncio.CancelledError:
            if self._closed and not _is_cancelled(asyncio.current_task()):
                raise InferenceServerException("the client was closed", "StatusCode.CANCELLED") from None
            raise


def _is_cancelled(task: asyncio.Task[Any] | None) -> bool:
    cancelling = getattr(task, "cancelling", None)  # Python 3.10 cannot tell
    return cancelling is None or cancelling() > 0


async def _run_async(steps: Steps[_T]) -> _T:
    """Take steps one after another, awaiting each, and return what comes of them."""
    try:
        waited_for = next(steps)
        while True:
            try:
                came = await waited_for
            except BaseException as error:  # noqa: BLE001, PERF203  for the steps to handle or to let pass
                waited_for = steps.throw(error)
            else:
                waited_for = steps.send(came)
    except StopIteration as end:
        answer: _T = end.value
        return answer


class AsyncGuardedClient(_Client[_AsyncTransport]):
    """`GuardedClient` for asyncio: the same options and methods, to be awaited.

    A client belongs to the event loop in which it is first used. Cancelling what waits for it cancels its requests.
    """

    _transport_type = _AsyncTransport

    async def __aenter__(self) -> AsyncGuardedClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """As `GuardedClient.close`."""
        self._core.close()
        await self._transport.close()

    async def is_ready(self) -> bool:
        """As `GuardedClient.is_ready`."""
        return await _run_async(self._core.is_ready())

    async def metadata(self) -> ModelMetadata:
        """As `GuardedClient.metadata`."""
        return await _run_async(self._core.metadata())

    async def classify(
        self,
        images: NDArray[np.uint8],
        *,
        probabilities: bool = False,
        shared_memory: bool = False,
        canary: bool = False,
        request_id: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Verdicts:
        """As `GuardedClient.classify`."""
        return await _run_async(
            self._core.classify(
                images,
                probabilities=probabilities,
                shared_memory=shared_memory,
                canary=canary,
                request_id=request_id,
                on_progress=on_progress,
            )
        )

    async def original_probabilities(
        self, images: NDArray[np.uint8], *, on_progress: OnProgress | None = None
    ) -> NDArray[np.float32]:
        """As `GuardedClient.original_probabilities`."""
        return await _run_async(self._core.original_probabilities(images, on_progress=on_progress))

    async def ask(self, model: str, call: Callable[..., Awaitable[_T]]) -> _T:
        """As `GuardedClient.ask`, with `tritonclient.grpc.aio.InferenceServerClient`."""
        answer: _T = await _run_async(self._core.ask(model, call))
        return answer
