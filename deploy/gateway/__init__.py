"""Envoy before Triton: requests to the guarded model come through, and no others."""
