"""When the certificates end: the one that the server shows, and the monitor's own."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from urllib.parse import urlsplit

from cryptography import x509
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from client.connection import TlsOptions
from client.monitor.logs import log
from detector.errors import InputError
from detector.pem import check_pem, read_chain

_TIMEOUT_SECONDS = 2.0
_AGAIN_SECONDS = 600.0
_AGAIN_IN_VAIN_SECONDS = 60.0


class CertificateCollector(Collector):
    """Looks at the certificates when it is asked: at the server's every ten minutes at most.

    Args:
        url: `host:port` of the server's gRPC endpoint. Of several addresses that a name has, the first that answers is
            asked; no proxy is.
        tls: how the monitor reaches it.
        clock: seconds that never jump.
    """

    def __init__(self, url: str, tls: TlsOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._tls = tls
        self._clock = clock
        self._lock = threading.Lock()
        self._shown: datetime | None = None
        self._look_at = clock()
        self._troubles: dict[str, str] = {}

    def collect(self) -> Iterator[Metric]:
        """Yield `stripwire_certificate_not_after_seconds`; nothing of a certificate that cannot be read."""
        with self._lock:
            if self._clock() >= self._look_at:
                self._shown = self._read("server", lambda: _shown_by(self._url, self._tls.server_name))
                self._look_at = self._clock() + (_AGAIN_SECONDS if self._shown else _AGAIN_IN_VAIN_SECONDS)
            ends = {"server": self._shown}
            chain = self._tls.certificate_chain
            if chain is not None:
                # An issuer that ends first ends them all.
                ends["client"] = self._read(
                    "client",
                    lambda: min(one.not_valid_after_utc for one in check_pem("certificate chain", chain, read_chain)),
                )
        family = GaugeMetricFamily(
            "stripwire_certificate_not_after_seconds",
            "When the server's certificate, or the monitor's own, ends, seconds since 1970.",
            labels=("certificate",),
        )
        for name, end in ends.items():
            if end is not None:
                family.add_metric((name,), end.timestamp())
        yield family

    def _read(self, name: str, read: Callable[[], datetime]) -> datetime | None:
        """Return when a certificate ends; None where that cannot be read, which is logged once for each reason."""
        end, trouble = None, ""
        try:
            end = read()
        except (OSError, ValueError) as error:
            trouble = str(error) or type(error).__name__
        if trouble not in ("", self._troubles.get(name)):
            log(logging.WARNING, "nobody knows when a certificate ends", certificate=name, why=trouble)
        self._troubles[name] = trouble
        return end


def _shown_by(url: str, server_name: str | None) -> datetime:
    """Return when the certificate ends that is shown at `url` in the handshake of TLS."""
    place = urlsplit(f"//{url}")
    if place.hostname is None or place.port is None:
        raise InputError(f"url: got {url}, expected host:port: only there is the server's certificate looked at")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # whoever trusts it, it ends
    context.set_alpn_protocols(["h2"])  # without which gRPC hangs up
    # By TLS 1.3 the server shows its certificate before it sees that we have none.
    with (
        socket.create_connection((place.hostname, place.port), _TIMEOUT_SECONDS) as plain,
        context.wrap_socket(plain, server_hostname=server_name or place.hostname) as encrypted,
    ):
        shown = encrypted.getpeercert(binary_form=True)
    if shown is None:
        raise ValueError("the server shows no certificate")
    return x509.load_der_x509_certificate(shown).not_valid_after_utc
