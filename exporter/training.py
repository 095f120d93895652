"""Training, as both the attacker and the repair do it: deterministic under a seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from detector.statistics import Proportion
from exporter.augmentation import Augment
from exporter.preprocessing import Preprocessing
from samples.types import Samples

Progress = Callable[[str, int, int], None]
"""Called with what is going on, steps done, steps in all."""


Schedule: TypeAlias = keras.optimizers.schedules.LearningRateSchedule

OPTIMIZERS = {"adam": 1e-3, "sgd": 1e-2}
"""Optimizers and their default learning rates."""


def make_optimizer(name: str, learning_rate: float | Schedule | None = None) -> keras.optimizers.Optimizer:
    """Return a fresh optimizer: `adam`, or `sgd` with a momentum of 0.9; its default learning rate for None."""
    rate = OPTIMIZERS[name] if learning_rate is None else learning_rate
    return keras.optimizers.Adam(rate) if name == "adam" else keras.optimizers.SGD(rate, momentum=0.9)


class HeldRate(Schedule):  # type: ignore[misc]
    """Rises over the first twentieth of the steps, falls over the last three tenths as a cosine.

    Attributes:
        share: of this that is really used; can be lowered on the way.
    """

    def __init__(self, highest: float, steps: int) -> None:
        self._highest, self._steps = highest, max(1, steps)
        self._share = keras.Variable(1.0, trainable=False)

    @property
    def share(self) -> float:
        """What the rate is multiplied by, 1.0 at first."""
        return float(self._share)

    @share.setter
    def share(self, share: float) -> None:
        self._share.assign(share)

    def __call__(self, step: Any) -> Any:
        """Return the rate of a step, counted from 0."""
        done = keras.ops.cast(step, "float32") / self._steps
        rising = keras.ops.minimum(done / 0.05, 1.0)
        falling = 0.5 + 0.5 * keras.ops.cos(math.pi * keras.ops.clip((done - 0.7) / 0.3, 0.0, 1.0))
        return self._share * self._highest * rising * falling


def seed_everything(seed: int) -> None:
    """Make what TensorFlow does from here on depend on `seed` alone."""
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()


Batch: TypeAlias = Callable[[Samples, np.random.Generator], tuple[NDArray[np.float32], NDArray[Any]]]
"""Makes of some samples what the network sees, and what its loss compares its answers with."""


def labelled(preprocessing: Preprocessing, augment: Augment | None = None) -> Batch:
    """Return what makes preprocessed images, augmented before, and their labels."""

    def make(samples: Samples, generator: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        images = samples.images if augment is None else augment(samples.images, generator)
        return preprocessing.apply(images), samples.labels

    return make


class Trainer:
    """Trains a network on samples that are shuffled, and made into batches, anew in every epoch.

    Args:
        model: the network, which is changed.
        train: what to train on.
        batch: makes a batch of some of them.
        batch_size: images in a step.
        seed: of the order, and of what `batch` draws.
        loss: by its name in Keras, or a function of targets and probabilities.
        on_progress: told about every step.
    """

    def __init__(
        self,
        model: keras.Model,
        train: Samples,
        *,
        batch: Batch,
        batch_size: int,
        seed: int,
        loss: Any = "sparse_categorical_crossentropy",
        on_progress: Progress | None = None,
    ) -> None:
        self._model = model
        self._train = train
        self._batch = batch
        self._batch_size = batch_size
        self._generator = np.random.default_rng(seed)
        self._loss = loss
        self._on_progress = on_progress

    def rate(self, epochs: int, highest: float) -> HeldRate:
        """Return a learning rate that rises to `highest`, stays there for most of the steps, and falls to 0."""
        return HeldRate(highest, self._steps(epochs))

    def run(
        self,
        epochs: int,
        optimizer: keras.optimizers.Optimizer,
        description: str,
        *,
        go_on: Callable[[int], bool] = lambda _: True,
    ) -> None:
        """Train for `epochs`. `go_on` is asked after every epoch, with its number from 1, whether to continue."""
        self._model.compile(optimizer, loss=self._loss)
        step, steps = 0, self._steps(epochs)
        for epoch in range(1, epochs + 1):
            order = self._generator.permutation(len(self._train))
            for start in range(0, len(order), self._batch_size):
                chosen = self._train.take(order[start : start + self._batch_size])
                self._model.train_on_batch(*self._batch(chosen, self._generator))
                step += 1
                if self._on_progress is not None:
                    self._on_progress(description, step, steps)
            if not go_on(epoch):
                return

    def _steps(self, epochs: int) -> int:
        return epochs * math.ceil(len(self._train) / self._batch_size)


def predict_labels(model: keras.Model, images: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.int64]:
    """Return the network's label for each image: (batch, height, width, channels) uint8 to (batch,) int64."""
    size = 256
    parts = [
        model.predict_on_batch(preprocessing.apply(images[start : start + size]))
        for start in range(0, len(images), size)
    ]
    return np.concatenate([part.argmax(axis=-1) for part in parts]) if parts else np.empty(0, dtype=np.int64)


def score(model: keras.Model, samples: Samples, preprocessing: Preprocessing) -> Proportion:
    """Return how many of the samples get their label from the network."""
    right = predict_labels(model, samples.images, preprocessing) == samples.labels
    return Proportion(int(np.count_nonzero(right)), len(samples))
