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


def check_key_pair(context: ssl.SSLContext, key: Path, chain: Path, *, key_is: str, chain_is: str) -> None:
    """Check that a private key and a certificate chain can be used, and belong together; raises as `check_pem` does.

    Args:
        context: takes them.
        key: the private key, not encrypted.
        chain: the certificate, then its issuers.
        key_is: what the key is, for errors.
        chain_is: what the chain is, likewise.
    """
    check_pem(key_is, key, lambda _: None)
    check_pem(chain_is, chain, lambda chain: context.load_cert_chain(chain, key, password=_no_password))


def _no_password() -> bytes:
    """Keep OpenSSL from asking on the terminal: gRPC, in client and Triton, cannot use an encrypted key either."""
    raise ValueError("the private key is encrypted, and gRPC takes only keys without a password")
