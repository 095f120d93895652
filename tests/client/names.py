"""A name server, as a cluster has one for its headless services."""

from __future__ import annotations

import socket
import threading
from types import TracebackType

_A = 1
_RESPONSE = 0x8580  # an answer, with authority, recursion available


class NameServer:
    """Answers, for whatever name, with the addresses that it has at that time.

    Attributes:
        addresses: IPv4 addresses.
        questions: how often it was asked for them.
    """

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.questions = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)

    @property
    def authority(self) -> str:
        """`host:port` of it."""
        host, port = self._socket.getsockname()
        return f"{host}:{port}"

    def __enter__(self) -> NameServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.sendto(b"", self._socket.getsockname())  # wakes it
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            message, caller = self._socket.recvfrom(512)
            if not message:
                return
            end = message.index(0, 12) + 5  # behind name, type and class
            question = message[12:end]
            is_for_us = int.from_bytes(question[-4:-2], "big") == _A
            self.questions += is_for_us
            records = [socket.inet_aton(address) for address in self.addresses] if is_for_us else []
            header = b"".join(number.to_bytes(2, "big") for number in (_RESPONSE, 1, len(records), 0, 0))
            # Each: the name in the question, type A, class IN, 0 seconds to live, 4 bytes.
            answers = b"".join(b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x00\x00\x04" + record for record in records)
            self._socket.sendto(message[:2] + header + question + answers, caller)
