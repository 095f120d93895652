"""What both clients do, but for waiting.

Whatever takes several exchanges with the server is written once, as *steps*: a generator that yields what is to be
waited for, and is sent what came of it, or has thrown in what was raised. The clients in `client.api` differ in how
they wait.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeAlias, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from tenacity import (
    DoAttempt,
    DoSleep,
    RetryCallState,
    Retrying,
    retry_if_exception,
    wait_exponential,
    wait_random,
)
from tritonclient.grpc import InferInput
from tritonclient.utils import InferenceServerException

from client.connection import Target, TlsOptions, checked_headers, read_target
from client.messages import (
    GUARDED,
    ORIGINAL,
    VERDICT_OUTPUTS,
    Contract,
    ModelMetadata,
    Output,
    Request,
    Verdicts,
    check_request_id,
    checked_images,
    described,
    image_input,
    perturbations_input,
    request_ids,
)
from client.metrics import metrics_on, outcome_of
from client.shared import SharedBatches
from client.statuses import is_unavailable, is_unavailable_or_stopping, status_of, translated
from client.tracing import trace_headers
from detector.errors import InputError, RequestRejectedError, ServerError
from detector.live_metrics import CANARY_KEY

OnProgress = Callable[[int, int], None]
"""Called with (images done, images in all)."""

_T = TypeVar("_T")

Steps: TypeAlias = Generator[Any, Any, _T]
"""Something to be done step by step, and what comes of it in the end."""

_MAX_REQUEST_BYTES = 2**26  # 64 MiB: a few large images a request keep the window's memory bounded
_NOT_READY = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.NOT_FOUND}
_BACKOFF = wait_exponential(multiplier=0.2, max=5.0) + wait_random(0.0, 0.2)  # seconds; random against herds


class Pending(Protocol):
    """A request on its way. Waiting for it gives Triton's answer and when it came, by `time.monotonic`."""

    def cancel(self) -> Any:
        """Give it up, unless it is done."""
        ...


class Transport(Protocol):
    """What talks to the server, and waits. What its methods return is for a step to yield.

    Args:
        options: what Triton's client takes.
        sleep: waits that many seconds; None for the usual.
    """

    def __init__(self, options: Mapping[str, Any], sleep: Callable[[float], Any] | None) -> None: ...

    def infer(self, **arguments: Any) -> Pending:
        """Send an inference request, now; the arguments are those of Triton's client."""
        ...

    def ask(self, call: Callable[..., Any], **options: Any) -> Any:
        """Call `call(triton, **options)`."""
        ...

    def sleep(self, seconds: float) -> Any:
        """Wait between two attempts."""
        ...


@dataclass(frozen=True)
class ClientOptions:
    """The options of a client, as `client.api.GuardedClient` describes them.

    Raises:
        InputError: an option cannot be used, or a secret would travel in plaintext to another machine.
    """

    url: str
    model: str
    sentinel: str
    timeout_seconds: float
    retries: int
    window: int
    tls: TlsOptions | None
    token: str | None = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    allow_plaintext_secrets: bool
    registry: CollectorRegistry | None

    def __post_init__(self) -> None:
        target, headers = self.target, self.sent_headers
        if not (self.timeout_seconds > 0 and math.isfinite(self.timeout_seconds)):
            raise InputError(f"timeout_seconds: got {self.timeout_seconds}, expected a positive number")
        if self.retries < 0:
            raise InputError(f"retries: got {self.retries}, expected 0 or more")
        if self.window < 1:
            raise InputError(f"window: got {self.window}, expected 1 or more")
        if headers and self.tls is None and not target.is_local and not self.allow_plaintext_secrets:
            raise InputError(
                f"token: {self.url} is another machine and the connection is not encrypted, so anybody on the way "
                "could read the token; give TLS options, or allow secrets in plaintext"
            )
        if self.tls is not None and self.tls.server_name is None and not target.has_name:
            raise InputError(
                f"tls: {self.url} has no name to look for in the servers' certificates; give one, server_name, or use "
                "dns:///name:port"
            )

    @cached_property
    def target(self) -> Target:
        """Whom the address means."""
        return read_target(self.url)

    @cached_property
    def sent_headers(self) -> dict[str, str]:
        """What goes along with every request, the token included."""
        return checked_headers(self.token, self.headers)


@dataclass(frozen=True)
class _InFlight:
    """A request that was sent at `since`, by `time.monotonic`."""

    request: Request
    since: float
    pending: Pending


class ClientCore:
    """The steps of a client.

    Args:
        options: of the client.
        transport: what talks to the server.
    """

    def __init__(self, options: ClientOptions, transport: Transport) -> None:
        self._options = options
        self._transport = transport
        self._metrics = metrics_on(options.registry)
        self._described: dict[str, ModelMetadata] = {}
        self._closed = False

    def close(self) -> None:
        """Have every later use refused."""
        self._closed = True

    def is_ready(self) -> Steps[bool]:
        """Say whether the server answers and holds the guarded model ready."""
        self._check_open()
        model, seconds = self._options.model, self._options.timeout_seconds
        try:
            server_is = yield self._ask(lambda triton, **options: triton.is_server_ready(**options), seconds)
            if not server_is:
                return False
            model_is = yield self._ask(lambda triton, **options: triton.is_model_ready(model, **options), seconds)
            return bool(model_is)
        except InferenceServerException as error:
            if status_of(error) in _NOT_READY:
                return False
            raise self._translated(error, model) from error

    def metadata(self) -> Steps[ModelMetadata]:
        """Return what the server says about the guarded model; asked once, then remembered."""
        return self._describe(self._options.model, GUARDED)

    def classify(
        self,
        images: NDArray[np.uint8],
        *,
        probabilities: bool,
        shared_memory: bool,
        canary: bool,
        request_id: str | None,
        on_progress: OnProgress | None,
    ) -> Steps[Verdicts]:
        """Classify images and get a verdict on each."""
        if shared_memory and not self._options.target.is_local:
            raise InputError(
                f"shared memory: {self._options.url} is another machine, expected a server on this one; send the "
                "images without"
            )
        if shared_memory and self._options.target.is_balanced:
            raise InputError(f"shared memory: {self._options.url} may be several servers, expected one")
        check_request_id(request_id)
        about = yield from self.metadata()
        batches = _Batches(checked_images(images, about), about, request_id)
        outputs = [*VERDICT_OUTPUTS]
        if probabilities:
            outputs.append(Output("probabilities", np.float32, (about.classes,)))
        parameters = {CANARY_KEY: True} if canary else {}
        if shared_memory:
            answers = yield from self._exchange_in_shared_memory(batches, outputs, parameters, on_progress)
        else:
            requests = batches.requests(image_input, outputs, parameters)
            answers = yield from self._exchange(batches, requests, outputs, on_progress)
        label, trojaned, entropy, p_value, count = (answer[:, 0] for answer in answers[:5])
        if not canary:
            rejected = int(trojaned.sum())
            self._metrics.inputs.labels("rejected").inc(rejected)
            self._metrics.inputs.labels("accepted").inc(len(trojaned) - rejected)
        believed = answers[5] if probabilities else None
        return Verdicts(label, trojaned, entropy, p_value, count, believed, about.classes, batches.image_ids())

    def original_probabilities(
        self, images: NDArray[np.uint8], *, on_progress: OnProgress | None
    ) -> Steps[NDArray[np.float32]]:
        """Return what the untouched, backdoored network says of the plain images: (batch, M), float32."""
        about = yield from self._describe(self._options.sentinel, ORIGINAL)
        batches = _Batches(checked_images(images, about), about, None)
        outputs = [Output("sentinel_probabilities", np.float32, (1, about.classes))]
        requests = batches.requests(perturbations_input, outputs, {})
        (answers,) = yield from self._exchange(batches, requests, outputs, on_progress)
        return answers[:, 0]

    def ask(self, model: str, call: Callable[..., Any]) -> Steps[Any]:
        """Return `call(triton, headers=…, client_timeout=…)`."""
        return self._counted(self._ask_again(model, call))

    def _ask_again(self, model: str, call: Callable[..., Any]) -> Steps[Any]:
        def attempt(seconds_left: float) -> Steps[Any]:
            return (yield self._ask(call, seconds_left))

        return self._retrying(model, attempt)

    def _ask(self, call: Callable[..., Any], seconds: float) -> Any:
        return self._transport.ask(call, headers=self._headers(), client_timeout=seconds)

    def _describe(self, model: str, contract: Contract) -> Steps[ModelMetadata]:
        """Ask for the model's shapes and batch size, and check them against the contract."""
        if model not in self._described:
            told = yield from self.ask(model, lambda triton, **options: triton.get_model_metadata(model, **options))
            configured = yield from self.ask(model, lambda triton, **options: triton.get_model_config(model, **options))
            self._described[model] = described(model, told, configured.config, contract, self._options.url)
        return self._described[model]

    def _exchange_in_shared_memory(
        self,
        batches: _Batches,
        outputs: Sequence[Output],
        parameters: Mapping[str, bool],
        on_progress: OnProgress | None,
    ) -> Steps[list[NDArray[Any]]]:
        """Have the requests' images in shared memory, in as many slots as there are requests at once.

        Of a call that fails the server keeps the memory: it may still read what a request had that was cancelled, or
        that nobody waits for any more, and does not know that (see `SharedBatches.unregister`).
        """
        slots = min(self._options.window, len(batches))
        with SharedBatches(
            lambda call: self._ask_again(batches.about.model, call), slots, batches.most_bytes
        ) as shared:
            yield from self._counted(shared.register())
            requests = batches.requests(shared.place, outputs, parameters)
            answers = yield from self._exchange(batches, requests, outputs, on_progress, shared.register)
            yield from shared.unregister(self._transport.sleep)
            return answers

    def _exchange(
        self,
        batches: _Batches,
        requests: Iterator[Request],
        outputs: Sequence[Output],
        on_progress: OnProgress | None,
        prepare_again: Callable[[], Steps[None]] | None = None,
    ) -> Steps[list[NDArray[Any]]]:
        """Send the requests, a window of them in flight, each made when it is sent; join the answers in order.

        The steps of `prepare_again` come before a request is sent again: the server may be another one.
        """
        in_flight: deque[_InFlight] = deque()
        parts: list[list[NDArray[Any]]] = [[np.empty((0, *output.shape), output.dtype)] for output in outputs]
        done = 0
        try:
            while True:
                while len(in_flight) < self._options.window and (request := next(requests, None)) is not None:
                    since = time.monotonic()
                    in_flight.append(_InFlight(request, since, self._send(request, self._options.timeout_seconds)))
                if not in_flight:
                    return [np.concatenate(arrays) for arrays in parts]
                sent = in_flight.popleft()
                for arrays, array in zip(parts, (yield from self._answer(sent, prepare_again)), strict=True):
                    arrays.append(array)
                done += sent.request.count
                if on_progress is not None:
                    on_progress(done, len(batches.images))
        except RequestRejectedError:
            # The server may have got another model since it was asked about it.
            self._described.pop(batches.about.model, None)
            raise
        finally:
            for sent in in_flight:
                sent.pending.cancel()
                self._metrics.requests.labels("cancelled").inc()

    def _send(self, request: Request, seconds: float) -> Pending:
        self._check_open()
        return self._transport.infer(**request.arguments(), headers=self._headers(), client_timeout=seconds)

    def _answer(self, sent: _InFlight, prepare_again: Callable[[], Steps[None]] | None) -> Steps[list[NDArray[Any]]]:
        """Wait for an answer and read it; its request goes out again while the server is unavailable."""
        first = iter([sent.pending])
        request = sent.request

        def attempt(seconds_left: float) -> Steps[list[NDArray[Any]]]:
            pending = next(first, None)
            if pending is None:
                if prepare_again is not None:
                    yield from prepare_again()
                pending = self._send(request, seconds_left)
            try:
                answer, came_at = yield pending
            finally:
                pending.cancel()
            tensors = [output.read(answer, request.count, self._options.url) for output in request.outputs]
            self._metrics.seconds.observe(came_at - sent.since)
            return tensors

        return self._counted(self._retrying(request.model, attempt, is_unavailable_or_stopping))

    def _counted(self, steps: Steps[_T]) -> Steps[_T]:
        outcome = "cancelled"
        try:
            answer = yield from steps
        except Exception as error:
            outcome = outcome_of(error)
            raise
        else:
            outcome = "answered"
            return answer
        finally:
            self._metrics.requests.labels(outcome).inc()

    def _retrying(
        self,
        model: str,
        attempt: Callable[[float], Steps[_T]],
        may_pass: Callable[[BaseException], bool] = is_unavailable,
    ) -> Steps[_T]:
        """Take the steps of `attempt(seconds_left)` again while the server is unavailable and there is time."""
        self._check_open()
        try:
            return (yield from self._attempts(attempt, may_pass))
        except InferenceServerException as error:
            raise self._translated(error, model) from error

    def _attempts(self, attempt: Callable[[float], Steps[_T]], may_pass: Callable[[BaseException], bool]) -> Steps[_T]:
        give_up_at = time.monotonic() + self._options.timeout_seconds

        def is_enough(state: RetryCallState) -> bool:
            return state.attempt_number > self._options.retries or time.monotonic() + state.upcoming_sleep >= give_up_at

        retrying = Retrying(retry=retry_if_exception(may_pass), stop=is_enough, wait=_BACKOFF, reraise=True)
        state = RetryCallState(retrying, None, (), {})
        retrying.begin()
        while True:
            todo = retrying.iter(state)
            if isinstance(todo, DoAttempt):
                try:
                    state.set_result((yield from attempt(max(give_up_at - time.monotonic(), 0.001))))
                except InferenceServerException as error:
                    state.set_exception((type(error), error, error.__traceback__))
            elif isinstance(todo, DoSleep):
                state.prepare_for_next_attempt()
                self._metrics.retries.inc()
                yield self._transport.sleep(todo)
            else:
                answer: _T = todo
                return answer

    def _translated(self, error: InferenceServerException, model: str) -> ServerError:
        return translated(error, self._options.url, model, self._options.timeout_seconds)

    def _headers(self) -> dict[str, str]:
        return self._options.sent_headers | trace_headers()

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("client: it was closed; open another one")


class _Batches:
    """Images, batch by batch, each with the id of its request.

    Args:
        images: (batch, height, width, channels), uint8.
        about: the model that they are for.
        request_id: the caller's; None for random ones.
    """

    def __init__(self, images: NDArray[np.uint8], about: ModelMetadata, request_id: str | None) -> None:
        self.images = images
        self.about = about
        bytes_per_image = math.prod(images.shape[1:])
        self._size = max(1, min(about.max_batch_size, _MAX_REQUEST_BYTES // max(1, 4 * bytes_per_image)))
        self.most_bytes = min(self._size, len(images)) * bytes_per_image
        self._ids = tuple(request_ids(request_id, -(-len(images) // self._size)))

    def __len__(self) -> int:
        return len(self._ids)

    def requests(
        self,
        to_input: Callable[[NDArray[np.uint8]], InferInput],
        outputs: Sequence[Output],
        parameters: Mapping[str, bool],
    ) -> Iterator[Request]:
        """Yield a request for each batch, made when it is asked for."""
        for number, request_id in enumerate(self._ids):
            batch = self.images[number * self._size : (number + 1) * self._size]
            yield Request(self.about.model, request_id, to_input(batch), len(batch), tuple(outputs), parameters)

    def image_ids(self) -> tuple[str, ...]:
        """Return the name of each image: the id of its request, a dot, its row in it."""
        return tuple(f"{self._ids[row // self._size]}.{row % self._size}" for row in range(len(self.images)))
