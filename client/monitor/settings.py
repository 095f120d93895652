"""What the monitor is told: by flags, or by environment variables `STRIPWIRE_…`; checked once, at the edge."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any

import httpx
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from client.api import TlsOptions
from detector.errors import InputError
from detector.serving import CONTROL_RULE, is_control_token

_PREFIX = "STRIPWIRE_"

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class MonitorSettings(BaseSettings):
    """The settings of one monitor. What is given outright wins over the environment.

    No setting is called host or port: Kubernetes puts `STRIPWIRE_PORT=tcp://…` into the environment of every pod beside
    a service that is called stripwire.
    """

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid", use_attribute_docstrings=True
    )

    canaries: Path
    """Canary file, see `samples.canaries`; or the model repository that is served, whose active version's is taken."""

    record: Path = Path("stripwire-feedback.sqlite")
    """The record of feedback; made if there is none. On a disk that outlives the monitor."""

    quarantine: Path | None = None
    """Folder where the server keeps rejected inputs, its `STRIPWIRE_QUARANTINE`; who may give feedback sees them."""

    metrics_url: str | None = None
    """Triton's metrics, such as http://127.0.0.1:8002/metrics; with them, the monitor tells how far entropies drift."""

    listen: str = "127.0.0.1:8003"
    """`host:port` to listen on, `[address]:port` for IPv6; port 0 for a free one."""

    url: str = "127.0.0.1:8001"
    """`host:port` of the server's gRPC endpoint."""

    canaries_per_minute: float = Field(default=60.0, gt=0, le=6_000, allow_inf_nan=False)
    """How many canaries are sent, one at a time."""

    timeout_seconds: Seconds = 5.0
    """Longest wait for the answer to one canary."""

    reload_timeout_seconds: Seconds = 120.0
    """Longest wait for a broken model to load again."""

    dead_after_seconds: Seconds = 120.0
    """How long canaries may fail before the server is taken to be dead, and liveness fails."""

    token: SecretStr | None = None
    """Sent to the server as `authorization: Bearer`."""

    control_token: SecretStr | None = None
    """Lets the monitor load models again; without it, and none found, a broken model fails liveness at once."""

    feedback_token: SecretStr | None = None
    """What a caller must know to give feedback, 16 characters or more; without it, nobody can."""

    tls: bool = False
    """Encrypt the connection to the server."""

    tls_ca: Path | None = None
    """PEM file of the authorities to trust; turns TLS on."""

    tls_key: Path | None = None
    """Our private key (PEM), for mutual TLS."""

    tls_cert: Path | None = None
    """Our certificate chain (PEM), for mutual TLS."""

    @field_validator("listen")
    @classmethod
    def _is_an_address(cls, listen: str) -> str:
        _split(listen)
        return listen

    @field_validator("feedback_token")
    @classmethod
    def _is_long_enough(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None and not re.fullmatch(r"[!-~]{16,}", token.get_secret_value()):
            raise ValueError("at least 16 printable ASCII characters without blanks")
        return token

    @field_validator("control_token")
    @classmethod
    def _is_one_that_a_server_can_have(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None and not is_control_token(token.get_secret_value()):
            raise ValueError(CONTROL_RULE)
        return token

    @field_validator("metrics_url")
    @classmethod
    def _is_a_url(cls, url: str | None) -> str | None:
        try:
            usable = url is None or (httpx.URL(url).scheme in ("http", "https") and httpx.URL(url).host != "")
        except httpx.InvalidURL:
            usable = False
        if not usable:
            raise ValueError("a URL such as http://127.0.0.1:8002/metrics")
        return url

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen on."""
        return _split(self.listen)

    @property
    def tls_options(self) -> TlsOptions | None:
        """How to trust the server; None is plaintext."""
        if not self.tls and self.tls_ca is None and self.tls_key is None and self.tls_cert is None:
            return None
        return TlsOptions(self.tls_ca, self.tls_key, self.tls_cert)


def read_settings(**given: Any) -> MonitorSettings:
    """Return the settings from what is given, and the environment for what is not.

    Args:
        given: fields of `MonitorSettings`; None is not given.

    Raises:
        InputError: a setting is missing or cannot be used; the message names all of them, and no secret.
    """
    try:
        return MonitorSettings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise InputError("\n".join(_told(problem) for problem in error.errors(include_url=False))) from None


def _told(problem: Any) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else "settings"
    where = f"{name.replace('_', ' ')}: "
    remedy = f" (--{name.removesuffix('_seconds').replace('_', '-')} or {_PREFIX}{name.upper()})"
    if problem["type"] == "missing":
        return f"{where}got nothing, expected a value{remedy}"
    expected = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    got = "" if "token" in name else f"got {problem['input']!r}, "
    return f"{where}{got}expected {expected}{remedy}"


def _split(listen: str) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<host>[^\s:/\[\]]+)):(?P<port>\d{1,5})", listen)
    if match is None or int(match["port"]) > 65535:
        raise ValueError("host:port such as 127.0.0.1:8003, port 0 for a free one")
    if match["v6"] is not None:
        ipaddress.ip_address(match["v6"])
    return match["v6"] or match["host"], int(match["port"])
