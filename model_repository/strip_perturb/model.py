"""Triton model `strip_perturb`: blends every image with every overlay."""

from typing import Any

import triton_python_backend_utils as pb_utils

from detector.serving import perturb_stage


class TritonPythonModel:
    """The interface that Triton's Python backend asks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Build the stage from the version folder; an error here keeps the model from loading."""
        self._stage = perturb_stage(args, pb_utils)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all requests of a batch."""
        return self._stage.execute(requests)
