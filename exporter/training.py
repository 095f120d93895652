"""Training, as both the attacker and the repair do it: deterministic under a seed."""

from __future__ import annotations

import math
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from detector.statistics import Proportion
from exporter.convert import SCALES
from samples.types import Samples

Progress = Callable[[str, int, int], None]
"""Called with what is going on, steps done, steps in all."""

Augment = Callable[[NDArray[np.uint8], np.random.Generator], NDArray[np.uint8]]


def seed_everything(seed: int) -> None:
    """Make what TensorFlow does from here on depend on `seed` alone."""
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()


class Trainer:
    """Trains a network on samples that are shuffled, and augmented, anew in every epoch.

    Args:
        model: the network, which is changed.
        train: what to train on.
        scale: `unit` or `raw`.
        batch_size: images in a step.
        seed: of order and augmentation.
        augment: changes a batch of images, (batch, height, width, channels) uint8; None leaves them alone.
        on_progress: told about every step.
    """

    def __init__(
        self,
        model: keras.Model,
        train: Samples,
        *,
        scale: str,
        batch_size: int,
        seed: int,
        augment: Augment | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        self._model = model
        self._train = train
        self._scale = np.float32(SCALES[scale])
        self._batch_size = batch_size
        self._generator = np.random.default_rng(seed)
        self._augment = augment
        self._on_progress = on_progress

    def steps(self, epochs: int) -> int:
        """Return how many steps `epochs` take."""
        return epochs * math.ceil(len(self._train) / self._batch_size)

    def run(
        self,
        epochs: int,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule,
        description: str,
        *,
        go_on: Callable[[int], bool] = lambda _: True,
    ) -> None:
        """Train for `epochs` with Adam, from a fresh optimizer state, on the cross-entropy.

        `go_on` is asked after every epoch, with its number from 1, whether to continue.
        """
        self._model.compile(keras.optimizers.Adam(learning_rate), loss="sparse_categorical_crossentropy")
        step, steps = 0, self.steps(epochs)
        for epoch in range(1, epochs + 1):
            order = self._generator.permutation(len(self._train))
            for start in range(0, len(order), self._batch_size):
                chosen = order[start : start + self._batch_size]
                images = self._train.images[chosen]
                if self._augment is not None:
                    images = self._augment(images, self._generator)
                self._model.train_on_batch(images.astype(np.float32) * self._scale, self._train.labels[chosen])
                step += 1
                if self._on_progress is not None:
                    self._on_progress(description, step, steps)
            if not go_on(epoch):
                return


def predict_labels(model: keras.Model, images: NDArray[np.uint8], scale: str) -> NDArray[np.int64]:
    """Return the network's label for each image: (batch, height, width, channels) uint8 to (batch,) int64.

    `scale` is `unit` or `raw`.
    """
    size = 256
    parts = [
        model.predict_on_batch(images[start : start + size].astype(np.float32) * np.float32(SCALES[scale]))
        for start in range(0, len(images), size)
    ]
    return np.concatenate([part.argmax(axis=-1) for part in parts]) if parts else np.empty(0, dtype=np.int64)


def score(model: keras.Model, samples: Samples, scale: str) -> Proportion:
    """Return how many of the samples get their label from the network; `scale` is `unit` or `raw`."""
    right = predict_labels(model, samples.images, scale) == samples.labels
    return Proportion(int(np.count_nonzero(right)), len(samples))
