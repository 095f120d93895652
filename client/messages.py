"""What is sent and what comes back: images checked and made into requests, answers checked and made into verdicts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferInput, InferRequestedOutput

from detector.errors import DataError, InputError, ServerError


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
        request_id: names the image: the id of the request that it was sent in, a dot, its row in it from 0. Feedback on
            the verdict is given under it.
    """

    label: int
    trojaned: bool
    entropy_bits: float
    p_value: float
    perturbations: int
    request_id: str


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
        request_ids: B of them, see `Verdict.request_id`.
    """

    labels: NDArray[np.int32]
    trojaned: NDArray[np.bool_]
    entropy_bits: NDArray[np.float32]
    p_values: NDArray[np.float32]
    perturbations: NDArray[np.int32]
    probabilities: NDArray[np.float32] | None
    classes: int
    request_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Verdict:
        return Verdict(
            label=int(self.labels[index]),
            trojaned=bool(self.trojaned[index]),
            entropy_bits=float(self.entropy_bits[index]),
            p_value=float(self.p_values[index]),
            perturbations=int(self.perturbations[index]),
            request_id=self.request_ids[index],
        )

    def __iter__(self) -> Iterator[Verdict]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class Output:
    """One output tensor: (batch, *shape) of `dtype`."""

    name: str
    dtype: type[np.generic]
    shape: tuple[int, ...]

    def read(self, answer: Any, count: int, url: str) -> NDArray[Any]:
        """Return the tensor of an answer, (count, *shape); ServerError where it is not what was asked for."""
        expected = f"{np.dtype(self.dtype)} of shape {(count, *self.shape)}"
        try:
            tensor = answer.as_numpy(self.name)
        except ValueError as error:  # fewer bytes than the shape says
            raise ServerError(f"{url}: output {self.name!r} is damaged ({error}), expected {expected}") from error
        if tensor is None:
            raise ServerError(f"{url}: the answer lacks output {self.name!r}, expected {expected}")
        if tensor.shape != (count, *self.shape) or tensor.dtype != self.dtype:
            raise ServerError(
                f"{url}: output {self.name!r}: got {tensor.dtype} of shape {tensor.shape}, expected {expected}"
            )
        return np.asarray(tensor)


VERDICT_OUTPUTS = (
    Output("label", np.int32, (1,)),
    Output("trojaned", np.bool_, (1,)),
    Output("entropy", np.float32, (1,)),
    Output("p_value", np.float32, (1,)),
    Output("perturbations", np.int32, (1,)),
)
"""What every verdict is made of."""


@dataclass(frozen=True)
class Request:
    """One batch, ready to be sent, and sent again.

    Attributes:
        model: whom it is for.
        id: of the request.
        input: the batch.
        count: how many images it holds.
        outputs: what is asked for.
        parameters: go with it.
    """

    model: str
    id: str
    input: InferInput
    count: int
    outputs: tuple[Output, ...]
    parameters: Mapping[str, bool]

    def arguments(self) -> dict[str, Any]:
        """Return what Triton's client takes."""
        return {
            "model_name": self.model,
            "inputs": [self.input],
            "outputs": [InferRequestedOutput(output.name) for output in self.outputs],
            "request_id": self.id,
            "parameters": dict(self.parameters) or None,
        }


def request_ids(given: str | None, batches: int) -> Iterator[str]:
    """Yield an id for each batch: the given one, numbered where there are several, or else random ones."""
    for number in range(batches):
        if given is None:
            yield uuid4().hex
        else:
            yield given if batches == 1 else f"{given}-{number}"


def check_request_id(request_id: str | None) -> None:
    """Raise InputError unless it can be a request's id; None, which stands for random ones, can."""
    if request_id is None:
        return
    if not isinstance(request_id, str) or not re.fullmatch(r"[A-Za-z0-9_.:-]{1,100}", request_id):
        raise InputError(
            f"request_id: got {request_id!r}, expected 1 to 100 letters, digits or any of _ . : -, or None for a "
            "random one"
        )


@dataclass(frozen=True)
class Contract:
    """What a model must have: one input of images, and an output with a number for each class."""

    input: str
    datatype: str
    output: str


GUARDED = Contract("image", "UINT8", "probabilities")
ORIGINAL = Contract("perturbations", "FP32", "sentinel_probabilities")


def described(model: str, told: Any, config: Any, expected: Contract, url: str) -> ModelMetadata:
    """Return what the server says about a model, whose metadata and configuration `told` and `config` are.

    Raises:
        ServerError: it is not what `expected` says.
    """
    inputs = {tensor.name: tensor for tensor in told.inputs}
    outputs = {tensor.name: tensor for tensor in told.outputs}
    image = inputs.get(expected.input)
    answer = outputs.get(expected.output)
    max_batch_size = int(config.max_batch_size)
    if (
        len(inputs) != 1
        or image is None
        or image.datatype != expected.datatype
        or len(image.shape) < 4
        or answer is None
        or answer.shape[-1] < 1
        or max_batch_size < 1
    ):
        raise ServerError(
            f"{url}: model {model!r} is not one of Stripwire's: got inputs {_listed(told.inputs)}, outputs "
            f"{_listed(told.outputs)}, max_batch_size {max_batch_size}; expected one {expected.datatype} input "
            f"{expected.input!r} of images, an output {expected.output!r} and batching"
        )
    height, width, channels = (int(side) for side in image.shape[-3:])
    return ModelMetadata(model, tuple(told.versions), (height, width, channels), int(answer.shape[-1]), max_batch_size)


def image_input(images: NDArray[np.uint8]) -> InferInput:
    """Return (batch, height, width, channels) as the guarded model takes it."""
    return InferInput("image", images.shape, "UINT8").set_data_from_numpy(images)


def perturbations_input(images: NDArray[np.uint8]) -> InferInput:
    """Return one "perturbation" per image: the image itself."""
    pixels = images[:, np.newaxis].astype(np.float32)
    return InferInput("perturbations", pixels.shape, "FP32").set_data_from_numpy(pixels)


def checked_images(images: NDArray[np.uint8], about: ModelMetadata) -> NDArray[np.uint8]:
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
