"""Takes the entropy of one prediction after the other."""

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """What Triton loads."""

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer one request after the other."""
        responses = []
        for request in requests:
            predictions = pb_utils.get_input_tensor_by_name(request, "sentinel_probabilities").as_numpy()[0]
            entropies = [-np.nansum(row * np.log2(row)) for row in predictions]
            tensor = pb_utils.Tensor("sentinel_entropies", np.array([[np.mean(entropies)]], np.float32))
            responses.append(pb_utils.InferenceResponse([tensor]))
        return responses
