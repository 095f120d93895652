"""What is compared computes the same, and what is measured is told as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.speed import offline, results
from benchmarks.speed.__main__ import app, show
from benchmarks.speed.contenders import BARE, CONTENDERS, ENSEMBLE, NAIVE, Contender, write_naive
from benchmarks.speed.gpu_options import BATCHES, options_table
from benchmarks.speed.served import Load, blends, measure, soak
from client.api import GuardedClient
from deploy.embedded.server import EmbeddedTriton
from detector.calibration import ThresholdRule
from exporter.convert import repaired_graph, sentinel_graph, to_onnx
from exporter.entropies import entropy_matrix, open_graph
from exporter.preprocessing import Preprocessing
from exporter.repository import ServedModel, write_repository
from tests.detector import reference
from tests.networks import images_of, small_network

SHAPE, CLASSES = (8, 7, 3), 5
IMAGES = images_of(SHAPE, 60, seed=1)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = to_onnx(small_network(SHAPE, CLASSES))
    sentinel, repaired = sentinel_graph(network, Preprocessing()), repaired_graph(network, Preprocessing())
    overlays = images_of(SHAPE, 4, seed=2)
    entropies = entropy_matrix(open_graph(sentinel.SerializeToString()), IMAGES, overlays, 0.5)
    calibration = ThresholdRule(target_frr=0.3).calibrate(entropies)
    folder = tmp_path_factory.mktemp("speed") / "repository"
    write_repository(folder, ServedModel(sentinel, repaired, overlays, 0.5, calibration, CLASSES, {}))
    return folder


def test_the_naive_ensemble_gives_our_verdicts_one_image_at_a_time(repository: Path, tmp_path: Path) -> None:
    write_naive(repository, tmp_path / "naive")
    with EmbeddedTriton(repository) as ours, GuardedClient(ours.grpc_address) as client:
        expected = client.classify(IMAGES)
    assert 0 < expected.trojaned.sum() < len(IMAGES)
    with (
        EmbeddedTriton(tmp_path / "naive") as naive,
        triton_grpc.InferenceServerClient(naive.grpc_address) as triton,
    ):
        for row, image in enumerate(IMAGES[:20]):
            given = triton_grpc.InferInput("image", (1, *SHAPE), "UINT8").set_data_from_numpy(image[None])
            answer = triton.infer("guarded", [given])
            assert abs(answer.as_numpy("entropy").item() - expected.entropy_bits[row]) < 1e-5
            assert answer.as_numpy("label").item() == expected.labels[row]
            assert answer.as_numpy("trojaned").item() == expected.trojaned[row]


def test_a_load_is_measured_and_a_soak_watched(repository: Path) -> None:
    with EmbeddedTriton(repository) as server:
        contender = Contender(ENSEMBLE, server, "guarded", ("label", "trojaned"))
        sample = measure(contender, Load(4, 2), IMAGES, 0.5)
        told: list[int] = []
        memory = soak(contender, IMAGES, 200, 2, lambda _text, done, _total: told.append(done))
        assert blends([contender], IMAGES) == {ENSEMBLE: 4.0}
    assert sample.images_per_second > 0
    assert 0 < sample.p50_ms <= sample.p99_ms
    assert sample.cpu_ms_per_image >= 0
    assert sample.memory_mib > 1
    assert len(memory) == 100
    assert told == [*range(1, 101)]


def test_the_published_loop_is_strip() -> None:
    rows = np.random.default_rng(0).dirichlet(np.ones(6), 12).astype(np.float32)
    found = offline.published(lambda blends: rows[: len(blends)], IMAGES[:2], images_of(SHAPE, 4, seed=3))
    assert found == pytest.approx([reference.entropy_bits(rows[:4])] * 2, rel=1e-6)


def found() -> dict[str, Any]:
    """Return results as a run leaves them: the bare network takes 1, others 2, 3, 4 and 5 times as long."""
    fields = ("images_per_second", "p50_ms", "p99_ms", "cpu_ms_per_image", "memory_mib")
    rounds = [
        {
            name: {field: 60.0 / (place + 1) if field == "images_per_second" else 2.0 * (place + 1) for field in fields}
            for place, name in enumerate(CONTENDERS)
        }
    ] * 3
    names = ["bare network", "published loop, Keras", "ART, Keras", "ours, fused"]
    loads = [
        {"batch": batch, "callers": callers, "traffic": "clean", "blends": {"fused": 4.5}}
        for batch in (1, 32)
        for callers in (1, 4)
    ]
    return {
        "hardware": "an abacus",
        "served": [load | {"rounds": rounds} for load in loads],
        "offline": {name: [float(place + 1)] * 3 for place, name in enumerate(names)},
        "varied": {name: [{name: 1, "ensemble": 2.0, "fused": 1.5}] for name in offline.VARIED},
        "soak": {"requests": 1000, "memory_mib": {ENSEMBLE: [100.0] * 20 + [101.0] * 80}},
    }


def test_costs_are_ratios_to_the_bare_network_of_the_same_round() -> None:
    (load, *_) = found()["served"]
    assert results.ratios(load["rounds"], NAIVE, "images_per_second") == [2.0] * 3
    assert results.ratios(load["rounds"], NAIVE, "p50_ms") == [2.0] * 3
    assert results.ratios(load["rounds"], BARE, "p50_ms") == [1.0] * 3


def test_the_last_tenth_is_compared_with_the_second() -> None:
    assert results.growth([*range(10), *[50.0] * 10, *range(70), *[51.0] * 10]) == pytest.approx(2.0)


def test_what_a_machine_without_tensorflow_measured_is_shown_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers_alone = {name: value for name, value in found().items() if name not in ("offline", "varied")}
    show(servers_alone)
    shown = capsys.readouterr().out
    assert "an abacus" in shown
    assert "published loop" not in shown
    results.draw(tmp_path / "speed.png", servers_alone)
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_a_run_of_prepared_servers_does_not_mix_with_another_machines_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "speed.json").write_text(json.dumps(found()))
    before = (tmp_path / "speed.json").read_bytes()
    monkeypatch.setattr("benchmarks.speed.__main__._served", lambda *_: pytest.fail("it was measured"))
    answer = CliRunner().invoke(app, ["--prepared", str(tmp_path), "--output", str(tmp_path)])
    assert answer.exit_code == 2
    assert "of another machine" in " ".join(answer.output.split())
    assert (tmp_path / "speed.json").read_bytes() == before


def test_options_of_a_gpu_are_a_table() -> None:
    row = {"graph": "fused", "use_tf32": "1", "search": "DEFAULT", "new_size_ms": [9.0, 11.0], "entropy_off_bits": 3e-3}
    console = Console(width=160, record=True)
    console.print(options_table([row | {"ms": {str(batch): 1.0 for batch in BATCHES}}]))
    assert "DEFAULT" in (text := console.export_text())
    assert "3e-03" in text


def test_tables_and_picture_show_what_was_measured(tmp_path: Path) -> None:
    everything = json.loads(json.dumps(found()))
    console = Console(width=160, record=True)
    for table in (
        results.served_table(everything["served"]),
        results.offline_table(everything["offline"]),
        results.varied_table(everything["varied"]),
        results.targets(everything),
    ):
        console.print(table)
    text = console.export_text()
    for expected in (*CONTENDERS, "fused, batch 32: cost / bare", "missed", "met", "published loop, Keras"):
        assert expected in text
    results.draw(tmp_path / "speed.png", everything)
    assert (tmp_path / "speed.png").stat().st_size > 10_000
