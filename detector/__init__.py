"""STRIP itself: pure maths, calibration, and what the Triton models delegate to."""
