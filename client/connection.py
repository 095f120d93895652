"""How to reach a server: its address, TLS, what is sent along with every request, and how the channel behaves."""

from __future__ import annotations

import ipaddress
import json
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from detector.errors import InputError
from detector.pem import check_key_pair, check_pem


@dataclass(frozen=True)
class TlsOptions:
    """How to trust the server, and how to prove who we are. All files are PEM.

    Attributes:
        root_certificates: the authorities to trust; None trusts those that gRPC brings along.
        private_key: our key, not encrypted, for mutual TLS; goes with `certificate_chain`.
        certificate_chain: our certificate, then its issuers.
        server_name: the name to expect in the server's certificate, where it is not the address (a port-forward).

    Raises:
        InputError: a file is missing or no PEM, key and certificate do not match, one comes without the other, or our
            certificate has expired or is not valid yet.
    """

    root_certificates: Path | None = None
    private_key: Path | None = None
    certificate_chain: Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.private_key is None) != (self.certificate_chain is None):
            raise InputError("TLS: got one of private key and certificate chain, expected both (mutual TLS) or neither")
        # OpenSSL checks here what gRPC would report much later as "no connection".
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.root_certificates is not None:
            check_pem("root certificates", self.root_certificates, context.load_verify_locations)
        if self.private_key is not None and self.certificate_chain is not None:
            check_key_pair(
                context,
                self.private_key,
                self.certificate_chain,
                key_is="private key",
                chain_is=f"certificate chain (with private key {self.private_key})",
            )


@dataclass(frozen=True)
class Target:
    """Whom a gRPC address means, see `read_target`.

    Attributes:
        url: the address.
        is_local: whether it is on this machine, with all its addresses.
        is_balanced: whether it may be several servers, which take turns.
        has_name: whether it holds the one name that TLS looks for in a certificate.
        allows_proxy: whether an HTTP proxy of the environment, such as `https_proxy`, is to connect.
    """

    url: str
    is_local: bool
    is_balanced: bool
    has_name: bool
    allows_proxy: bool


def read_target(url: str) -> Target:
    """Return whom `url` means.

    Args:
        url: `host:port`, `[address]:port` or `unix:/path`. Or several servers: `dns:///name:port`, where the name has
            an address for each, or all addresses, `ipv4:address:port,address:port` and `ipv6:[address]:port,…`.

    Raises:
        InputError: it is no gRPC address.
    """
    if re.fullmatch(r"unix:\S+", url):
        return Target(url, is_local=True, is_balanced=False, has_name=True, allows_proxy=False)
    scheme = match[0] if (match := re.match(r"dns://[^\s/]*/|ipv[46]:", url)) else ""
    is_list = scheme in _FAMILIES
    rest = url.removeprefix(scheme)
    hosts = [_host(url, scheme, address) for address in (rest.split(",") if is_list else [rest])]
    # Whom another name server calls localhost is for that one to say.
    is_local = all(is_loopback(host, name_is_ours=scheme in ("", "dns:///")) for host in hosts)
    return Target(
        url,
        is_local,
        is_balanced=scheme.startswith("dns:") or len(hosts) > 1,
        has_name=len(hosts) == 1,
        allows_proxy=not is_local and not is_list,
    )


_ADDRESS = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<host>[^\s:/,\[\]]+)):(?P<port>\d{1,5})")
_FAMILIES = {"ipv4:": ipaddress.IPv4Address, "ipv6:": ipaddress.IPv6Address}


def _host(url: str, scheme: str, address: str) -> str:
    """Return the host of one of the addresses in `url`."""
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise InputError(f"url: got {url!r}, expected host:port of the gRPC endpoint, such as 127.0.0.1:8001")
    host: str = match["v6"] or match["host"]
    if scheme in _FAMILIES:
        try:
            _FAMILIES[scheme](host)
        except ValueError as error:
            raise InputError(f"url: got {url!r}, expected addresses alone after {scheme} ({error})") from None
    return host


def is_loopback(host: str, *, name_is_ours: bool = True) -> bool:
    """Say whether a host, a name or an address, is this machine; `localhost` is where we look the name up ourselves."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" and name_is_ours


_MAX_MESSAGE_BYTES = 2**31 - 1  # Triton's own limit
_ROUND_ROBIN = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})


def triton_options(target: Target, tls: TlsOptions | None) -> dict[str, Any]:
    """Return what Triton's client takes for a channel that notices dead connections and reconnects as fast as we retry.

    Raises:
        InputError: a file of TLS is gone.
    """
    options: list[tuple[str, int | str]] = [
        ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        # Triton drops a connection that pings more than twice within 5 minutes without sending data.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 2),
        # gRPC's own second between attempts to connect would swallow our first retries.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.enable_http_proxy", int(target.allows_proxy)),
    ]
    if target.is_balanced:
        options.append(("grpc.service_config", _ROUND_ROBIN))
        # gRPC's own half a minute between questions to the name server would outlast our retries.
        options.append(("grpc.dns_min_time_between_resolutions_ms", 1_000))
    if tls is None:
        return {"url": target.url, "channel_args": options}
    if tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    try:
        credentials = grpc.ssl_channel_credentials(
            *(path.read_bytes() if path else None for path in (tls.root_certificates, tls.private_key)),
            tls.certificate_chain.read_bytes() if tls.certificate_chain else None,
        )
    except OSError as error:
        raise InputError(f"TLS: a file cannot be read any more: {error}") from error
    return {"url": target.url, "creds": credentials, "channel_args": options}


def checked_headers(token: str | None, headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers to send; names the culprit, never its value, where gRPC would refuse one."""
    sent = {name.lower(): value for name, value in headers.items()}
    for name, value in sent.items():
        if not re.fullmatch(r"[0-9a-z_.-]+", name) or not re.fullmatch(r"[ -~]*", value):
            raise InputError(f"headers: got {name!r} with characters that cannot be sent, expected plain ASCII")
    if token is not None:
        if not re.fullmatch(r"[!-~]+", token):
            raise InputError("token: it is empty or holds blanks or non-ASCII characters; was a whole file passed?")
        sent["authorization"] = f"Bearer {token}"
    return sent
