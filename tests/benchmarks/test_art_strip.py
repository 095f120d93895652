"""What is wrong with the entropy of the Adversarial Robustness Toolbox, on predictions made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.detection.art_strip import art_entropies
from detector.strip import entropy_bits

COUNT = 4
SURE = np.full(COUNT, 0.01 / (COUNT - 1)) + np.eye(COUNT) * (0.99 - 0.01 / (COUNT - 1))
"""One row for each class, of which the network is sure."""


def entropies(rows: NDArray[np.float64]) -> tuple[float, float]:
    """Return STRIP's entropy of one image whose perturbations get these rows, and the toolbox's."""

    def predict(images: NDArray[np.float32]) -> NDArray[np.float32]:
        return rows[: len(images)].astype(np.float32)

    image = np.zeros((1, 2, 2, 3), np.uint8)
    theirs = art_entropies(predict, image, image, COUNT, 0, lambda *_: None)
    return float(entropy_bits(rows[None])[0]), float(theirs[0])


def test_a_trigger_that_always_wins_has_the_highest_entropy_there_and_the_lowest_here() -> None:
    trojaned, trojaned_there = entropies(np.tile(SURE[0], (COUNT, 1)))
    clean, clean_there = entropies(np.full((COUNT, COUNT), 1 / COUNT) * 0.2 + SURE * 0.8)
    # Each class has the same probability in all four perturbations: 2 bits a class, 4 classes, over 4 perturbations.
    assert trojaned_there == pytest.approx(2.0)
    assert trojaned < clean
    assert trojaned_there > clean_there


def test_it_sums_over_the_perturbations_of_each_class() -> None:
    generator = np.random.default_rng(0)
    rows = generator.dirichlet(np.ones(COUNT), COUNT)
    shares = rows / rows.sum(axis=0)
    assert entropies(rows)[1] == pytest.approx(-(shares * np.log2(shares)).sum() / COUNT, rel=1e-5)


def test_what_it_cannot_compute_it_accepts() -> None:
    assert entropies(np.eye(COUNT)[[0, 0, 0, 0]])[1] == np.finfo(np.float64).max


def test_numpys_global_random_state_is_left_alone() -> None:
    np.random.seed(7)  # noqa: NPY002 -- the global state is what is tested
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(7)  # noqa: NPY002
    entropies(np.eye(COUNT) + 0.1)
    assert np.random.random() == expected  # noqa: NPY002
