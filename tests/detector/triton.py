"""A typed stand-in for Triton's `triton_python_backend_utils`: unlike a mock it has no attribute that was misspelt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Tensor:
    """A tensor on the CPU."""

    tensor_name: str
    array: NDArray[Any]

    def name(self) -> str:
        return self.tensor_name

    def is_cpu(self) -> bool:
        return True

    def as_numpy(self) -> NDArray[Any]:
        return self.array


@dataclass(frozen=True)
class InferenceRequest:
    """A request with named inputs."""

    inputs: Sequence[Tensor]
    outputs: Sequence[str]
    sent: str = ""
    name: str = ""

    def request_id(self) -> str:
        """Return what the caller named it, or nothing."""
        return self.name

    def parameters(self) -> str:
        """Return the request's parameters, JSON, or nothing where there are none."""
        return self.sent

    def requested_output_names(self) -> list[str]:
        return list(self.outputs)


@dataclass(frozen=True)
class InferenceResponse:
    """A response with named outputs."""

    output_tensors: Sequence[Tensor]

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {tensor.name(): tensor.as_numpy() for tensor in self.output_tensors}


@dataclass
class Metric:
    """A metric, and what it was set or incremented to."""

    labels: dict[str, str]
    value: float = 0.0

    def increment(self, value: float) -> None:
        self.value += value

    def set(self, value: float) -> None:
        self.value = value


class MetricFamily:
    """A family of metrics; all of them are in `made`, by name."""

    COUNTER, GAUGE = "counter", "gauge"
    made: ClassVar[dict[str, MetricFamily]] = {}

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.description, self.kind, self.metrics = description, kind, list[Metric]()
        self.made[name] = self

    def Metric(self, labels: dict[str, str]) -> Metric:  # noqa: N802  as Triton has it
        self.metrics.append(Metric(labels))
        return self.metrics[-1]


@dataclass(frozen=True)
class PbUtils:
    """What of the module the stages use."""

    Tensor: type = Tensor
    InferenceResponse: type = InferenceResponse
    MetricFamily: type = MetricFamily

    def get_input_tensor_by_name(self, request: InferenceRequest, name: str) -> object:
        return next((tensor for tensor in request.inputs if tensor.name() == name), None)


def request(outputs: Sequence[str], sent: str = "", request_id: str = "", **inputs: Any) -> InferenceRequest:
    """Return a request for `outputs` with the arrays given by name, and with parameters."""
    tensors = [Tensor(name, np.asarray(array)) for name, array in inputs.items()]
    return InferenceRequest(tensors, outputs, sent, request_id)
