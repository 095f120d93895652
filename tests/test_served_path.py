"""The whole path through the real server: contract, figures, and bad input that harms nobody."""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from client.api import GuardedClient, Verdicts
from client.evaluation import evaluate
from client.shared import SharedBatches
from deploy.embedded.server import EmbeddedTriton
from detector.errors import DataError, DeadlineExceededError, ServerUnavailableError
from exporter.export import Data, ExportOptions, export
from exporter.keras_files import load_model
from exporter.preprocessing import Preprocessing
from exporter.recalibration import RecalibrationOptions, recalibrate
from exporter.repair import RepairOptions
from model_repository.manifest import verify_repository
from samples.hdf5 import read_hdf5
from tests.detector import reference
from tests.networks import write_small_repository

CONTRACT: dict[str, tuple[type, int]] = {
    "label": (np.int32, 1),
    "trojaned": (np.bool_, 1),
    "entropy": (np.float32, 1),
    "p_value": (np.float32, 1),
    "perturbations": (np.int32, 1),
    "probabilities": (np.float32, 12),
}
LAYERS = ("conv_1", "conv_2", "conv_3", "conv_4", "fc_1", "fc_2", "output")


def image_input(module: Any, images: Any, name: str = "image", datatype: str = "UINT8") -> Any:
    tensor = module.InferInput(name, list(images.shape), datatype)
    tensor.set_data_from_numpy(images)
    return tensor


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_contract_holds_over_both_protocols(server: EmbeddedTriton, badnet: Path, protocol: str) -> None:
    module: Any
    module, address = {"grpc": (triton_grpc, server.grpc_address), "http": (triton_http, server.http_address)}[protocol]
    images = read_hdf5(badnet / "clean_test_data.h5").images[:5]
    with module.InferenceServerClient(address) as client:
        answer = client.infer("guarded", [image_input(module, images)])
        for name, (dtype, length) in CONTRACT.items():
            array = answer.as_numpy(name)
            assert array.dtype == dtype
            assert array.shape == (5, length)
        only_label = client.infer(
            "guarded", [image_input(module, images)], outputs=[module.InferRequestedOutput("label")]
        )
        np.testing.assert_array_equal(only_label.as_numpy("label"), answer.as_numpy("label"))
        assert only_label.as_numpy("probabilities") is None


def test_the_metadata_tells_the_contract(server: EmbeddedTriton) -> None:
    with triton_grpc.InferenceServerClient(server.grpc_address) as client:
        metadata = client.get_model_metadata("guarded")
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("image", "UINT8", [-1, 55, 47, 3])]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [
        ("label", "INT32", [-1, 1]),
        ("trojaned", "BOOL", [-1, 1]),
        ("entropy", "FP32", [-1, 1]),
        ("p_value", "FP32", [-1, 1]),
        ("perturbations", "INT32", [-1, 1]),
        ("probabilities", "FP32", [-1, 12]),
    ]


def test_every_served_verdict_agrees_with_the_float64_reference(
    server: EmbeddedTriton, repository: Path, badnet: Path
) -> None:
    verdicts = answers(server, badnet)
    calibration = json.loads((repository / "strip_verdict" / "1" / "calibration.json").read_text())
    entropies = referred(repository, badnet, "1", verdicts)[0].mean(axis=1)
    np.testing.assert_allclose(verdicts.entropy_bits, entropies, atol=1e-4)
    certain = np.abs(entropies - calibration["threshold_bits"]) > 1e-4
    assert certain.mean() > 0.95
    np.testing.assert_array_equal(verdicts.trojaned[certain], (entropies <= calibration["threshold_bits"])[certain])
    np.testing.assert_array_equal(verdicts.trojaned, verdicts.p_values <= calibration["target_frr"])
    assert verdicts.probabilities is not None
    expected = np.where(verdicts.trojaned, 12, verdicts.probabilities.argmax(axis=1))
    np.testing.assert_array_equal(verdicts.labels, expected)


def test_every_verdict_of_consensus_agrees_with_the_float64_reference(
    repository: Path, badnet: Path, tmp_path: Path
) -> None:
    shutil.copytree(repository, tmp_path / "repository")
    options = RecalibrationOptions(target_frr=0.1, detector="consensus", keep_overlays=True)
    result = recalibrate(tmp_path / "repository", badnet / "clean_validation_data.h5", options)
    assert result.calibration.detector == "consensus"
    thresholds = result.calibration.thresholds
    assert thresholds.nll is not None
    assert thresholds.plain_bits is not None
    with EmbeddedTriton(tmp_path / "repository") as server:
        verdicts = answers(server, badnet)
    entropies, plain_bits, nlls = referred(tmp_path / "repository", badnet, "2", verdicts)
    np.testing.assert_allclose(verdicts.entropy_bits, entropies.mean(axis=1), atol=1e-4)
    medians = np.array([reference.lower_median(row) for row in entropies])
    certain = (np.abs(medians - thresholds.bits) > 1e-4) & (np.abs(nlls - thresholds.nll) > 1e-3)
    certain &= np.abs(plain_bits - thresholds.plain_bits) > 1e-4 * thresholds.plain_bits
    assert certain.mean() > 0.95
    by = np.array([medians <= thresholds.bits, plain_bits <= thresholds.plain_bits, nlls >= thresholds.nll])
    assert (by.sum(axis=0) == 1).any()
    np.testing.assert_array_equal(verdicts.trojaned[certain], by.any(axis=0)[certain])
    np.testing.assert_array_equal(verdicts.trojaned, verdicts.p_values <= 0.1)


def answers(server: EmbeddedTriton, badnet: Path) -> Verdicts:
    """Return what is served for clean test images and, after them, trojaned ones."""
    with GuardedClient(server.grpc_address) as client:
        return client.classify(images_of(badnet), probabilities=True)


def images_of(badnet: Path) -> Any:
    files = ("clean_test_data.h5", "sunglasses_poisoned_data.h5")
    return np.concatenate([read_hdf5(badnet / name).images for name in files])


def referred(repository: Path, badnet: Path, version: str, verdicts: Verdicts) -> tuple[Any, Any, Any]:
    """Return what the reference makes of the same images.

    These are entropies, (images, overlays), those of the images as they are, (images,), and nlls, (images,).
    """
    model = load_model(badnet / "bd_net.keras")
    weights = [array for name in LAYERS for array in model.get_layer(name).get_weights()]
    number = verify_repository(repository)["versions"][version]["models"]["strip_perturb"]
    with np.load(repository / "strip_perturb" / str(number) / "overlays.npz") as stored:
        overlays, alpha = stored["overlays"], float(stored["alpha"])
    images = images_of(badnet)
    blends = np.array([[reference.blend(image, overlay, alpha) / 255 for overlay in overlays] for image in images])
    probabilities = reference.deepid(weights, blends.reshape(-1, 55, 47, 3)).reshape(len(images), len(overlays), -1)
    plain = reference.deepid(weights, images / 255)
    seen = plain.argmax(axis=1)
    assert verdicts.probabilities is not None
    nlls = [-math.log(row[label]) for row, label in zip(verdicts.probabilities.astype(float), seen, strict=True)]
    entropies = [[reference.entropy_bits(row[None]) for row in rows] for rows in probabilities]
    return np.array(entropies), np.array([reference.entropy_bits(row[None]) for row in plain]), np.array(nlls)


def test_a_server_on_this_machine_reads_images_from_shared_memory(server: EmbeddedTriton, badnet: Path) -> None:
    images = np.concatenate([images_of(badnet)] * 3)[:200]  # several requests, of which the last is smaller
    held = set(Path("/dev/shm").iterdir())  # noqa: S108
    with GuardedClient(server.grpc_address, window=2) as client:
        sent = client.classify(images, probabilities=True)
        shared = client.classify(images, probabilities=True, shared_memory=True)
        one = client.classify(images[0], shared_memory=True)
        registered = client.ask("guarded", lambda triton, **options: triton.get_system_shared_memory_status(**options))
    np.testing.assert_array_equal(shared.labels, sent.labels)
    np.testing.assert_array_equal(shared.trojaned, sent.trojaned)
    np.testing.assert_allclose(shared.entropy_bits, sent.entropy_bits, atol=1e-5)
    assert shared.probabilities is not None
    assert sent.probabilities is not None
    np.testing.assert_allclose(shared.probabilities, sent.probabilities, atol=1e-6)
    assert one.labels[0] == sent.labels[0]
    assert not registered.regions
    assert not {path.name for path in set(Path("/dev/shm").iterdir()) - held if path.name.startswith("psm_")}  # noqa: S108


def test_a_call_that_fails_leaves_its_shared_memory_to_requests_that_may_still_read_it(
    repository: Path, badnet: Path
) -> None:
    images = np.concatenate([images_of(badnet)] * 10)
    held = set(Path("/dev/shm").iterdir())  # noqa: S108

    def give_up(*_: int) -> None:
        raise RuntimeError("enough")

    with EmbeddedTriton(repository) as server, GuardedClient(server.grpc_address) as client:
        for _ in range(5):
            with pytest.raises(RuntimeError, match="enough"):
                client.classify(images, shared_memory=True, on_progress=give_up)
            assert len(client.classify(images[:8], shared_memory=True)) == 8
        told = client.ask("guarded", lambda triton, **options: triton.get_system_shared_memory_status(**options))
        assert len(told.regions) == 5
        assert not {path.name for path in set(Path("/dev/shm").iterdir()) - held if path.name.startswith("psm_")}  # noqa: S108


def test_a_server_that_was_started_anew_is_told_of_the_shared_memory_again(server: EmbeddedTriton) -> None:
    with GuardedClient(server.grpc_address) as client:

        def ask(call: Any) -> Any:
            return client.ask("guarded", call)

        def steps(call: Any) -> Generator[Any, Any, Any]:
            yield from ()
            return ask(call)

        def registered() -> int:
            return len(ask(lambda triton, **options: triton.get_system_shared_memory_status(**options)).regions)

        with SharedBatches(steps, 2, 100) as shared:
            list(shared.register())
            list(shared.register())  # which it was already
            assert registered() == 1
            ask(lambda triton, **options: triton.unregister_system_shared_memory("", **options))
            assert registered() == 0
            list(shared.register())
            assert registered() == 1
            list(shared.unregister(time.sleep))
        assert registered() == 0


def test_the_answer_does_not_depend_on_the_batch(server: EmbeddedTriton, badnet: Path) -> None:
    images = read_hdf5(badnet / "clean_test_data.h5").images
    assert len(images) == 60
    with GuardedClient(server.grpc_address) as client:
        together = client.classify(np.concatenate([images] * 3))  # more than the server takes at once
        one_by_one = [client.classify(image)[0] for image in images[:10]]
    assert len(together) == 180
    np.testing.assert_allclose(together.entropy_bits[:60], together.entropy_bits[120:], atol=1e-5)
    np.testing.assert_allclose([verdict.entropy_bits for verdict in one_by_one], together.entropy_bits[:10], atol=1e-5)


def test_the_figures_come_out_through_the_server(server: EmbeddedTriton, badnet: Path) -> None:
    clean, trojaned = (read_hdf5(badnet / name) for name in ("clean_test_data.h5", "sunglasses_poisoned_data.h5"))
    with GuardedClient(server.grpc_address) as client:
        result = evaluate(client, clean, trojaned)
    report = json.loads((badnet / "badnet.json").read_text())
    assert result.original.clean_accuracy.successes == report["clean_accuracy"]["successes"]
    assert result.original.attack_success is not None
    assert result.original.attack_success.successes == report["attack_success"]["successes"]
    assert result.original.attack_success.rate > 0.9
    assert result.auroc is not None
    assert result.auroc > 0.5


BAD_REQUESTS: dict[str, tuple[Any, str, str, str]] = {
    "dtype": (np.zeros((1, 55, 47, 3), np.float32), "image", "FP32", "UINT8"),
    "shape": (np.zeros((1, 55, 48, 3), np.uint8), "image", "UINT8", "unexpected shape"),
    "rank": (np.zeros((55, 47, 3), np.uint8), "image", "UINT8", "unexpected shape"),
    "missing tensor": (np.zeros((1, 55, 47, 3), np.uint8), "picture", "UINT8", "picture"),
    "batch too large": (np.zeros((65, 55, 47, 3), np.uint8), "image", "UINT8", "batch-size must be <= 64"),
    "empty batch": (np.zeros((0, 55, 47, 3), np.uint8), "image", "UINT8", "empty|0|shape"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_refused_and_the_server_goes_on(server: EmbeddedTriton, case: str) -> None:
    images, name, datatype, message = BAD_REQUESTS[case]
    with triton_grpc.InferenceServerClient(server.grpc_address) as client:
        with pytest.raises(InferenceServerException, match=message) as caught:
            client.infer("guarded", [image_input(triton_grpc, images, name, datatype)])
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
        good = client.infer("guarded", [image_input(triton_grpc, np.zeros((1, 55, 47, 3), np.uint8))])
        assert good.as_numpy("label").shape == (1, 1)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 55, 47, 3), np.float32),
        np.zeros((1, 55, 48, 3), np.uint8),
        np.zeros((55, 47), np.uint8),
        np.zeros((0, 55, 47, 3), np.uint8),
    ],
    ids=["dtype", "shape", "rank", "empty"],
)
def test_the_client_names_what_is_wrong_with_images(server: EmbeddedTriton, images: Any) -> None:
    with GuardedClient(server.grpc_address) as client:
        with pytest.raises(DataError, match=r"images: got .*(expected|takes)"):
            client.classify(images)
        assert len(client.classify(np.zeros((2, 55, 47, 3), np.uint8))) == 2


def test_a_deadline_that_passes_is_named_and_the_server_goes_on(server: EmbeddedTriton) -> None:
    with GuardedClient(server.grpc_address) as client:
        client.metadata()
    hurried = GuardedClient(server.grpc_address, timeout_seconds=0.001)
    with hurried, pytest.raises(DeadlineExceededError):
        hurried.classify(np.zeros((64, 55, 47, 3), np.uint8))
    with GuardedClient(server.grpc_address) as client:
        assert len(client.classify(np.zeros((1, 55, 47, 3), np.uint8))) == 1


def test_a_request_that_waits_for_too_long_is_turned_away_and_the_server_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.repository.MAX_QUEUE_SECONDS", 0.1)
    write_small_repository(tmp_path / "repository")
    images = np.zeros((64, 8, 7, 3), np.uint8)
    given = [image_input(triton_grpc, images)]
    with EmbeddedTriton(tmp_path / "repository") as server:
        with triton_grpc.InferenceServerClient(server.grpc_address) as client:
            said: list[str] = []
            ended = threading.Semaphore(0)

            def note(result: Any, error: Any) -> None:  # noqa: ARG001
                said.append(str(error))
                ended.release()

            for _ in range(300):
                client.async_infer("guarded", given, callback=note)
            for _ in range(300):
                ended.acquire()
        turned_away = [error for error in said if "UNAVAILABLE" in error and "Request timeout expired" in error]
        assert turned_away
        assert len(turned_away) + said.count("None") == 300
        # Who comes later gets an answer, and so does, in the end, who tries again.
        with GuardedClient(server.grpc_address) as guarded, ThreadPoolExecutor(16) as asking:
            answers = [*asking.map(lambda _: len(guarded.classify(images).labels), range(40))]
        assert answers == [len(images)] * 40


def test_a_server_that_is_down_is_named_with_what_to_do() -> None:
    with (
        GuardedClient("127.0.0.1:9", retries=1, sleep=lambda _: None) as client,
        pytest.raises(ServerUnavailableError, match="stripwire serve"),
    ):
        client.classify(np.zeros((1, 55, 47, 3), np.uint8))


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("file", "architecture", "scale", "clean_correct"),
    [
        ("sunglasses_bd_net_keras2.h5", None, "unit", 164),
        ("sunglasses_bd_weights.h5", "deepid", "unit", 164),
        ("lab3_bd_weights.h5", "deepid", "raw", 168),
    ],
)
def test_the_real_networks_answer_as_measured_elsewhere(
    shared_data: Path, tmp_path: Path, file: str, architecture: str | None, scale: str, clean_correct: int
) -> None:
    faces = shared_data / "csaw"
    options = ExportOptions(
        preprocessing=Preprocessing(scale), architecture=architecture, repair=RepairOptions(method="none")
    )
    export(faces / file, Data(faces / "clean.h5"), tmp_path / "repository", options)
    clean, trojaned = read_hdf5(faces / "clean.h5"), read_hdf5(faces / "sunglasses_poisoned.h5")
    with EmbeddedTriton(tmp_path / "repository") as server, GuardedClient(server.grpc_address) as client:
        result = evaluate(client, clean, trojaned)
    assert str(result.original.clean_accuracy).endswith("n=170)")
    assert result.original.clean_accuracy.successes == clean_correct
    assert result.original.attack_success is not None
    assert (result.original.attack_success.successes, result.original.attack_success.count) == (210, 210)
