"""Triggers for pictures change what they say and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from detector.errors import InputError
from samples.stamps import BLEND_OPACITY, STAMPS, blended, corner, find_stamp, patch

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 32, 24, 3), dtype=np.uint8)


def test_a_patch_is_a_chequered_square_one_pixel_from_the_lower_right_corner() -> None:
    stamped = patch(IMAGES)
    changed = (stamped != IMAGES).any(axis=(0, 3))
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (27, 30, 19, 22)
    assert stamped[0, 27:31, 19:23, 0].tolist() == [[255, 0, 255, 0], [0, 255, 0, 255]] * 2


def test_a_corner_is_striped_and_at_the_other_end() -> None:
    stamped = corner(IMAGES)
    rows, columns = np.nonzero((stamped != IMAGES).any(axis=(0, 3)))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 4, 1, 4)
    assert (stamped[:, 1, 1:5] == [255, 0, 0]).all()
    assert (stamped[:, 2, 1:5] == [0, 0, 255]).all()


def test_a_blend_adds_the_same_veil_to_every_picture() -> None:
    white, black = (blended(np.full((2, 32, 24, 3), value, np.uint8)).astype(int) for value in (255, 0))
    assert black.max() <= round(255 * BLEND_OPACITY)
    np.testing.assert_allclose(white - black, 255 * (1 - BLEND_OPACITY), atol=1)
    np.testing.assert_array_equal(black[0], black[1])


@pytest.mark.parametrize("name", list(STAMPS))
@pytest.mark.parametrize("shape", [(2, 8, 9, 1), (1, 55, 47, 3), (0, 32, 32, 3)])
def test_any_picture_can_be_stamped_and_stays_as_it_was(name: str, shape: tuple[int, ...]) -> None:
    images = np.full(shape, 100, np.uint8)
    stamped = find_stamp(name)(images)
    assert stamped.shape == shape
    assert stamped.dtype == np.uint8
    assert (images == 100).all()


def test_an_unknown_trigger_is_named() -> None:
    with pytest.raises(InputError, match="trigger: got 'hat', expected one of patch, corner, blended for pictures"):
        find_stamp("hat")
