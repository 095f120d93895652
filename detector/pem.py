"""PEM files for TLS, checked before whoever uses them would say no more than that there is no connection."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

from cryptography import x509

from detector.errors import InputError

_T = TypeVar("_T")


def check_pem(what: str, path: Path, load: Callable[[Path], _T]) -> _T:
    """Check that a file can be used, and return what is read of it.

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
        return load(path)
    except ssl.SSLError as error:  # an OSError, too
        raise InputError(f"{what}: {path} cannot be used: {error.reason or error}") from error
    except OSError as error:
        raise InputError(f"{what}: cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{what}: {path} cannot be used: {error}") from error


def check_key_pair(context: ssl.SSLContext, key: Path, chain: Path, *, key_is: str, chain_is: str) -> None:
    """Check that a private key and a certificate chain can be used now, and belong together.

    Of the chain, only the certificate itself must be valid now: an issuer that is not may be one that nobody needs.

    Args:
        context: takes them.
        key: the private key, not encrypted.
        chain: the certificate, then its issuers.
        key_is: what the key is, for errors.
        chain_is: what the chain is, likewise.

    Raises:
        InputError: as `check_pem`; or the certificate has expired, or is not valid yet.
    """
    check_pem(key_is, key, lambda _: None)
    check_pem(chain_is, chain, lambda chain: context.load_cert_chain(chain, key, password=_no_password))
    certificate, now = check_pem(chain_is, chain, read_chain)[0], datetime.now(timezone.utc)
    if certificate.not_valid_after_utc < now:
        ended = f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        raise InputError(f"{chain_is}: {chain} expired on {ended}, expected one that is valid: have it renewed")
    if certificate.not_valid_before_utc > now:
        begins = f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        raise InputError(
            f"{chain_is}: {chain} is not valid before {begins}, and it is {now:%Y-%m-%d %H:%M} UTC by this machine's "
            "clock; is that right?"
        )


def read_chain(path: Path) -> list[x509.Certificate]:
    """Return the certificates in a PEM file, one at least, as they stand there.

    Raises:
        ValueError: there is none, or one is malformed.
        OSError: the file cannot be read.
    """
    return x509.load_pem_x509_certificates(path.read_bytes())


def _no_password() -> bytes:
    """Keep OpenSSL from asking on the terminal: gRPC, in client and Triton, cannot use an encrypted key either."""
    raise ValueError("the private key is encrypted, and gRPC takes only keys without a password")
