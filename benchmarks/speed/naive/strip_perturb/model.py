"""Blends one image with one overlay after the other."""

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """What Triton loads."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the overlays."""
        with np.load(Path(args["model_repository"]) / args["model_version"] / "overlays.npz") as stored:
            self.overlays, self.alpha = stored["overlays"], float(stored["alpha"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer one request after the other."""
        responses = []
        for request in requests:
            image = pb_utils.get_input_tensor_by_name(request, "image").as_numpy()[0]
            blends = [self.alpha * image + (1 - self.alpha) * overlay for overlay in self.overlays]
            tensor = pb_utils.Tensor("perturbations", np.stack(blends).astype(np.float32)[None])
            responses.append(pb_utils.InferenceResponse([tensor]))
        return responses
