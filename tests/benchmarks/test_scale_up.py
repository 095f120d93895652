"""SCALE-UP, worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.detection.scale_up import FACTORS, consistency, scaled, standardized


def test_pixels_are_multiplied_and_stay_within_their_range() -> None:
    image = np.array([0, 10, 20, 200], np.uint8).reshape(1, 2, 2, 1)
    copies = scaled(image)
    assert copies.shape == (1, 1 + len(FACTORS), 2, 2, 1)
    assert copies.reshape(len(copies[0]), 4).tolist() == [
        [0, 10, 20, 200],
        [0, 30, 60, 255],
        [0, 50, 100, 255],
        [0, 70, 140, 255],
        [0, 90, 180, 255],
        [0, 110, 220, 255],
    ]


def test_the_share_of_copies_that_keep_the_label_counts_and_the_image_itself_does_not() -> None:
    labels = np.array([[7, 7, 7, 7, 7, 7], [7, 1, 2, 3, 4, 5], [7, 7, 7, 7, 3, 3]])
    assert consistency(labels) == pytest.approx([1.0, 0.0, 0.6])


def test_the_data_limited_variant_is_the_distance_from_the_mean_of_the_class_that_is_seen() -> None:
    clean = np.array([0.2, 0.6, 0.8, 1.0])
    # Class 0 has mean 0.4 and deviation 0.2, class 1 mean 0.9 and deviation 0.1.
    shown = np.array([0, 0, 1, 1])
    found = standardized(np.array([0.8, 0.8, 1.0]), np.array([0, 1, 1]), clean, shown)
    assert found == pytest.approx([2.0, -1.0, 1.0])


def test_a_class_that_says_too_little_borrows_from_all() -> None:
    clean, shown = np.array([0.2, 0.6, 0.6]), np.array([0, 1, 1])
    deviation = clean.std()
    found = standardized(np.array([0.4, 1.0, 1.0]), np.array([0, 1, 5]), clean, shown)
    assert found == pytest.approx([0.2 / deviation, 0.4 / deviation, (1.0 - clean.mean()) / deviation])
