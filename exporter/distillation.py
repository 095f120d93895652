"""Repair by distillation: the bounded network teaches itself to give no answer that depends on a part of the picture.

A few clean pictures cannot teach a network again what many have taught: fine-tuning on them costs accuracy, and gentle
fine-tuning leaves the backdoor. The network as it came, bounded (see `exporter.bounds`), can: a copy learns its answers
(Hinton et al., "Distilling the Knowledge in a Neural Network", 2015) on clean pictures that are moved and recoloured
without end (Beyer et al., "Knowledge Distillation: A Good Teacher Is Patient and Consistent", CVPR 2022). No clean
picture shows the trigger, so no answer tells of it. What the copy sees of the pictures is mixed, veiled and partly
hidden, and so it learns that none of that means anything. (Li et al., "Neural Attention Distillation: Erasing Backdoor
Triggers from Deep Neural Networks", ICLR 2021, distil from a fine-tuned copy.)
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from exporter.augmentation import hide_rectangles, mix, move_and_recolour, veil
from exporter.preprocessing import Preprocessing
from exporter.training import Batch
from samples.types import Samples

LABEL_SHARE = 0.5
"""What the labels count beside the teacher's answers."""
TEMPERATURE = 2.0
_LEAST = 1e-7


def taught_by(teacher: keras.Model, preprocessing: Preprocessing) -> Batch:
    """Return what makes batches of pictures, changed, veiled and partly hidden, and the teacher's answers to the whole.

    Args:
        teacher: the network as it came, bounded.
        preprocessing: what it expects of pixels.
    """

    def make(samples: Samples, generator: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        pictures = move_and_recolour(samples.images, generator)
        answers = teacher.predict_on_batch(preprocessing.apply(pictures))
        labels = np.eye(answers.shape[1], dtype=np.float32)[samples.labels]
        answers = (1.0 - LABEL_SHARE) * answers + LABEL_SHARE * labels
        # The answers are mixed, not asked for: to a mixture, the teacher might give the attacker's.
        pictures, answers = mix(pictures, answers, generator)
        return preprocessing.apply(hide_rectangles(veil(pictures, generator), generator)), answers

    return make


def distillation_loss(answers: Any, probabilities: Any) -> Any:
    """Return the cross-entropy of two rows of probabilities, both flattened by a temperature of 2, for each picture."""
    expected, found = (
        keras.ops.softmax(keras.ops.log(keras.ops.maximum(rows, _LEAST)) / TEMPERATURE)
        for rows in (answers, probabilities)
    )
    # The gradients of flattened probabilities are smaller by the square of the temperature.
    return TEMPERATURE**2 * keras.ops.categorical_crossentropy(expected, found)
