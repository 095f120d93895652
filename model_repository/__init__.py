"""The served graph: its contract, its manifest, and the Triton models that are written by hand."""
