"""Runs the command line: `stripwire`, or `python -m stripwire`."""

from __future__ import annotations

import sys

_EXTRAS = {
    "tensorflow": "exporter",
    "keras": "exporter",
    "tf2onnx": "exporter",
    "onnx": "exporter",
    "onnxruntime": "exporter",
    "tritonclient": "client",
    "grpc": "client",
    "tenacity": "client",
    "prometheus_client": "client",
    "httpx": "client",
    "pydantic_settings": "client",
    "starlette": "client",
    "uvicorn": "client",
    "psutil": "embedded",
}


def main() -> None:
    """Run the command line; an error that Stripwire knows ends it with one message and no traceback."""
    try:
        _run()
    except (Exception, KeyboardInterrupt) as error:
        if not _was_interrupted(error):
            raise
        sys.exit(130)


def _run() -> None:
    try:
        from detector.errors import InputError, StripwireError
        from stripwire.app import app
        from stripwire.terminal import fail
    except ModuleNotFoundError as error:
        sys.exit(f"error: the command line needs {error.name}: pip install 'stripwire[all]' (or a part of it)")
    try:
        app()
    except StripwireError as error:
        fail(str(error), 2 if isinstance(error, InputError) else 1)
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".", maxsplit=1)[0]
        fail(f"{name} is not installed: pip install 'stripwire[{_EXTRAS.get(name, 'all')}]'", 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}", 1)


def _was_interrupted(error: BaseException | None) -> bool:
    """Say whether Ctrl-C is behind an error: of what NumPy, say, makes of it while it is imported."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


if __name__ == "__main__":
    main()
