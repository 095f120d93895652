"""The monitor: canaries, feedback and health by inference, as an HTTP service beside the server."""
