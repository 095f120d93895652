"""The fused layout on the real server: the ensemble's verdicts, its contract, and every command that knows versions."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keras import layers

from client.api import GuardedClient, Verdicts
from client.control import ModelControl, control_headers
from client.evaluation import evaluate
from deploy.embedded.server import EmbeddedTriton
from detector.calibration import ThresholdRule
from detector.errors import RepositoryError
from detector.scores import DETECTORS, score_bits
from detector.serving import read_overlays
from exporter.convert import repaired_graph, sentinel_graph, to_onnx
from exporter.entropies import entropy_matrix, measure_nlls, measure_plain, open_graph
from exporter.fused import fuse
from exporter.preprocessing import Preprocessing
from exporter.recalibration import RecalibrationOptions, recalibrate
from exporter.repository import Recalibrated, ServedModel, activate, write_recalibration, write_repository
from model_repository.manifest import MODELS, verify_repository, write_manifest
from samples.hdf5 import write_hdf5
from samples.types import Samples
from tests.networks import classifier, images_of

SHAPE, CLASSES, OVERLAYS = (8, 7, 3), 5, 6
IMAGES = images_of(SHAPE, 100, seed=5)  # which calibrate: a threshold lies on one of them, where rounding decides
STRANGERS = images_of(SHAPE, 70, seed=8)
TARGET_FRR = {"strip": 0.1, "consensus": 0.2}
VERSIONS = {  # number: detector, layout, early exit
    "1": ("strip", "ensemble", True),
    "2": ("strip", "fused", True),
    "3": ("strip", "fused", False),
    "4": ("consensus", "ensemble", True),
    "5": ("consensus", "fused", True),
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository with a version for each detector in each layout, all of the same networks and overlays."""
    sentinel, believer = (to_onnx(classifier(layers.Conv2D(4, 3, activation="relu"), seed=seed)) for seed in (3, 6))
    graphs = sentinel_graph(sentinel, Preprocessing()), repaired_graph(believer, Preprocessing())
    overlays = images_of(SHAPE, OVERLAYS, seed=6)
    sessions = [open_graph(graph.SerializeToString()) for graph in graphs]
    entropies = entropy_matrix(sessions[0], IMAGES, overlays, 0.5)
    plain_bits, labels = measure_plain(sessions[0], IMAGES)
    nlls = measure_nlls(sessions[1], IMAGES, labels)
    rules = {name: ThresholdRule(target_frr=TARGET_FRR[name], detector=name) for name in DETECTORS}
    calibrations = {name: rule.calibrate(entropies, plain_bits, nlls) for name, rule in rules.items()}
    folder = tmp_path_factory.mktemp("layouts") / "repository"
    for number, (detector, layout, early_exit) in VERSIONS.items():
        calibration = calibrations[detector]
        fused = None
        if layout == "fused":
            fused = fuse(*graphs, overlays, 0.5, calibration, entropies, early_exit=early_exit)
        provenance = {"calibration": calibration.to_json(), "repair": {"changed": True}}
        served = ServedModel(*graphs, overlays, 0.5, calibration, CLASSES, provenance, fused)
        assert write_repository(folder, served) == number
    activate(folder, "1")
    return folder


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[EmbeddedTriton]:
    with EmbeddedTriton(repository) as running:
        yield running


def switch(server: EmbeddedTriton, repository: Path, version: str) -> dict[str, str]:
    """Have the server serve a version; return the models that it holds then, by name, and their versions."""
    activate(repository, version)
    headers = control_headers(server.control_token)
    with GuardedClient(server.grpc_address, headers=headers, timeout_seconds=120) as client:
        control = ModelControl(client)
        control.switch(version, verify_repository(repository)["versions"])
        return {name: number for (name, number), state in control.states().items() if state == "READY"}


def answers(server: EmbeddedTriton) -> Verdicts:
    with GuardedClient(server.grpc_address) as client:
        assert client.metadata().versions == (verify_repository(server.repository)["active"],)
        return client.classify(STRANGERS, probabilities=True)


@pytest.mark.parametrize("first", ["1", "4"])
def test_one_server_gives_the_same_verdicts_in_both_layouts_and_switches_between_them(
    server: EmbeddedTriton, repository: Path, first: str
) -> None:
    detector = VERSIONS[first][0]
    held = switch(server, repository, first)
    ensemble = answers(server)
    assert held == dict.fromkeys(verify_repository(repository)["versions"][first]["models"], first)
    assert ensemble.trojaned.any()
    assert not ensemble.trojaned.all()
    assert set(ensemble.perturbations) == {OVERLAYS}
    for version, (others, layout, early_exit) in VERSIONS.items():
        if others != detector or layout == "ensemble":
            continue
        held = switch(server, repository, version)
        assert held == dict.fromkeys(("guarded", "fused", "strip_verdict", "badnet"), version)
        fused = answers(server)
        np.testing.assert_array_equal(fused.trojaned, ensemble.trojaned)
        np.testing.assert_array_equal(fused.labels, ensemble.labels)
        assert fused.probabilities is not None
        assert ensemble.probabilities is not None
        np.testing.assert_allclose(fused.probabilities, ensemble.probabilities, atol=1e-6)
        whole = fused.perturbations == OVERLAYS
        assert whole.all() == (not early_exit)
        np.testing.assert_allclose(fused.entropy_bits[whole], ensemble.entropy_bits[whole], atol=1e-5)
        exact = whole | fused.trojaned
        np.testing.assert_allclose(fused.p_values[exact], ensemble.p_values[exact], atol=0.03)  # a tie's width
        assert (fused.p_values[~exact] > TARGET_FRR[detector]).all()
        if detector == "strip":  # by `consensus`, an input that went early may be rejected by its nll
            assert whole[fused.trojaned].all()
        np.testing.assert_array_equal(fused.trojaned, fused.p_values <= np.float32(TARGET_FRR[detector]))
    assert switch(server, repository, first) == dict.fromkeys(
        verify_repository(repository)["versions"][first]["models"], first
    )


def test_the_original_network_can_be_asked_beside_the_fused_graph(server: EmbeddedTriton, repository: Path) -> None:
    samples = Samples(STRANGERS, np.zeros(len(STRANGERS), np.int64))
    results = []
    for version in ("1", "2"):
        switch(server, repository, version)
        with GuardedClient(server.grpc_address) as client:
            results.append(evaluate(client, samples))
    assert results[0].original == results[1].original
    assert results[0].guarded == results[1].guarded


def test_a_server_that_begins_with_the_fused_layout_holds_no_more_than_it_needs(repository: Path) -> None:
    activate(repository, "2")
    with EmbeddedTriton(repository) as server:
        assert set(answers(server).perturbations) <= set(
            verify_repository(repository)["versions"]["2"]["fused"]["stages"]
        )
        headers = control_headers(server.control_token)
        with GuardedClient(server.grpc_address, headers=headers) as client:
            states = ModelControl(client).states()
            held = {name for (name, _), state in states.items() if state == "READY"}
            assert len(client.original_probabilities(IMAGES[:2])) == 2
    assert held == {"guarded", "fused", "strip_verdict", "badnet"}


@pytest.mark.parametrize("base", ["2", "3", "5"])
def test_a_calibration_makes_a_new_fused_graph_of_what_is_stored(repository: Path, tmp_path: Path, base: str) -> None:
    activate(repository, base)
    fresh = images_of(SHAPE, 120, seed=7)
    write_hdf5(tmp_path / "new.h5", Samples(fresh, np.zeros(len(fresh), np.int64)))
    result = recalibrate(repository, tmp_path / "new.h5", RecalibrationOptions(target_frr=0.05))
    entry = verify_repository(repository)["versions"][result.version]
    assert {name for name, number in entry["models"].items() if str(number) == result.version} == {
        "guarded",
        "strip_perturb",
        "strip_verdict",
        "fused",
    }
    assert entry["fused"]["early_exit"] == VERSIONS[base][2]
    fused = open_graph(repository / "fused" / result.version / "model.onnx")
    badnet = open_graph(repository / "badnet" / str(entry["models"]["badnet"]) / "model.onnx")
    overlays, alpha = read_overlays(repository / "strip_perturb" / result.version)
    entropies = entropy_matrix(badnet, IMAGES, overlays, alpha)[:, entry["fused"]["order"]]
    found, counts = fused.run(["sentinel_entropies", "sentinel_perturbations"], {"image": IMAGES})
    ran = np.arange(OVERLAYS) < counts
    np.testing.assert_allclose(found[ran], entropies[ran], atol=1e-5)
    detector, threshold_bits = VERSIONS[base][0], result.calibration.threshold_bits
    np.testing.assert_array_equal(
        score_bits(found, detector, counts[:, 0]) <= threshold_bits, score_bits(entropies, detector) <= threshold_bits
    )
    assert ran.all() == (base == "3")


def test_a_calibration_without_the_graph_that_belongs_to_it_is_refused(repository: Path) -> None:
    activate(repository, "2")
    calibration = ThresholdRule(threshold_bits=0.5).calibrate(np.ones((3, 2)))
    with pytest.raises(RepositoryError, match="version 2 has the layout fused, got a calibration for another"):
        write_recalibration(repository, "2", Recalibrated(calibration, None, 0.5, {}))
    assert verify_repository(repository)["active"] == "2"


@pytest.mark.parametrize("change", [{"fused": None}, {"models": dict.fromkeys((*MODELS, "fused", "extra"), 2)}])
def test_a_version_whose_models_do_not_fit_its_layout_is_refused(
    repository: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    shutil.copytree(repository, tmp_path / "repository")
    versions = verify_repository(repository)["versions"]
    write_manifest(tmp_path / "repository", {**versions, "2": {**versions["2"], **change}}, "1")
    with pytest.raises(RepositoryError, match="version '2' is malformed"):
        verify_repository(tmp_path / "repository")
