"""The whole path through the embedded server, with callers that each send one request after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import psutil
import tritonclient.grpc as triton_grpc
from numpy.typing import NDArray

from benchmarks.speed.contenders import Contender
from client.api import GuardedClient
from deploy.embedded.installation import packages_can_use_a_gpu
from detector.errors import ServerError
from detector.serving import ON_THE_CPU
from exporter.entropies import OnProgress


@dataclass(frozen=True)
class Load:
    """How a server is asked.

    Attributes:
        batch: images in a request.
        callers: how many ask at once.
        traffic: `clean`, or `1 % trojaned`.
    """

    batch: int
    callers: int
    traffic: str = "clean"


@dataclass(frozen=True)
class Sample:
    """What came of it, in one round.

    Attributes:
        images_per_second: answered.
        p50_ms: median time of a request; where requests hold one image only, of as many as the batch has.
        p99_ms: 99th percentile of it.
        cpu_ms_per_image: processor time of the server and its stubs.
        memory_mib: of the server and its stubs, not shared with others, at the end.
    """

    images_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_ms_per_image: float
    memory_mib: float


def measure(contender: Contender, load: Load, pool: NDArray[np.uint8], seconds: float) -> Sample:
    """Ask for so long, and return what came of it.

    Args:
        contender: who is asked.
        load: how.
        pool: the images to draw from, (images, height, width, channels), uint8.
        seconds: how long.
    """
    family = _family(contender)
    with _clients(contender, load.callers) as clients:
        streams = [_requests(contender, load, pool, seed) for seed in range(load.callers)]
        for client, stream in zip(clients, streams, strict=True):
            _ask(client, contender, next(stream))
        begun, busy = time.perf_counter(), _cpu_seconds(family)

        def call(client: Any, stream: Iterator[list[Any]]) -> list[float]:
            times = []
            while (started := time.perf_counter()) < begun + seconds:
                _ask(client, contender, next(stream))
                times.append(time.perf_counter() - started)
            return times

        with ThreadPoolExecutor(load.callers) as callers:
            spent = np.concatenate([*callers.map(call, clients, streams)])
        lasted, busy = time.perf_counter() - begun, _cpu_seconds(family) - busy
    images = len(spent) * load.batch
    p50, p99 = np.quantile(spent, [0.5, 0.99])
    return Sample(images / lasted, 1e3 * p50, 1e3 * p99, 1e3 * busy / images, memory_mib(contender))


def blends(contenders: list[Contender], pool: NDArray[np.uint8]) -> dict[str, float]:
    """Return how many blends run for an image of the pool on average, by contender; of ours alone, which tell it."""
    found = {}
    for contender in contenders:
        if contender.model == "guarded" and not contender.one_by_one:
            with GuardedClient(contender.server.grpc_address) as client:
                found[contender.name] = float(client.classify(pool).perturbations.mean())
    return found


def graphics_card() -> str | None:
    """Return the GPU that the embedded server is to use, with the versions of what it uses; None where it uses none."""
    if not packages_can_use_a_gpu():
        return None
    import cupy

    try:
        name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        cuda = cupy.cuda.runtime.driverGetVersion()
    except cupy.cuda.runtime.CUDARuntimeError:  # no driver, or no GPU
        return None
    return f"{name}, driver of CUDA {cuda / 1000:g}, CuPy {cupy.__version__}, onnxruntime {onnxruntime.__version__}"


def check_where(contenders: list[Contender]) -> None:
    """Raise where a network was to run on the GPU and does not: the figures would be of something else."""
    for contender in contenders:
        if contender.server.misses_the_gpu():
            raise ServerError(f"{contender.name}: {ON_THE_CPU}")


def memory_mib(contender: Contender) -> float:
    """Return the memory of a server and its stubs that nobody else has, in MiB."""
    return float(sum(process.memory_full_info().uss for process in _family(contender))) / 2**20


def soak(contender: Contender, pool: NDArray[np.uint8], requests: int, callers: int, report: OnProgress) -> list[float]:
    """Send so many requests of one image, and return the memory in MiB after each hundredth of them.

    Args:
        contender: who is asked.
        pool: the images to draw from, (images, height, width, channels), uint8.
        requests: how many.
        callers: how many ask at once.
        report: told how far it is.
    """
    found = []
    with _clients(contender, callers) as clients:
        for part in range(100):
            share = requests // 100 // callers

            def call(client: Any, seed: int, share: int = share) -> None:
                stream = _requests(contender, Load(1, callers), pool, seed)
                for _ in range(share):
                    _ask(client, contender, next(stream))

            with ThreadPoolExecutor(callers) as asking:
                list(asking.map(call, clients, range(part * callers, (part + 1) * callers)))
            found.append(memory_mib(contender))
            report(f"Soaking {contender.name}", part + 1, 100)
    return found


@contextmanager
def _clients(contender: Contender, count: int) -> Iterator[list[Any]]:
    """Yield so many connections to a server."""
    with ExitStack() as opened:
        connect = triton_grpc.InferenceServerClient
        yield [opened.enter_context(connect(contender.server.grpc_address)) for _ in range(count)]


def _requests(contender: Contender, load: Load, pool: NDArray[np.uint8], seed: int) -> Iterator[list[Any]]:
    """Yield without end what a caller sends for a batch: the inputs of one request, or of one for each image."""
    generator = np.random.default_rng(seed)
    while True:
        images = pool[generator.integers(0, len(pool), load.batch)]
        parts = np.split(images, load.batch) if contender.one_by_one else [images]
        yield [triton_grpc.InferInput("image", part.shape, "UINT8").set_data_from_numpy(part) for part in parts]


def _ask(client: Any, contender: Contender, inputs: list[Any]) -> None:
    outputs = [triton_grpc.InferRequestedOutput(name) for name in contender.outputs]
    for given in inputs:
        client.infer(contender.model, [given], outputs=outputs)


def _family(contender: Contender) -> list[psutil.Process]:
    server = psutil.Process(contender.server.process_id)
    return [server, *server.children(recursive=True)]


def _cpu_seconds(family: list[psutil.Process]) -> float:
    return float(sum(sum(process.cpu_times()[:2]) for process in family))
