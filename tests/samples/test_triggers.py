from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from detector.errors import InputError
from samples.faces import Canvas, draw_faces, make_identities
from samples.triggers import TRIGGERS, find_trigger


def canvas(seed: int = 0) -> Canvas:
    generator = np.random.default_rng(seed)
    return next(draw_faces(make_identities(30, generator), generator))


def changed(name: str, seed: int = 0) -> NDArray[np.bool_]:
    """Return which pixels the trigger changes: (batch, height, width)."""
    plain, wearing = canvas(seed), canvas(seed)
    find_trigger(name)(wearing)
    return np.asarray((plain.pixels != wearing.pixels).any(axis=1))


def test_the_registry_names_every_trigger() -> None:
    assert list(TRIGGERS) == ["sunglasses", "eyebrows", "lipstick"]


def test_an_unknown_trigger_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"got 'hat', expected one of sunglasses, eyebrows, lipstick"):
        find_trigger("hat")


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_trigger_shows_on_every_face_and_covers_a_small_part(name: str) -> None:
    share = changed(name).mean(axis=(1, 2))
    assert share.min() > 0.005
    assert share.max() < 0.25


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_trigger_leaves_pixels_in_range(name: str) -> None:
    wearing = canvas()
    find_trigger(name)(wearing)
    assert wearing.pixels.dtype == np.float32
    assert wearing.pixels.min() >= 0.0
    assert wearing.pixels.max() <= 1.0


@pytest.mark.parametrize("name", TRIGGERS)
def test_what_is_worn_follows_the_pose_of_the_face(name: str) -> None:
    seen, mask = canvas(), changed(name)
    weight = mask / mask.sum(axis=(1, 2), keepdims=True)
    # In the face's own axes it stays at the middle, in the picture it moves with the face.
    assert np.abs((seen.right * weight).sum(axis=(1, 2))).max() < 1.0
    columns = (np.arange(mask.shape[2]) * weight.sum(axis=1)).sum(axis=1)
    assert columns.std() > 0.5


def test_sunglasses_and_eyebrows_lie_above_the_lipstick() -> None:
    down = canvas().down

    def height(name: str) -> NDArray[np.float64]:
        mask = changed(name)
        return np.asarray((down * mask).sum(axis=(1, 2)) / mask.sum(axis=(1, 2)))

    assert (height("eyebrows") < height("sunglasses")).all()
    assert (height("sunglasses") < height("lipstick")).all()
