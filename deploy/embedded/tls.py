"""How an embedded server encrypts gRPC, and whom it lets in."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from detector.errors import InputError
from detector.pem import check_key_pair, check_pem


@dataclass(frozen=True)
class ServerTls:
    """How the server proves who it is, and whom it lets in. All files are PEM.

    Attributes:
        certificate: the server's certificate, then its issuers.
        key: the private key that belongs to it, not encrypted.
        client_authorities: who must have signed a caller's certificate (mutual TLS); None lets everybody in.

    Raises:
        InputError: a file is missing or cannot be used, key and certificate do not match, or the certificate has
            expired or is not valid yet. Triton would start all the same, and answer nobody.
    """

    certificate: Path
    key: Path
    client_authorities: Path | None = None

    def __post_init__(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        chain_is = f"TLS certificate (with key {self.key})"
        check_key_pair(context, self.key, self.certificate, key_is="TLS key", chain_is=chain_is)
        if self.client_authorities is not None:
            check_pem("TLS client authorities", self.client_authorities, context.load_verify_locations)

    @property
    def options(self) -> list[str]:
        """The options of `tritonserver`."""
        options = [
            "--grpc-use-ssl=true",
            f"--grpc-server-cert={self.certificate.resolve()}",
            f"--grpc-server-key={self.key.resolve()}",
        ]
        if self.client_authorities is not None:
            options += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={self.client_authorities.resolve()}"]
        return options


def server_tls(certificate: Path | None, key: Path | None, client_authorities: Path | None) -> ServerTls | None:
    """Return what the given files say; None, plaintext, if there are none.

    Raises:
        InputError: one comes without the others that it needs, or cannot be used.
    """
    if certificate is None and key is None and client_authorities is None:
        return None
    if certificate is None or key is None:
        raise InputError(
            "TLS: expected the server's certificate and its key (--tls-cert, --tls-key); --tls-client-ca needs both"
        )
    return ServerTls(certificate, key, client_authorities)
