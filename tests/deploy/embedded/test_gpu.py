"""The real server on a GPU: all that is as large as images runs there, and answers as on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient

from client.api import GuardedClient
from deploy.embedded.server import EmbeddedTriton
from detector.serving import BEHIND
from samples.hdf5 import read_hdf5

pytestmark = pytest.mark.gpu

_FILES = ("clean_test_data.h5", "sunglasses_poisoned_data.h5")


@pytest.fixture(scope="module")
def fused_repository(badnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the model repository of the small BadNet in the fused layout, with the default detector."""
    from exporter.export import Data, ExportOptions, export
    from exporter.repair import RepairOptions

    folder = tmp_path_factory.mktemp("exported") / "fused"
    options = ExportOptions(repair=RepairOptions(method="magnitude", max_rounds=1, epochs=2), layout="fused")
    export(badnet / "bd_net.keras", Data(badnet / "clean_validation_data.h5"), folder, options)
    return folder


@pytest.fixture(scope="module", params=["ensemble", "fused"])
def served(request: pytest.FixtureRequest, repository: Path, fused_repository: Path) -> Iterator[EmbeddedTriton]:
    pytest.importorskip("cupy")
    with EmbeddedTriton(repository if request.param == "ensemble" else fused_repository) as running:
        yield running


@contextmanager
def on_the_cpu(repository: Path) -> Iterator[EmbeddedTriton]:
    with patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""), EmbeddedTriton(repository) as running:
        yield running


def kinds(server: EmbeddedTriton) -> dict[str, str]:
    """Return where each model behind `guarded` runs, as the server says."""
    with InferenceServerClient(server.grpc_address) as client:
        steps = client.get_model_config("guarded").config.ensemble_scheduling.step
        configs = [client.get_model_config(step.model_name, str(step.model_version)).config for step in steps]
    return {
        config.name: config.instance_group[0].Kind.Name(group.kind)
        for config in configs
        for group in config.instance_group
    }


def test_what_is_as_large_as_images_runs_on_the_gpu(served: EmbeddedTriton) -> None:
    found = kinds(served)
    assert tuple(found) in BEHIND.values()
    assert found == {name: "KIND_CPU" if name == "strip_verdict" else "KIND_GPU" for name in found}
    assert "runs on the CPU" not in served.server_log()


def test_callers_do_not_disturb_each_other(served: EmbeddedTriton, badnet: Path) -> None:
    images = read_hdf5(badnet / "clean_test_data.h5").images[:48]
    with GuardedClient(served.grpc_address) as client:
        expected = client.classify(images)
        parts = [*range(0, 48, 3)] * 4
        with ThreadPoolExecutor(8) as callers:
            found = [*callers.map(lambda start: client.classify(images[start : start + 3]), parts)]
    for start, answer in zip(parts, found, strict=True):
        np.testing.assert_array_equal(answer.labels, expected.labels[start : start + 3])
        np.testing.assert_array_equal(answer.trojaned, expected.trojaned[start : start + 3])
        np.testing.assert_allclose(answer.entropy_bits, expected.entropy_bits[start : start + 3], atol=1e-4)


def test_answers_are_those_of_the_cpu(served: EmbeddedTriton, badnet: Path) -> None:
    images = np.concatenate([read_hdf5(badnet / name).images[:48] for name in _FILES])
    with GuardedClient(served.grpc_address) as client:
        found = [
            client.classify(images[start : start + size], probabilities=True)
            for start, size in ((0, 1), (1, 7), (8, 64), (72, 24))
        ]
    with on_the_cpu(served.repository) as server, GuardedClient(server.grpc_address) as client:
        assert set(kinds(server).values()) == {"KIND_CPU"}
        expected = client.classify(images, probabilities=True)
    assert expected.trojaned.any()
    assert not expected.trojaned.all()
    for name in ("labels", "trojaned", "perturbations"):
        np.testing.assert_array_equal(np.concatenate([getattr(each, name) for each in found]), getattr(expected, name))
    for name in ("entropy_bits", "probabilities"):
        answers = np.concatenate([getattr(each, name) for each in found])
        np.testing.assert_allclose(answers, getattr(expected, name), atol=1e-4)
