"""Images for a server on the same machine, in system shared memory instead of the requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from multiprocessing.shared_memory import SharedMemory
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferInput

from detector.errors import InputError, ServerError, ServerUnavailableError

Ask = Callable[[Callable[..., Any]], Generator[Any, Any, Any]]
"""The steps to `call(triton, headers=…, client_timeout=…)`, with errors translated; see `client.core`."""

_IN_USE = "currently in use"  # what Triton says while a request reads it
_POLL_SECONDS = 0.05
_LONGEST_REQUEST_SECONDS = 10.0


class SharedBatches:
    """System shared memory for batches of images, one slot for each request in flight. Exiting frees it.

    Args:
        ask: asks the server.
        slots: how many batches there are at once.
        slot_bytes: the most bytes that a batch has.

    Raises:
        InputError: there is not so much shared memory.
    """

    def __init__(self, ask: Ask, slots: int, slot_bytes: int) -> None:
        self._ask = ask
        self._slots, self._slot_bytes = slots, slot_bytes
        try:
            self._memory = SharedMemory(create=True, size=slots * slot_bytes)
        except OSError as error:
            raise InputError(
                f"shared memory: {slots * slot_bytes} bytes cannot be had ({error.strerror}); make /dev/shm larger, or "
                "send the images without"
            ) from error
        self._placed = 0

    def __enter__(self) -> SharedBatches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._memory.close()
        self._memory.unlink()

    def register(self) -> Generator[Any, Any, None]:
        """Tell the server of the memory, also a server that was started anew and knows nothing of it.

        Raises:
            ServerError: it cannot read it.
        """
        memory = self._memory
        try:
            status = yield from self._ask(lambda triton, **options: triton.get_system_shared_memory_status(**options))
            if memory.name not in status.regions:
                yield from self._ask(
                    lambda triton, **options: triton.register_system_shared_memory(
                        memory.name, f"/{memory.name}", memory.size, **options
                    )
                )
        except ServerUnavailableError:
            raise
        except ServerError as error:
            raise ServerError(
                f"{error}; a server reads the shared memory of its own machine alone, and in a container that of the "
                "host only with its IPC namespace"
            ) from error

    def unregister(self, pause: Callable[[float], Any]) -> Generator[Any, Any, None]:
        """Have the server forget the memory, once all requests that were sent with it are answered.

        Not before: of a request that was cancelled Triton 2.51 says that nobody reads the memory any more while a step
        of the ensemble still does, and crashes when it is gone.

        Args:
            pause: waits that many seconds.
        """
        name = self._memory.name
        give_up_at = time.monotonic() + _LONGEST_REQUEST_SECONDS
        while time.monotonic() < give_up_at:
            try:
                yield from self._ask(lambda triton, **options: triton.unregister_system_shared_memory(name, **options))
            except ServerError as error:
                if _IN_USE not in str(error):
                    return  # a server that is gone, or went meanwhile, holds nothing
            else:
                return
            yield pause(_POLL_SECONDS)

    def place(self, images: NDArray[np.uint8]) -> InferInput:
        """Put the next batch into its slot and return what stands for it in the request.

        Args:
            images: (batch, height, width, channels), uint8; the answer to the batch `slots` before it is there.
        """
        offset = self._placed % self._slots * self._slot_bytes
        self._placed += 1
        slot: NDArray[np.uint8] = np.ndarray(images.shape, np.uint8, self._memory.buf, offset)
        slot[...] = images
        given = InferInput("image", images.shape, "UINT8")
        given.set_shared_memory(self._memory.name, images.nbytes, offset)
        return given
