"""Throw-away certificates, by the openssl command."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.conftest import skip_or_fail

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
_LOCAL = "subjectAltName=DNS:localhost,IP:127.0.0.1\n"
_ELSEWHERE = "subjectAltName=DNS:elsewhere.test\n"


def write_certificates(folder: Path) -> None:
    """Write authorities `ca` and `foreign`, and certificates with their keys.

    `server` and `client` are for this machine and signed by `ca`; `expired` was valid in 2024; `elsewhere` is
    for another machine; `stranger` is signed by `foreign`. `locked.key` is encrypted.
    """
    openssl = shutil.which("openssl")
    if openssl is None:
        skip_or_fail("needs the openssl command")

    def run(*arguments: str) -> None:
        subprocess.run([str(openssl), *arguments], cwd=folder, check=True, capture_output=True)

    for authority in ("ca", "foreign"):
        subject = ("-subj", f"/CN={authority} of the tests", "-days", "2")
        run("req", "-x509", *_KEY, "-keyout", f"{authority}.key", "-out", f"{authority}.crt", *subject)
    (folder / "index.txt").write_text("")
    signed = {
        "server": ("ca", _LOCAL),
        "client": ("ca", _LOCAL),
        "expired": ("ca", _LOCAL),
        "elsewhere": ("ca", _ELSEWHERE),
        "stranger": ("foreign", _LOCAL),
    }
    for name, (authority, names) in signed.items():
        (folder / f"{name}.ext").write_text(names)
        run("req", *_KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        dates = (
            ("-startdate", "20240101000000Z", "-enddate", "20240102000000Z") if name == "expired" else ("-days", "2")
        )
        run(
            *("ca", "-batch", "-notext", "-config", _config(folder), "-in", f"{name}.csr", "-out", f"{name}.crt"),
            *("-cert", f"{authority}.crt", "-keyfile", f"{authority}.key", "-extfile", f"{name}.ext", *dates),
        )
    run("pkcs8", "-topk8", "-in", "server.key", "-out", "locked.key", "-passout", "pass:secret")


def _config(folder: Path) -> str:
    """Return what `openssl ca`, which alone writes dates in the past, wants to know."""
    (folder / "openssl.cnf").write_text(
        "[ca]\ndefault_ca = tests\n"
        "[tests]\ndatabase = index.txt\nnew_certs_dir = .\nrand_serial = yes\ndefault_md = sha256\npolicy = any\n"
        "unique_subject = no\n"
        "[any]\ncommonName = supplied\n"
    )
    return "openssl.cnf"
