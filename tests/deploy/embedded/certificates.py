"""The certificates that the embedded server and its callers are tried with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tests.certificates import OpenSsl

_T = TypeVar("_T")

_LOCAL = "subjectAltName=DNS:localhost,IP:127.0.0.1\n"
_ELSEWHERE = "subjectAltName=DNS:elsewhere.test\n"


def write_certificates(folder: Path) -> None:
    """Write authorities `ca` and `foreign`, and certificates with their keys.

    `server` and `client` are for this machine and signed by `ca`; `expired` was valid on the first of January 2024, and
    `early` will be on that of 2099; `elsewhere` is for another machine; `stranger` is signed by `foreign`. `locked.key`
    is encrypted.
    """
    openssl = OpenSsl(folder)
    for authority in ("ca", "foreign"):
        openssl.write_authority(authority)
    for name in ("server", "client"):
        openssl.write_signed(name, _LOCAL)
    openssl.write_signed("elsewhere", _ELSEWHERE)
    openssl.write_signed("stranger", _LOCAL, "foreign")
    for name, year in (("expired", 2024), ("early", 2099)):
        openssl.write_request(name, _LOCAL)
        openssl.run(
            *("ca", "-batch", "-notext", "-config", _config(folder), "-in", f"{name}.csr", "-out", f"{name}.crt"),
            *("-cert", "ca.crt", "-keyfile", "ca.key", "-extfile", f"{name}.ext"),
            *("-startdate", f"{year}0101000000Z", "-enddate", f"{year}0102000000Z"),
        )
    openssl.write_locked("server")


def unchecked(folder: Path, name: str, use: Callable[[Path, Path], _T]) -> _T:
    """Return what `use` makes of a key and a certificate that our own check would refuse.

    When they are checked, those of the server lie there; when they are read, those of that name.
    """
    files = {suffix: folder / f"unchecked-{name}.{suffix}" for suffix in ("key", "crt")}
    for suffix, file in files.items():
        shutil.copy(folder / f"server.{suffix}", file)
    made = use(files["key"], files["crt"])
    for suffix, file in files.items():
        shutil.copy(folder / f"{name}.{suffix}", file)
    return made


def _config(folder: Path) -> str:
    """Return what `openssl ca`, which alone writes dates in the past, wants to know."""
    (folder / "index.txt").write_text("")
    (folder / "openssl.cnf").write_text(
        "[ca]\ndefault_ca = tests\n"
        "[tests]\ndatabase = index.txt\nnew_certs_dir = .\nrand_serial = yes\ndefault_md = sha256\npolicy = any\n"
        "unique_subject = no\n"
        "[any]\ncommonName = supplied\n"
    )
    return "openssl.cnf"
