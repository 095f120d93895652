"""Finds the model that is broken.

Triton goes on calling a model ready whose process has died, and the ensemble's error need not tell which it was. So
each model behind the ensemble is asked by itself, in their order, with what those before it have answered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.utils import np_to_triton_dtype

from client.api import GuardedClient
from client.control import ENSEMBLE
from detector.errors import AccessDeniedError, DeadlineExceededError, ServerError, ServerUnavailableError
from detector.live_metrics import CANARY_KEY

_DIED = "is not healthy"  # what Triton says of a model whose process has died
_ABSENT = "has not loaded the model"  # what our client says of a model that the server does not have


@dataclass(frozen=True)
class Broken:
    """A model that does not do its part.

    Attributes:
        model: its name.
        reason: one of `client.monitor.metrics.RELOAD_REASONS`.
        why: the error's own words.
    """

    model: str
    reason: str
    why: str


def find_broken(client: GuardedClient, image: NDArray[np.uint8]) -> Broken | None:
    """Return the first model behind the ensemble that fails; None where each of them answers.

    Args:
        client: a client of the server.
        image: (1, height, width, channels), uint8: what to ask about.

    Raises:
        ServerUnavailableError, DeadlineExceededError, AccessDeniedError: nothing can be said of the models: the server
            is away, it is too slow (or hangs), or does not let us ask.
    """
    try:
        config: Any = client.ask(ENSEMBLE, lambda triton, **options: triton.get_model_config(ENSEMBLE, **options))
    except ServerError as error:
        return _broken(ENSEMBLE, error)
    tensors: dict[str, NDArray[Any]] = {"image": image}
    steps = list(config.config.ensemble_scheduling.step)
    while steps:
        able = [step for step in steps if all(tensor in tensors for tensor in step.input_map.values())]
        if not able:
            names = ", ".join(step.model_name for step in steps)
            raise ServerError(f"{ENSEMBLE}: nothing feeds {names}; was the server started on a repository of ours?")
        for step in able:
            try:
                tensors |= _answer(client, step, tensors)
            except ServerError as error:
                return _broken(step.model_name, error)
            steps.remove(step)
    return None


def _answer(client: GuardedClient, step: Any, tensors: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return what one step of the ensemble makes of the tensors, by their names in the ensemble."""
    inputs = []
    for name, tensor in step.input_map.items():
        array = tensors[tensor]
        given = InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        inputs.append(given.set_data_from_numpy(array))
    outputs = [InferRequestedOutput(name) for name in step.output_map]
    version = str(step.model_version) if step.model_version > 0 else ""
    model: str = step.model_name
    answer: Any = client.ask(
        model,
        lambda triton, **options: triton.infer(
            model, inputs, model_version=version, outputs=outputs, parameters={CANARY_KEY: True}, **options
        ),
    )
    found = {tensor: answer.as_numpy(name) for name, tensor in step.output_map.items()}
    if absent := [tensor for tensor, array in found.items() if array is None]:
        raise ServerError(f"{model}: the answer lacks {', '.join(absent)}")
    return found


def _broken(model: str, error: ServerError) -> Broken:
    if isinstance(error, (ServerUnavailableError, DeadlineExceededError, AccessDeniedError)):
        raise error
    said = str(error)
    reason = "died" if _DIED in said else "absent" if _ABSENT in said else "failed"
    return Broken(model, reason, said)
