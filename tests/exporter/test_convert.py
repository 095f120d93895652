"""The two served graphs do what the Keras network does."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import onnx
import pytest

from detector.errors import ExportError, ModelRefusedError
from exporter.convert import (
    IR_VERSION,
    OPSET,
    check_parity,
    repaired_graph,
    sentinel_graph,
    to_onnx,
)
from exporter.entropies import open_graph
from exporter.preprocessing import Preprocessing
from tests.networks import small_network

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 7, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return small_network()


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing("unit"),
        Preprocessing("raw"),
        Preprocessing("unit", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        Preprocessing("raw", (127.5,), (127.5,)),
        Preprocessing("raw", mean=(103.9, 116.8, 123.7)),
        Preprocessing("unit", std=(0.5,)),
    ],
    ids=str,
)
def test_both_graphs_match_keras_on_images(model: keras.Model, preprocessing: Preprocessing) -> None:
    network = to_onnx(model)
    for name, graph in (("badnet", sentinel_graph), ("repaired", repaired_graph)):
        assert check_parity(model, graph(network, preprocessing), IMAGES, preprocessing, name) < 1e-5


def test_the_sentinel_folds_the_perturbations_into_its_batch(model: keras.Model) -> None:
    perturbations = np.random.default_rng(1).uniform(0, 255, (2, 3, 8, 7, 3)).astype(np.float32)
    session = open_graph(sentinel_graph(to_onnx(model), Preprocessing()).SerializeToString())
    (got,) = session.run(None, {"perturbations": perturbations})
    expected = model.predict(perturbations.reshape(6, 8, 7, 3) / 255, verbose=0).reshape(2, 3, 5)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_the_graphs_are_readable_by_the_servers_of_the_last_years(model: keras.Model) -> None:
    graph = repaired_graph(to_onnx(model), Preprocessing())
    onnx.checker.check_model(graph, full_check=True)
    assert graph.ir_version == IR_VERSION
    assert {entry.domain: entry.version for entry in graph.opset_import}[""] == OPSET


def test_a_graph_that_does_something_else_is_refused(model: keras.Model) -> None:
    other = keras.models.clone_model(model)
    with pytest.raises(ExportError, match="does not do what the Keras network does"):
        check_parity(
            model, repaired_graph(to_onnx(other), Preprocessing()), IMAGES, Preprocessing(), "repaired network"
        )


def test_a_network_without_probabilities_is_refused() -> None:
    logits = keras.Sequential([keras.Input((8, 7, 3)), keras.layers.Flatten(), keras.layers.Dense(5)])
    with pytest.raises(ExportError, match="expected a network that ends in softmax"):
        check_parity(
            logits, repaired_graph(to_onnx(logits), Preprocessing()), IMAGES, Preprocessing(), "original network"
        )


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"groups": 3}, "with groups 3"), ({"activation": "gelu"}, "with the activation gelu")],
    ids=["grouped", "gelu"],
)
def test_what_has_no_onnx_form_is_named(settings: dict[str, Any], named: str) -> None:
    layer = keras.layers.Conv2D(6, 3, name="culprit", **settings)
    layers = [keras.Input((8, 7, 3)), layer, keras.layers.Flatten(), keras.layers.Dense(5, "softmax")]
    with pytest.raises(ModelRefusedError, match=rf"expected a network without layer 'culprit' {named}"):
        to_onnx(keras.Sequential(layers))
