"""Triton model `strip_verdict`: verdict and label, by the calibrated threshold."""

from typing import Any

import triton_python_backend_utils as pb_utils

from detector.serving import verdict_stage


class TritonPythonModel:
    """The interface that Triton's Python backend asks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Build the stage from the version folder; an error here keeps the model from loading."""
        self._stage = verdict_stage(args, pb_utils)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all requests of a batch."""
        return self._stage.execute(requests)

    def finalize(self) -> None:
        """Hand over what was counted last."""
        self._stage.close()
