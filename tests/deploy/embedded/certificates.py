"""The certificates that the embedded server and its callers are tried with."""

from __future__ import annotations

from pathlib import Path

from tests.certificates import OpenSsl

_LOCAL = "subjectAltName=DNS:localhost,IP:127.0.0.1\n"
_ELSEWHERE = "subjectAltName=DNS:elsewhere.test\n"


def write_certificates(folder: Path) -> None:
    """Write authorities `ca` and `foreign`, and certificates with their keys.

    `server` and `client` are for this machine and signed by `ca`; `expired` was valid in 2024; `elsewhere` is
    for another machine; `stranger` is signed by `foreign`. `locked.key` is encrypted.
    """
    openssl = OpenSsl(folder)
    for authority in ("ca", "foreign"):
        openssl.write_authority(authority)
    for name in ("server", "client"):
        openssl.write_signed(name, _LOCAL)
    openssl.write_signed("elsewhere", _ELSEWHERE)
    openssl.write_signed("stranger", _LOCAL, "foreign")
    openssl.write_request("expired", _LOCAL)
    openssl.run(
        *("ca", "-batch", "-notext", "-config", _config(folder), "-in", "expired.csr", "-out", "expired.crt"),
        *("-cert", "ca.crt", "-keyfile", "ca.key", "-extfile", "expired.ext"),
        *("-startdate", "20240101000000Z", "-enddate", "20240102000000Z"),
    )
    openssl.write_locked("server")


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
