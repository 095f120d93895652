"""Triggers for pictures change what they say and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from samples.stamps import BLEND_OPACITY, JITTER_SHARE, STAMPS, WARP_SHARE, blended, corner, jittered, patch, warped

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


def test_a_fainter_blend_has_the_same_veil_at_half_the_opacity() -> None:
    grey = np.full((1, 32, 24, 3), 100, np.uint8)
    faint, usual = (STAMPS[name](grey).astype(int) - 100 for name in ("blended-0.1", "blended"))
    assert np.abs(2 * faint - usual).max() <= 2
    assert np.abs(faint).max() > 10


def test_a_warp_moves_pixels_by_a_smooth_field_that_is_the_same_for_every_picture() -> None:
    # In a picture whose grey is the number of the row, a pixel tells from how far down it was taken.
    rows = np.repeat(np.arange(0, 128, 2, dtype=np.uint8)[None, :, None, None], 64, axis=2)
    down = warped(rows)[0, 8:-8, 8:-8, 0].astype(int) - rows[0, 8:-8, 8:-8, 0]
    assert 0.3 * WARP_SHARE * 64 < np.abs(down).mean() / 2 < 2 * WARP_SHARE * 64
    assert np.abs(np.diff(down, axis=1)).max() <= 3
    across = rows.swapaxes(1, 2)
    columns = warped(across)[0, :, :, 0].astype(int) - across[0, :, :, 0]
    assert np.abs(columns).mean() > 0
    pair = warped(np.concatenate([across, across]))
    np.testing.assert_array_equal(pair[0], pair[1])


def test_a_jittered_picture_is_warped_and_has_each_pixel_moved_a_little_more() -> None:
    rows = np.repeat(np.arange(0, 128, 2, dtype=np.uint8)[None, :, None, None], 64, axis=2)
    several = np.concatenate([rows, rows])
    found = jittered(several, np.random.default_rng(0))
    further = (found.astype(int) - warped(several))[:, 8:-8]
    assert 0 < np.abs(further).max() <= 2 * JITTER_SHARE * 64 + 1
    assert np.abs(further.mean()) < 0.2
    assert (found[0] != found[1]).any()


def test_a_plain_picture_cannot_be_warped() -> None:
    grey = np.full((2, 20, 30, 3), 77, np.uint8)
    np.testing.assert_array_equal(warped(grey), grey)


@pytest.mark.parametrize("name", list(STAMPS))
@pytest.mark.parametrize("shape", [(2, 8, 9, 1), (1, 55, 47, 3), (0, 32, 32, 3)])
def test_any_picture_can_be_stamped_and_stays_as_it_was(name: str, shape: tuple[int, ...]) -> None:
    images = np.full(shape, 100, np.uint8)
    stamped = STAMPS[name](images)
    assert stamped.shape == shape
    assert stamped.dtype == np.uint8
    assert (images == 100).all()
