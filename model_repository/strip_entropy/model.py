"""Triton model `strip_entropy`: STRIP entropy of the sentinel's predictions, in bits."""

from typing import Any

import triton_python_backend_utils as pb_utils

from detector.serving import entropy_stage


class TritonPythonModel:
    """The interface that Triton's Python backend asks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Build the stage from the version folder; an error here keeps the model from loading."""
        self._stage = entropy_stage(args, pb_utils)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all requests of a batch."""
        return self._stage.execute(requests)
