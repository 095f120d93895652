"""A typed stand-in for Triton's `triton_python_backend_utils`: unlike a mock it has no attribute that was misspelt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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

    def requested_output_names(self) -> list[str]:
        return list(self.outputs)


@dataclass(frozen=True)
class InferenceResponse:
    """A response with named outputs."""

    output_tensors: Sequence[Tensor]

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {tensor.name(): tensor.as_numpy() for tensor in self.output_tensors}


@dataclass(frozen=True)
class PbUtils:
    """What of the module the stages use."""

    Tensor: type = Tensor
    InferenceResponse: type = InferenceResponse

    def get_input_tensor_by_name(self, request: InferenceRequest, name: str) -> object:
        return next((tensor for tensor in request.inputs if tensor.name() == name), None)


def request(outputs: Sequence[str], **inputs: Any) -> InferenceRequest:
    """Return a request for `outputs` with the arrays given by name."""
    return InferenceRequest([Tensor(name, np.asarray(array)) for name, array in inputs.items()], outputs)
