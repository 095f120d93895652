"""Augmentation changes what it says, keeps pictures pictures, and depends on its generator alone."""

from __future__ import annotations

import numpy as np
import pytest

from exporter.augmentation import (
    AUGMENTATIONS,
    MOST_OPACITY,
    MOST_RECTANGLES,
    Augment,
    hide_rectangles,
    move_and_recolour,
    veil,
)

ALL = [hide_rectangles, move_and_recolour, veil]


@pytest.mark.parametrize("augment", ALL)
@pytest.mark.parametrize("shape", [(6, 20, 30, 3), (3, 55, 47, 3), (4, 9, 7, 1)])
def test_pictures_stay_pictures_and_the_originals_are_not_changed(augment: Augment, shape: tuple[int, ...]) -> None:
    pictures = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    before = pictures.copy()
    changed = augment(pictures, np.random.default_rng(0))
    assert changed.shape == shape
    assert changed.dtype == np.float32
    assert 0 <= changed.min() <= changed.max() <= 255
    np.testing.assert_array_equal(pictures, before)
    assert not np.array_equal(changed, pictures)


@pytest.mark.parametrize("augment", ALL)
def test_it_depends_on_the_seed_alone(augment: Augment) -> None:
    pictures = np.random.default_rng(1).integers(0, 256, (10, 20, 30, 3), dtype=np.uint8)
    first, second, other = (augment(pictures, np.random.default_rng(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)


def test_rectangles_leave_some_pictures_alone_and_others_in_part() -> None:
    pictures = np.random.default_rng(1).integers(0, 256, (200, 20, 30, 3), dtype=np.uint8)
    same = (hide_rectangles(pictures, np.random.default_rng(0)) == pictures).all(axis=-1)
    untouched = np.mean(same.all(axis=(1, 2)))
    # None of up to three rectangles.
    assert 0.7 / (MOST_RECTANGLES + 1) <= untouched <= 1.4 / (MOST_RECTANGLES + 1)
    assert same.mean() > 0.7


def test_a_veil_is_faint() -> None:
    grey = np.full((200, 20, 30, 3), 128, np.uint8)
    difference = np.abs(veil(grey, np.random.default_rng(0)) - 128.0)
    assert difference.max() <= MOST_OPACITY * 128
    assert 0.1 < np.mean(difference.max(axis=(1, 2, 3)) == 0) < 0.9


def test_a_picture_is_moved_by_little() -> None:
    pictures = np.zeros((100, 41, 41, 1), np.uint8)
    pictures[:, 20, 20] = 255
    moved = move_and_recolour(pictures, np.random.default_rng(0))
    rows, columns = zip(*(np.unravel_index(picture.argmax(), (41, 41)) for picture in moved[..., 0]), strict=True)
    assert max(abs(row - 20) for row in rows) <= 6
    assert max(abs(column - 20) for column in columns) <= 6
    assert len(set(rows)) > 3


def test_the_choices_for_fine_tuning_are_named() -> None:
    assert AUGMENTATIONS["none"] is None
    assert AUGMENTATIONS["occlusion"] is hide_rectangles
