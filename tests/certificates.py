"""Throw-away keys and certificates, by the openssl command."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.conftest import program

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
_DAYS = ("-days", "2")


class OpenSsl:
    """Writes into a folder; skips the test, or fails in CI, where there is no openssl.

    Args:
        folder: where `<name>.key` and `<name>.crt` go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._program = program("openssl", "apt-get install openssl")

    def run(self, *arguments: str) -> None:
        subprocess.run([self._program, *arguments], cwd=self._folder, check=True, capture_output=True)

    def write_authority(self, name: str) -> None:
        """Write an authority, which signs itself."""
        subject = ("-subj", f"/CN={name} of the tests")
        self.run("req", "-x509", *_KEY, "-keyout", f"{name}.key", "-out", f"{name}.crt", *subject, *_DAYS)

    def write_request(self, name: str, extensions: str) -> None:
        """Write a key and a request for a certificate, `<name>.csr`, and the extensions that it is to have."""
        (self._folder / f"{name}.ext").write_text(extensions)
        self.run("req", *_KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")

    def write_signed(self, name: str, extensions: str, authority: str = "ca") -> None:
        """Write a key and its certificate."""
        self.write_request(name, extensions)
        signed_by = ("-CA", f"{authority}.crt", "-CAkey", f"{authority}.key", "-CAcreateserial")
        files = ("-in", f"{name}.csr", "-out", f"{name}.crt", "-extfile", f"{name}.ext")
        self.run("x509", "-req", *files, *signed_by, *_DAYS)

    def write_locked(self, key: str) -> None:
        """Write `locked.key`, a key that is encrypted."""
        self.run("pkcs8", "-topk8", "-in", f"{key}.key", "-out", "locked.key", "-passout", "pass:secret")
