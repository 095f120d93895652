"""Compares one entropy after the other with the threshold."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """What Triton loads."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the threshold."""
        file = Path(args["model_repository"]) / args["model_version"] / "calibration.json"
        self.threshold = json.loads(file.read_text())["threshold_bits"]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer one request after the other."""
        responses = []
        for request in requests:
            entropy = pb_utils.get_input_tensor_by_name(request, "sentinel_entropies").as_numpy()
            probabilities = pb_utils.get_input_tensor_by_name(request, "repaired_probabilities").as_numpy()
            trojaned = entropy <= self.threshold
            label = np.where(trojaned, probabilities.shape[-1], probabilities.argmax(axis=-1)[:, None])
            responses.append(
                pb_utils.InferenceResponse(
                    [
                        pb_utils.Tensor("label", label.astype(np.int32)),
                        pb_utils.Tensor("trojaned", trojaned),
                        pb_utils.Tensor("entropy", entropy),
                    ]
                )
            )
        return responses
