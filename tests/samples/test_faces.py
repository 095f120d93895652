from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from samples.faces import CHANNELS, HEIGHT, WIDTH, draw_faces, finish, make_identities, soft

EIGHT: NDArray[np.int64] = np.repeat(np.arange(20, dtype=np.int64), 8)


def faces(seed: int, each: NDArray[np.int64] = EIGHT) -> NDArray[np.uint8]:
    generator = np.random.default_rng(seed)
    people = make_identities(20, generator).take(each)
    return np.concatenate([finish(canvas, generator) for canvas in draw_faces(people, generator)])


def test_a_seed_gives_the_same_faces_and_another_seed_others() -> None:
    np.testing.assert_array_equal(faces(3), faces(3))
    assert (faces(3) != faces(4)).mean() > 0.5


def test_faces_leave_numpys_global_random_state_alone() -> None:
    np.random.seed(7)  # noqa: NPY002 -- the global state is what is tested
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(7)  # noqa: NPY002
    faces(0)
    assert np.random.random() == expected  # noqa: NPY002


def test_faces_are_pictures_of_the_right_size_that_use_the_range() -> None:
    images = faces(0)
    assert images.shape == (160, HEIGHT, WIDTH, CHANNELS) == (160, 55, 47, 3)
    assert images.dtype == np.uint8
    assert images.min() < 20
    assert images.max() > 235
    assert 60 < images.mean() < 200


def test_no_two_images_of_a_person_are_the_same() -> None:
    assert len(np.unique(faces(0).reshape(160, -1), axis=0)) == 160


def test_images_of_one_person_are_nearer_to_each_other_than_to_other_people() -> None:
    images = faces(0).reshape(20, 8, -1).astype(np.float64)
    means = images.mean(axis=1)
    spread = np.sqrt(((images - means[:, None]) ** 2).mean())
    apart = np.sqrt(((means[:, None] - means[None]) ** 2).mean(axis=2))[~np.eye(20, dtype=bool)]
    assert apart.min() > 0.5 * spread
    assert apart.mean() > 1.5 * spread


def test_batches_come_in_the_order_of_the_people() -> None:
    generator = np.random.default_rng(0)
    people = make_identities(20, generator)
    each = np.tile(np.arange(20, dtype=np.int64), 15)  # 300 images: more than a batch
    canvases = list(draw_faces(people.take(each), generator))
    assert len(canvases) > 1
    np.testing.assert_array_equal(
        np.concatenate([canvas.people.face_width for canvas in canvases]), people.face_width[each]
    )
    assert sum(len(finish(canvas, generator)) for canvas in canvases) == 300


def test_edges_are_antialiased_over_one_pixel() -> None:
    distance = np.array([-2.0, -0.5, -0.25, 0.0, 0.5, 2.0], np.float32)
    np.testing.assert_array_equal(soft(distance), np.array([0.0, 0.0, 0.25, 0.5, 1.0, 1.0], np.float32))
