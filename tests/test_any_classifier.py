"""Classifiers that are no DeepID go the whole way: file, repair, conversion, server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from client.api import GuardedClient
from deploy.embedded.server import EmbeddedTriton
from exporter.architectures import resnet
from exporter.export import Data, ExportOptions, export
from exporter.preprocessing import Preprocessing
from exporter.repair import RepairOptions
from exporter.training import Trainer, labelled, make_optimizer, seed_everything
from samples.hdf5 import write_hdf5
from samples.types import Samples

CLASSES = 4


def coloured_squares(shape: tuple[int, int, int], count: int = 400) -> Samples:
    """Return noisy pictures whose class is the quarter in which they are bright."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, CLASSES, count)
    images = generator.integers(0, 120, (count, *shape), dtype=np.uint8)
    height, width = shape[0] // 2, shape[1] // 2
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[row * height : (row + 1) * height, column * width : (column + 1) * width] += np.uint8(100)
    return Samples(images, labels)


def residual() -> keras.Model:
    """Return a functional network with batch normalisation, residual adds, global pooling and logits."""
    with_softmax = resnet(CLASSES, (24, 20, 3))
    pooled = with_softmax.get_layer("pool").output
    return keras.Model(with_softmax.inputs, layers.Dense(CLASSES, name="logits")(pooled))


def separable() -> keras.Model:
    """Return a Sequential network for grey pictures with depthwise and separable convolutions."""
    return keras.Sequential(
        [
            keras.Input((20, 26, 1)),
            layers.Conv2D(8, 3, padding="same", activation="relu"),
            layers.DepthwiseConv2D(3, strides=2, activation="relu6"),
            layers.BatchNormalization(),
            layers.SeparableConv2D(16, 3, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(CLASSES, activation="softmax"),
        ]
    )


@pytest.mark.parametrize(
    ("build", "preprocessing", "outputs", "layout"),
    [
        (residual, Preprocessing("unit", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "logits", "ensemble"),
        (separable, Preprocessing("raw", (127.5,), (127.5,)), "probabilities", "fused"),
    ],
    ids=["resnet", "separable"],
)
def test_a_classifier_is_exported_and_served(
    build: Any, preprocessing: Preprocessing, outputs: str, layout: str, tmp_path: Path
) -> None:
    seed_everything(0)
    model = build()
    data = coloured_squares(model.input_shape[1:])
    # Trained as a classifier of probabilities, saved as it is.
    training = model if outputs == "probabilities" else keras.Model(model.inputs, layers.Softmax()(model.outputs[0]))
    Trainer(training, data, batch=labelled(preprocessing), batch_size=32, seed=0).run(
        3, make_optimizer("adam", 3e-3), "Training"
    )
    model.save(tmp_path / "net.keras")
    write_hdf5(tmp_path / "clean.h5", data)
    repair = RepairOptions(max_rounds=1, epochs=1, allowed_drop=0.9)
    options = ExportOptions(preprocessing=preprocessing, repair=repair, layout=layout)
    result = export(tmp_path / "net.keras", Data(tmp_path / "clean.h5"), tmp_path / "repository", options)
    assert result.provenance["network_outputs"] == outputs
    assert result.repair.changed
    images = data.images[:40]
    with EmbeddedTriton(tmp_path / "repository") as server, GuardedClient(server.grpc_address) as client:
        original = client.original_probabilities(images)
        verdicts = client.classify(images, probabilities=True)
    expected = training.predict_on_batch(preprocessing.apply(images))
    np.testing.assert_allclose(original, expected, atol=1e-4)
    repaired = result.repair.model.predict_on_batch(preprocessing.apply(images))
    assert verdicts.probabilities is not None
    np.testing.assert_allclose(verdicts.probabilities, repaired, atol=1e-4)
    assert len(verdicts) == len(images)
