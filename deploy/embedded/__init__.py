"""The `tritonserver` of the nvidia-pytriton wheel, run as a local server."""
