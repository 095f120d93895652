"""STRIP as the Adversarial Robustness Toolbox has it, to compare with: its own code, asked for its entropies.

It sums `scipy.stats.entropy(predictions, base=2, axis=0)`: for each class, how evenly its probability is spread over
the perturbations, and not, for each perturbation, how evenly it is spread over the classes. So an input that gets the
same prediction under every overlay, which is what a trigger does, has the highest such entropy that there can be, and
the toolbox rejects low ones. With many classes, the sum is mostly about those that are next to impossible.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Images, (batch, height, width, channels), 0..255, to probabilities, (batch, classes)."""


class _Listening:
    """A threshold that nothing is under, and that remembers what was compared with it."""

    __array_ufunc__ = None  # so that NumPy leaves the comparison to it

    def __init__(self) -> None:
        self.heard: list[float] = []

    def __ge__(self, entropy: object) -> bool:
        self.heard.append(float(entropy))  # type: ignore[arg-type]
        return False


def art_entropies(
    predict: Predict,
    images: NDArray[np.uint8],
    overlays: NDArray[np.uint8],
    count: int,
    seed: int,
    on_progress: Callable[[str, int, int], None],
) -> NDArray[np.float64]:
    """Return what the toolbox compares with its threshold, (images,), in bits; it rejects what is low.

    Where a class has no probability in any perturbation its entropy is not-a-number, which it accepts at any threshold:
    that is the largest number here.

    Args:
        predict: the network.
        images: (images, height, width, channels), uint8.
        overlays: likewise; for every image the toolbox draws anew from them.
        count: how many overlays an image is blended with, half and half.
        seed: of the drawing.
        on_progress: told about every image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses PyTorch
        from art.estimators.poison_mitigation.strip import STRIPMixin

    strip = STRIPMixin(predict_fn=predict, num_samples=count)
    strip.entropy_threshold, strip.validation_data = threshold, _ = _Listening(), overlays.astype(np.float32)
    # It draws from NumPy's global generator.
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        for done, image in enumerate(images.astype(np.float32), start=1):
            strip.predict(image[None])
            on_progress("Measuring ART's STRIP", done, len(images))
    finally:
        np.random.set_state(state)  # noqa: NPY002
    heard = np.array(threshold.heard)
    return np.where(np.isnan(heard), np.finfo(np.float64).max, heard)
