"""PEM files for TLS, checked before whoever uses them would say no more than that there is no connection."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

from detector.errors import InputError


def check_pem(what: str, path: Path, load: Callable[[Path], object]) -> None:
    """Check that a file can be used.

    Args:
        what: the file is, for errors.
        path: of the file.
        load: has OpenSSL read it.

    Raises:
        InputError: it is missing, no PEM, or OpenSSL refuses it.
    """
    try:
        if b"-----BEGIN " not in path.read_bytes():
            raise InputError(f"{what}: {path} is not in PEM format")
        load(path)
    except ssl.SSLError as error:  # an OSError, too
        raise InputError(f"{what}: {path} cannot be used: {error.reason or error}") from error
    except OSError as error:
        raise InputError(f"{what}: cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{what}: {path} cannot be used: {error}") from error


def no_password() -> bytes:
    """Keep OpenSSL from asking on the terminal: gRPC, in client and Triton, cannot use an encrypted key either."""
    raise ValueError("the private key is encrypted, and gRPC takes only keys without a password")
