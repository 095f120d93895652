"""Images for a server on the same machine, in system shared memory instead of the requests."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferenceServerClient, InferInput

from detector.errors import InputError, ServerError, ServerUnavailableError

Ask = Callable[[Callable[..., Any]], Any]
"""Returns `call(triton, headers=…, client_timeout=…)`, with errors translated."""


class SharedBatches:
    """System shared memory for batches of images, one slot for each request in flight, registered with the server.

    Args:
        ask: asks the server.
        slots: how many batches there are at once.
        slot_bytes: the most bytes that a batch has.

    Raises:
        InputError: there is not so much shared memory.
        ServerError: the server cannot read it.
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
        try:
            self.register()
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> SharedBatches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._ask(lambda triton, **options: triton.unregister_system_shared_memory(self._memory.name, **options))
        except ServerError:
            pass  # a server that is gone, or went meanwhile, holds nothing; the error that ends the call is told
        finally:
            self._release()

    def register(self) -> None:
        """Tell the server of the memory, also a server that was started anew and knows nothing of it."""

        def call(triton: InferenceServerClient, **options: Any) -> None:
            if self._memory.name not in triton.get_system_shared_memory_status(**options).regions:
                triton.register_system_shared_memory(
                    self._memory.name, f"/{self._memory.name}", self._memory.size, **options
                )

        try:
            self._ask(call)
        except ServerUnavailableError:
            raise
        except ServerError as error:
            raise ServerError(
                f"{error}; a server reads the shared memory of its own machine alone, and in a container that of the "
                "host only with its IPC namespace"
            ) from error

    def place(self, number: int, images: NDArray[np.uint8]) -> InferInput:
        """Put a batch into its slot and return what stands for it in the request.

        Args:
            number: of the batch; the answer to the batch `slots` before it is there.
            images: (batch, height, width, channels), uint8.
        """
        offset = number % self._slots * self._slot_bytes
        slot: NDArray[np.uint8] = np.ndarray(images.shape, np.uint8, self._memory.buf, offset)
        slot[...] = images
        given = InferInput("image", images.shape, "UINT8")
        given.set_shared_memory(self._memory.name, images.nbytes, offset)
        return given

    def _release(self) -> None:
        self._memory.close()
        self._memory.unlink()
