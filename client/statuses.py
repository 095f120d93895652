"""What a gRPC status means: the error that a caller sees, and whether it is worth trying again."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import grpc
from tritonclient.utils import InferenceServerException

from detector.errors import (
    AccessDeniedError,
    DeadlineExceededError,
    RequestRejectedError,
    ServerError,
    ServerUnavailableError,
)

_NO_CONTROL = "explicit model load / unload is not allowed"  # what Triton says when nobody may

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


def status_of(error: InferenceServerException) -> grpc.StatusCode:
    """Return the gRPC status of an error; INTERNAL where there is none."""
    name = str(error.status() or "").rpartition(".")[2]
    status: grpc.StatusCode = grpc.StatusCode.__members__.get(name, grpc.StatusCode.INTERNAL)
    if status is grpc.StatusCode.UNAVAILABLE:  # Triton's word for two refusals; trying again would not help
        if "protocol is restricted" in str(error.message()):
            return grpc.StatusCode.PERMISSION_DENIED
        if _NO_CONTROL in str(error.message()):
            return grpc.StatusCode.FAILED_PRECONDITION
    return status


def is_unavailable(error: BaseException) -> bool:
    """Say whether it may pass by itself: what is tried again."""
    return isinstance(error, InferenceServerException) and status_of(error) is grpc.StatusCode.UNAVAILABLE


def is_unavailable_or_stopping(error: BaseException) -> bool:
    """Say so of a failed inference: a Triton that stops unloads its models, which are not found any more."""
    return is_unavailable(error) or (
        isinstance(error, InferenceServerException)
        and status_of(error) is grpc.StatusCode.NOT_FOUND
        and "has no available versions" in str(error.message())
    )


def translated(error: InferenceServerException, url: str, model: str, timeout_seconds: float) -> ServerError:
    """Return the error of ours that tells the user what happened and what to do."""
    status = status_of(error)
    said = error.message() or "no details"
    kind = ERROR_OF_STATUS[status]
    if kind is ServerUnavailableError:
        message = (
            f"the server is unavailable ({said}); if none runs there, start one with `stripwire serve`; if one "
            "does: is this its gRPC port, and does it ask for TLS, or not?"
        )
    elif kind is DeadlineExceededError:
        waited = f"{timeout_seconds:g} s"
        message = f"model {model!r} did not answer within {waited}; allow it more time (--timeout, timeout_seconds)"
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
        message = (
            f"the server has not loaded the model {model!r} ({said}); it is stopping, or serves no exported repository"
        )
    elif status is grpc.StatusCode.UNIMPLEMENTED:
        message = f"this is no Triton gRPC endpoint ({said}); check the port (Triton's is 8001 by default)"
    else:
        message = f"model {model!r} failed with {status.name}: {said}"
    return kind(f"{url}: {message}")
