"""Images that lie on the GPU are read where they lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput

from client.api import GuardedClient
from deploy.embedded.server import EmbeddedTriton
from samples.hdf5 import read_hdf5

pytestmark = pytest.mark.gpu


def test_images_in_cuda_shared_memory_get_the_same_answers(server: EmbeddedTriton, badnet: Path) -> None:
    cupy = pytest.importorskip("cupy")
    pytest.importorskip("cuda.bindings.runtime", reason="pip install 'stripwire[gpu]'")
    cuda_memory = pytest.importorskip("tritonclient.utils.cuda_shared_memory")
    images = read_hdf5(badnet / "clean_test_data.h5").images[:8]
    with GuardedClient(server.grpc_address) as client:
        expected = client.classify(images)
    on_gpu = cupy.asarray(images)
    region = cuda_memory.create_shared_memory_region("images", on_gpu.nbytes, 0)
    try:
        cuda_memory.set_shared_memory_region_from_dlpack(region, [on_gpu])
        with InferenceServerClient(server.grpc_address) as triton:
            triton.register_cuda_shared_memory("images", cuda_memory.get_raw_handle(region), 0, on_gpu.nbytes)
            given = InferInput("image", images.shape, "UINT8")
            given.set_shared_memory("images", on_gpu.nbytes)
            answer = triton.infer("guarded", [given])
            triton.unregister_cuda_shared_memory("images")
    finally:
        cuda_memory.destroy_shared_memory_region(region)
    np.testing.assert_array_equal(answer.as_numpy("label")[:, 0], expected.labels)
    np.testing.assert_array_equal(answer.as_numpy("trojaned")[:, 0], expected.trojaned)
