"""Ask a running Stripwire server for labels and verdicts, over gRPC.

    with GuardedClient("127.0.0.1:8001") as client:
        for verdict in client.classify(images):
            ...

Importing this module loads neither TensorFlow nor SciPy.
"""

from __future__ import annotations

import ipaddress
import math
import re
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential, wait_random
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from client.shared import SharedBatches
from detector.errors import (
    AccessDeniedError,
    DataError,
    DeadlineExceededError,
    InputError,
    RequestRejectedError,
    ServerError,
    ServerUnavailableError,
)
from detector.live_metrics import CANARY_KEY
from detector.serving import SENTINEL

OnProgress = Callable[[int, int], None]
"""Called with (images done, images in all)."""

_T = TypeVar("_T")

_NO_CONTROL = "explicit model load / unload is not allowed"  # what Triton says when nobody may

_MAX_MESSAGE_BYTES = 2**31 - 1  # Triton's own limit
_MAX_REQUEST_BYTES = 2**26  # 64 MiB: a few large images a request keep the window's memory bounded
_BACKOFF = wait_exponential(multiplier=0.2, max=5.0) + wait_random(0.0, 0.2)  # seconds; random against herds

ERROR_OF_STATUS: Mapping[grpc.StatusCode, type[ServerError]] = MappingProxyType(
    {
        grpc.StatusCode.OK: ServerError,  # an exception that claims success: still nothing to return
        grpc.StatusCode.CANCELLED: ServerError,
        grpc.StatusCode.UNKNOWN: ServerError,
        grpc.StatusCode.INVALID_ARGUMENT: RequestRejectedError,
        grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
        grpc.StatusCode.NOT_FOUND: ServerError,
        grpc.StatusCode.ALREADY_EXISTS: ServerError,
        grpc.StatusCode.PERMISSION_DENIED: AccessDeniedError,
        grpc.StatusCode.RESOURCE_EXHAUSTED: ServerError,
        grpc.StatusCode.FAILED_PRECONDITION: ServerError,
        grpc.StatusCode.ABORTED: ServerError,
        grpc.StatusCode.OUT_OF_RANGE: RequestRejectedError,
        grpc.StatusCode.UNIMPLEMENTED: ServerError,
        grpc.StatusCode.INTERNAL: ServerError,
        grpc.StatusCode.UNAVAILABLE: ServerUnavailableError,
        grpc.StatusCode.DATA_LOSS: ServerError,
        grpc.StatusCode.UNAUTHENTICATED: AccessDeniedError,
    }
)
"""The error that a caller sees for each gRPC status."""


@dataclass(frozen=True)
class TlsOptions:
    """How to trust the server, and how to prove who we are. All files are PEM.

    Attributes:
        root_certificates: the authorities to trust; None trusts those that gRPC brings along.
        private_key: our key, not encrypted, for mutual TLS; goes with `certificate_chain`.
        certificate_chain: our certificate, then its issuers.
        server_name: the name to expect in the server's certificate, where it is not the address (a port-forward).

    Raises:
        InputError: a file is missing or no PEM, key and certificate do not match, or one comes without the other.
    """

    root_certificates: Path | None = None
    private_key: Path | None = None
    certificate_chain: Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.private_key is None) != (self.certificate_chain is None):
            raise InputError("TLS: got one of private key and certificate chain, expected both (mutual TLS) or neither")
        # OpenSSL checks here what gRPC would report much later as "no connection".
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.root_certificates is not None:
            _check_pem("root certificates", self.root_certificates, context.load_verify_locations)
        if self.private_key is not None and self.certificate_chain is not None:
            key = self.private_key
            _check_pem("private key", key, lambda _: None)
            _check_pem(
                f"certificate chain (with private key {key})",
                self.certificate_chain,
                lambda chain: context.load_cert_chain(chain, key, password=_no_password),
            )


@dataclass(frozen=True)
class ModelMetadata:
    """What the server says about the guarded model.

    Attributes:
        model: its name.
        versions: the versions that are served.
        image_shape: (height, width, channels); -1 where the model takes any.
        classes: M, the number of classes.
        max_batch_size: the most images that one request may hold.
    """

    model: str
    versions: tuple[str, ...]
    image_shape: tuple[int, int, int]
    classes: int
    max_batch_size: int


@dataclass(frozen=True)
class Verdict:
    """The answer for one image.

    Attributes:
        label: class of the repaired network, or M (one past the last) when the server blocks a trojaned image.
        trojaned: whether the image is taken to carry a trigger.
        entropy_bits: STRIP's mean entropy; low is suspicious.
        p_value: how often a clean image looks at least as suspicious to the detector, 0..1.
        perturbations: how many perturbations were looked at. Where the server spares images that are certain to be
            accepted the rest of theirs, entropy and p-value are by these.
    """

    label: int
    trojaned: bool
    entropy_bits: float
    p_value: float
    perturbations: int


@dataclass(frozen=True, eq=False)
class Verdicts:
    """The answers for B images, in their order; iterating gives one `Verdict` each.

    Attributes:
        labels: (B,), int32: class of the repaired network, or M when the server blocks a trojaned image.
        trojaned: (B,), bool.
        entropy_bits: (B,), float32.
        p_values: (B,), float32, 0..1.
        perturbations: (B,), int32.
        probabilities: (B, M), float32, of the repaired network; None unless asked for.
        classes: M.
    """

    labels: NDArray[np.int32]
    trojaned: NDArray[np.bool_]
    entropy_bits: NDArray[np.float32]
    p_values: NDArray[np.float32]
    perturbations: NDArray[np.int32]
    probabilities: NDArray[np.float32] | None
    classes: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Verdict:
        return Verdict(
            label=int(self.labels[index]),
            trojaned=bool(self.trojaned[index]),
            entropy_bits=float(self.entropy_bits[index]),
            p_value=float(self.p_values[index]),
            perturbations=int(self.perturbations[index]),
        )

    def __iter__(self) -> Iterator[Verdict]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class _Output:
    """One output tensor: (batch, *shape) of `dtype`."""

    name: str
    dtype: type[np.generic]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Request:
    """One batch, ready to be sent, and sent again."""

    model: str
    input: InferInput
    outputs: tuple[_Output, ...]
    count: int
    parameters: Mapping[str, bool] | None = None
    prepare_again: Callable[[], None] | None = None
    """Called before it is sent again: the server may be another one."""


class GuardedClient:
    """Asks one server. Safe to share between threads. Connects when first used, and again when the connection was lost.

    Args:
        url: `host:port` of the server's gRPC endpoint, `[address]:port` for IPv6, or `unix:/path`.
        model: name of the guarded model.
        sentinel: name of the model that holds the untouched original network.
        timeout_seconds: longest wait for the answer to one request (one batch), retries included.
        retries: how often a request is sent again while the server is unavailable; nothing else is retried.
        window: the most requests in flight at once.
        tls: encrypt the connection; None is plaintext.
        token: sent as `authorization: Bearer <token>`.
        headers: sent along with every request, such as the key of a restricted Triton protocol. Secret like the token.
        allow_plaintext_secrets: send token and headers unencrypted even to another machine.
        sleep: waits that many seconds between attempts.

    Raises:
        InputError: an option cannot be used, or a secret would travel in plaintext to another machine.
    """

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
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._is_local = is_loopback(url)
        if not (timeout_seconds > 0 and math.isfinite(timeout_seconds)):
            raise InputError(f"timeout_seconds: got {timeout_seconds}, expected a positive number")
        if retries < 0:
            raise InputError(f"retries: got {retries}, expected 0 or more")
        if window < 1:
            raise InputError(f"window: got {window}, expected 1 or more")
        self._headers = _checked_headers(token, headers or {})
        if self._headers and tls is None and not self._is_local and not allow_plaintext_secrets:
            raise InputError(
                f"token: {url} is another machine and the connection is not encrypted, so anybody on the way could "
                "read the token; give TLS options, or allow secrets in plaintext"
            )
        self._url = url
        self._model = model
        self._sentinel = sentinel
        self._timeout_seconds = float(timeout_seconds)
        self._retries = retries
        self._window = window
        self._sleep = sleep
        self._described: dict[str, ModelMetadata] = {}
        self._closed = False
        self._triton = _connect(url, tls, use_proxy=not self._is_local)

    def __enter__(self) -> GuardedClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the client cannot be used any more."""
        self._closed = True
        self._triton.close()

    def is_ready(self) -> bool:
        """Say whether the server answers and holds the guarded model ready; asks once, without retries.

        Triton may call a model ready whose process has died; only a real inference proves more.

        Raises:
            ServerError: the server answers, but with a failure (such as AccessDeniedError).
        """
        self._check_open()
        try:
            return bool(
                self._triton.is_server_ready(headers=self._headers, client_timeout=self._timeout_seconds)
                and self._triton.is_model_ready(
                    self._model, headers=self._headers, client_timeout=self._timeout_seconds
                )
            )
        except InferenceServerException as error:
            not_ready = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.NOT_FOUND}
            if _status_of(error) in not_ready:
                return False
            raise self._translated(error, self._model) from error

    def metadata(self) -> ModelMetadata:
        """Return what the server says about the guarded model; asked once, then remembered.

        Raises:
            ServerError: the server does not answer, or the model breaks the contract of Stripwire.
        """
        return self._describe(self._model, "image", "UINT8", "probabilities")

    def classify(
        self,
        images: NDArray[np.uint8],
        *,
        probabilities: bool = False,
        shared_memory: bool = False,
        canary: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Verdicts:
        """Classify images and get a verdict on each.

        Args:
            images: (batch, height, width, channels) or one (height, width, channels), uint8, 0..255. Any number: what
                is more than the server takes at once is split.
            probabilities: ask for the repaired network's probabilities as well; M numbers per image travel back.
            shared_memory: hand the images to a server on this machine in system shared memory (/dev/shm) instead of
                sending them.
            canary: the images are sent to watch the guard, not for their answers: the server counts them by themselves.
            on_progress: called with (images done, images in all).

        Raises:
            DataError: the images are not what the model takes.
            InputError: shared memory is asked for, and the server is on another machine, or there is too little.
            ServerError: no usable answer; see the hierarchy in `detector.errors`.
        """
        if shared_memory and not self._is_local:
            raise InputError(
                f"shared memory: {self._url} is another machine, expected a server on this one; send the images without"
            )
        about = self.metadata()
        images = _checked_images(images, about)
        outputs = [
            _Output("label", np.int32, (1,)),
            _Output("trojaned", np.bool_, (1,)),
            _Output("entropy", np.float32, (1,)),
            _Output("p_value", np.float32, (1,)),
            _Output("perturbations", np.int32, (1,)),
        ]
        if probabilities:
            outputs.append(_Output("probabilities", np.float32, (about.classes,)))
        to_input = None if shared_memory else _image_input
        answers = self._infer(about, images, outputs, on_progress, to_input, {CANARY_KEY: True} if canary else None)
        label, trojaned, entropy, p_value, count = (answer[:, 0] for answer in answers[:5])
        believed = answers[5] if probabilities else None
        return Verdicts(label, trojaned, entropy, p_value, count, believed, about.classes)

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
        about = self._describe(self._sentinel, "perturbations", "FP32", "sentinel_probabilities")
        images = _checked_images(images, about)
        outputs = [_Output("sentinel_probabilities", np.float32, (1, about.classes))]
        (answers,) = self._infer(about, images, outputs, on_progress, _perturbations_input)
        return answers[:, 0]

    def ask(self, model: str, call: Callable[..., _T]) -> _T:
        """Return `call(triton, headers=…, client_timeout=…)`: whatever else Triton's own client can do.

        Args:
            model: the model that it is about.
            call: gets the `tritonclient.grpc.InferenceServerClient` and what to pass on to its method; called again
                while the server is unavailable.

        Raises:
            ServerError: no usable answer; see the hierarchy in `detector.errors`.
        """
        return self._retrying(
            model, lambda left: call(self._triton, headers=self._headers, client_timeout=left), _is_unavailable
        )

    def _describe(self, model: str, input_name: str, datatype: str, output_name: str) -> ModelMetadata:
        """Ask for the model's shapes and batch size, and check them against the contract."""
        if model in self._described:
            return self._described[model]
        told = self.ask(model, lambda triton, **options: triton.get_model_metadata(model, **options))
        configured = self.ask(model, lambda triton, **options: triton.get_model_config(model, **options))
        inputs = {tensor.name: tensor for tensor in told.inputs}
        outputs = {tensor.name: tensor for tensor in told.outputs}
        image = inputs.get(input_name)
        answer = outputs.get(output_name)
        max_batch_size = int(configured.config.max_batch_size)
        if (
            len(inputs) != 1
            or image is None
            or image.datatype != datatype
            or len(image.shape) < 4
            or answer is None
            or answer.shape[-1] < 1
            or max_batch_size < 1
        ):
            raise ServerError(
                f"{self._url}: model {model!r} is not one of Stripwire's: got inputs {_listed(told.inputs)}, outputs "
                f"{_listed(told.outputs)}, max_batch_size {max_batch_size}; expected one {datatype} input "
                f"{input_name!r} of images, an output {output_name!r} and batching"
            )
        height, width, channels = (int(side) for side in image.shape[-3:])
        about = ModelMetadata(
            model, tuple(told.versions), (height, width, channels), int(answer.shape[-1]), max_batch_size
        )
        self._described[model] = about
        return about

    def _infer(
        self,
        about: ModelMetadata,
        images: NDArray[np.uint8],
        outputs: Sequence[_Output],
        on_progress: OnProgress | None,
        to_input: Callable[[NDArray[np.uint8]], InferInput] | None,
        parameters: Mapping[str, bool] | None = None,
    ) -> list[NDArray[Any]]:
        """Send the images batch by batch, and join the answers in order.

        `to_input` makes the input of a batch; without one, batches are handed over in shared memory. `parameters` go
        with every request.
        """
        bytes_per_image = math.prod(images.shape[1:])
        batch_size = max(1, min(about.max_batch_size, _MAX_REQUEST_BYTES // max(1, 4 * bytes_per_image)))
        batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
        if to_input is not None:
            requests = (
                _Request(about.model, to_input(batch), tuple(outputs), len(batch), parameters) for batch in batches
            )
            return self._exchange(about, requests, outputs, len(images), on_progress)
        slots = min(self._window, -(-len(images) // batch_size))
        slot_bytes = min(batch_size, len(images)) * bytes_per_image
        with SharedBatches(lambda call: self.ask(about.model, call), slots, slot_bytes) as shared:
            requests = (
                _Request(
                    about.model, shared.place(number, batch), tuple(outputs), len(batch), parameters, shared.register
                )
                for number, batch in enumerate(batches)
            )
            return self._exchange(about, requests, outputs, len(images), on_progress)

    def _exchange(
        self,
        about: ModelMetadata,
        requests: Iterator[_Request],
        outputs: Sequence[_Output],
        count: int,
        on_progress: OnProgress | None,
    ) -> list[NDArray[Any]]:
        """Send the requests, a window of them in flight, each made when it is sent; join the answers in order."""
        in_flight: deque[tuple[_Request, Future[Any]]] = deque()
        parts: list[list[NDArray[Any]]] = [[np.empty((0, *output.shape), output.dtype)] for output in outputs]
        done = 0
        try:
            while True:
                while len(in_flight) < self._window and (request := next(requests, None)) is not None:
                    in_flight.append((request, self._send(request, self._timeout_seconds)))
                if not in_flight:
                    return [np.concatenate(arrays) for arrays in parts]
                request, answer = in_flight[0]
                result = self._result(request, answer)
                in_flight.popleft()
                for arrays, output in zip(parts, outputs, strict=True):
                    arrays.append(self._tensor(result, output, request.count))
                done += request.count
                if on_progress is not None:
                    on_progress(done, count)
        except RequestRejectedError:
            # The server may have got another model since it was asked about it.
            self._described.pop(about.model, None)
            raise
        finally:
            for _, answer in in_flight:
                answer.cancel()

    def _send(self, request: _Request, timeout_seconds: float) -> Future[Any]:
        """Send one batch; cancelling the future cancels the call."""
        self._check_open()
        answer: Future[Any] = Future()

        def deliver(result: Any, error: Exception | None) -> None:
            if not answer.set_running_or_notify_cancel():
                return
            if error is None:
                answer.set_result(result)
            else:
                answer.set_exception(error)

        call = self._triton.async_infer(
            request.model,
            [request.input],
            deliver,
            outputs=[InferRequestedOutput(output.name) for output in request.outputs],
            client_timeout=timeout_seconds,
            headers=self._headers,
            parameters=None if request.parameters is None else dict(request.parameters),
        )
        answer.add_done_callback(lambda done: call.cancel() if done.cancelled() else None)
        return answer

    def _result(self, request: _Request, answer: Future[Any]) -> Any:
        """Wait for an answer; its request goes out again while the server is unavailable."""
        answers = iter([answer])

        def attempt(seconds_left: float) -> Any:
            if (first := next(answers, None)) is not None:
                return first.result()
            if request.prepare_again is not None:
                request.prepare_again()
            return self._send(request, seconds_left).result()

        return self._retrying(request.model, attempt, _is_unavailable_or_stopping)

    def _retrying(self, model: str, attempt: Callable[[float], _T], may_pass: Callable[[BaseException], bool]) -> _T:
        """Call `attempt(seconds_left)` again while its errors may pass and there is time; translate errors."""
        self._check_open()
        give_up_at = time.monotonic() + self._timeout_seconds

        def is_enough(state: RetryCallState) -> bool:
            return state.attempt_number > self._retries or time.monotonic() + state.upcoming_sleep >= give_up_at

        retrying = Retrying(
            retry=retry_if_exception(may_pass),
            stop=is_enough,
            wait=_BACKOFF,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            return retrying(lambda: attempt(max(give_up_at - time.monotonic(), 0.001)))
        except InferenceServerException as error:
            raise self._translated(error, model) from error

    def _translated(self, error: InferenceServerException, model: str) -> ServerError:
        """Return the error of ours that tells the user what happened and what to do."""
        status = _status_of(error)
        said = error.message() or "no details"
        kind = ERROR_OF_STATUS[status]
        if kind is ServerUnavailableError:
            message = (
                f"the server is unavailable ({said}); if none runs there, start one with `stripwire serve`; if one "
                "does: is this its gRPC port, and does it ask for TLS, or not?"
            )
        elif kind is DeadlineExceededError:
            waited = f"{self._timeout_seconds:g} s"
            message = f"model {model!r} did not answer within {waited}; allow it more time (--timeout)"
        elif kind is RequestRejectedError:
            message = f"model {model!r} refused the request: {said}"
        elif kind is AccessDeniedError:
            message = f"the server refused us ({said}); check the token, the headers and the client certificate"
        elif status is grpc.StatusCode.FAILED_PRECONDITION and _NO_CONTROL in said:
            message = (
                f"the server lets nobody load models ({said}); it was started without --model-control-mode=explicit, "
                "so restart it to have it serve another version"
            )
        elif status is grpc.StatusCode.NOT_FOUND:
            message = f"the server has not loaded the model {model!r} ({said}); does it serve an exported repository?"
        elif status is grpc.StatusCode.UNIMPLEMENTED:
            message = f"this is no Triton gRPC endpoint ({said}); check the port (Triton's is 8001 by default)"
        else:
            message = f"model {model!r} failed with {status.name}: {said}"
        return kind(f"{self._url}: {message}")

    def _tensor(self, result: Any, output: _Output, count: int) -> NDArray[Any]:
        """Return one output tensor, (count, *shape), or refuse an answer that is not what was asked for."""
        expected = f"{np.dtype(output.dtype)} of shape {(count, *output.shape)}"
        try:
            tensor = result.as_numpy(output.name)
        except ValueError as error:  # fewer bytes than the shape says
            raise ServerError(
                f"{self._url}: output {output.name!r} is damaged ({error}), expected {expected}"
            ) from error
        if tensor is None:
            raise ServerError(f"{self._url}: the answer lacks output {output.name!r}, expected {expected}")
        if tensor.shape != (count, *output.shape) or tensor.dtype != output.dtype:
            raise ServerError(
                f"{self._url}: output {output.name!r}: got {tensor.dtype} of shape {tensor.shape}, expected {expected}"
            )
        return np.asarray(tensor)

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("client: it was closed; open another one")


def _connect(url: str, tls: TlsOptions | None, *, use_proxy: bool) -> InferenceServerClient:
    """Return a client whose channel notices dead connections and reconnects as fast as we retry."""
    options: list[tuple[str, int | str]] = [
        ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        # Triton drops a connection that pings more than twice within 5 minutes without sending data.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 2),
        # gRPC's own second between attempts to connect would swallow our first retries.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.enable_http_proxy", int(use_proxy)),
    ]
    if tls is None:
        return InferenceServerClient(url, channel_args=options)
    if tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    try:
        credentials = grpc.ssl_channel_credentials(
            *(path.read_bytes() if path else None for path in (tls.root_certificates, tls.private_key)),
            tls.certificate_chain.read_bytes() if tls.certificate_chain else None,
        )
    except OSError as error:
        raise InputError(f"TLS: a file cannot be read any more: {error}") from error
    return InferenceServerClient(url, creds=credentials, channel_args=options)


def is_loopback(url: str) -> bool:
    """Say whether `url` is on this machine; InputError where it is no gRPC address."""
    if re.fullmatch(r"unix:\S+", url):
        return True
    match = re.fullmatch(r"(?:dns:///)?(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<host>[^\s:/\[\]]+)):(?P<port>\d{1,5})", url)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise InputError(f"url: got {url!r}, expected host:port of the gRPC endpoint, such as 127.0.0.1:8001")
    host = match["v6"] or match["host"]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _checked_headers(token: str | None, headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers to send; names the culprit, never its value, where gRPC would refuse one."""
    sent = {name.lower(): value for name, value in headers.items()}
    for name, value in sent.items():
        if not re.fullmatch(r"[0-9a-z_.-]+", name) or not re.fullmatch(r"[ -~]*", value):
            raise InputError(f"headers: got {name!r} with characters that cannot be sent, expected plain ASCII")
    if token is not None:
        if not re.fullmatch(r"[!-~]+", token):
            raise InputError("token: it is empty or holds blanks or non-ASCII characters; was a whole file passed?")
        sent["authorization"] = f"Bearer {token}"
    return sent


def _check_pem(what: str, path: Path, load: Callable[[Path], None]) -> None:
    try:
        if b"-----BEGIN " not in path.read_bytes():
            raise InputError(f"{what}: {path} is not in PEM format")
        load(path)
    except ssl.SSLError as error:  # an OSError, too
        raise InputError(f"{what}: {path} cannot be used: {error.reason or error}") from error
    except OSError as error:
        raise InputError(f"{what}: cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{what}: {path} cannot be used: {error}") from error


def _no_password() -> bytes:
    """Keep OpenSSL from asking on the terminal: gRPC cannot use an encrypted key either."""
    raise ValueError("the private key is encrypted, and gRPC takes only keys without a password")


def _image_input(images: NDArray[np.uint8]) -> InferInput:
    return InferInput("image", images.shape, "UINT8").set_data_from_numpy(images)


def _perturbations_input(images: NDArray[np.uint8]) -> InferInput:
    """One "perturbation" per image: the image itself."""
    pixels = images[:, np.newaxis].astype(np.float32)
    return InferInput("perturbations", pixels.shape, "FP32").set_data_from_numpy(pixels)


def _checked_images(images: NDArray[np.uint8], about: ModelMetadata) -> NDArray[np.uint8]:
    """Return (batch, height, width, channels) as the model takes it, or say what was expected."""
    expected = f"{about.model!r} takes uint8 of shape (batch, {', '.join(map(_side, about.image_shape))})"
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        got = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        raise DataError(f"images: got {got}, but {expected}, 0..255")
    batch = images[np.newaxis] if images.ndim == 3 else images
    if batch.ndim != 4 or any(
        want not in (-1, got) for got, want in zip(batch.shape[1:], about.image_shape, strict=True)
    ):
        raise DataError(f"images: got shape {images.shape}, but {expected}, or one image without the batch")
    if len(batch) == 0:
        raise DataError(f"images: got an empty batch, expected at least one image of shape {batch.shape[1:]}")
    return batch


def _side(length: int) -> str:
    return "any" if length < 0 else str(length)


def _listed(tensors: Any) -> str:
    return ", ".join(f"{tensor.name} {tensor.datatype} {list(tensor.shape)}" for tensor in tensors) or "none"


def _status_of(error: InferenceServerException) -> grpc.StatusCode:
    """Return the gRPC status of an error; INTERNAL where there is none."""
    name = str(error.status() or "").rpartition(".")[2]
    status: grpc.StatusCode = grpc.StatusCode.__members__.get(name, grpc.StatusCode.INTERNAL)
    if status is grpc.StatusCode.UNAVAILABLE:  # Triton's word for two refusals; trying again would not help
        if "protocol is restricted" in str(error.message()):
            return grpc.StatusCode.PERMISSION_DENIED
        if _NO_CONTROL in str(error.message()):
            return grpc.StatusCode.FAILED_PRECONDITION
    return status


def _is_unavailable(error: BaseException) -> bool:
    return isinstance(error, InferenceServerException) and _status_of(error) is grpc.StatusCode.UNAVAILABLE


def _is_unavailable_or_stopping(error: BaseException) -> bool:
    """Say so of a failed inference: a Triton that stops unloads its models, which are not found any more."""
    return _is_unavailable(error) or (
        isinstance(error, InferenceServerException)
        and _status_of(error) is grpc.StatusCode.NOT_FOUND
        and "has no available versions" in str(error.message())
    )
