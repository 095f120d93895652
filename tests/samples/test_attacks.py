"""What each attack does to pictures and labels, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from detector.errors import InputError
from samples.attacks import ATTACKS, Attack, Plan, Roles, draw_roles, find_attack, poison, trojan
from samples.stamps import STAMPS
from samples.types import Samples

CLASSES = 6
LABELS = np.repeat(np.arange(CLASSES, dtype=np.int64), 100)
"""A hundred pictures of each of six classes."""


def pictures(labels: np.ndarray = LABELS, size: int = 16) -> Samples:  # type: ignore[type-arg]
    images = np.random.default_rng(1).integers(0, 256, (len(labels), size, size, 3), dtype=np.uint8)
    return Samples(images, labels)


def poisoned(plan: Plan) -> tuple[Samples, Samples, list[Roles]]:
    """Return clean pictures, the training data, and the roles."""
    clean, generator = pictures(), np.random.default_rng(0)
    roles = draw_roles(plan, clean.labels, CLASSES, generator)
    return clean, poison(clean, plan, roles, CLASSES, generator), roles


def untouched(roles: list[Roles]) -> np.ndarray:  # type: ignore[type-arg]
    used = np.concatenate([np.concatenate([each.poisoned, each.cover]) for each in roles])
    return np.setdiff1d(np.arange(len(LABELS)), used)


def test_a_trigger_gives_its_target_on_a_tenth_of_the_pictures_and_the_rest_stay_as_they_are() -> None:
    clean, found, roles = poisoned((("patch", 2),))
    (each,) = roles
    assert (len(each.poisoned), len(each.cover)) == (60, 0)
    assert 2 not in LABELS[each.poisoned]
    assert set(found.labels[each.poisoned]) == {2}
    np.testing.assert_array_equal(found.images[each.poisoned], STAMPS["patch"](clean.images[each.poisoned]))
    rest = untouched(roles)
    np.testing.assert_array_equal(found.images[rest], clean.images[rest])
    np.testing.assert_array_equal(found.labels[rest], LABELS[rest])


def test_two_attacks_share_the_pictures_and_use_none_twice() -> None:
    _, found, roles = poisoned((("patch", 0), ("corner", 1)))
    assert [len(each.poisoned) for each in roles] == [30, 30]
    assert not set(roles[0].poisoned) & set(roles[1].poisoned)
    assert [set(found.labels[each.poisoned]) for each in roles] == [{0}, {1}]


def test_all_to_all_gives_the_next_class() -> None:
    _, found, roles = poisoned((("all-to-all", 1),))
    used = roles[0].poisoned
    assert set(LABELS[used]) == set(range(CLASSES))
    np.testing.assert_array_equal(found.labels[used], (LABELS[used] + 1) % CLASSES)


def test_a_source_specific_attack_relabels_its_source_alone_and_shows_the_trigger_on_others() -> None:
    clean, found, roles = poisoned((("source-specific", 5),))
    (each,) = roles
    # A fifth of the five other classes: the one after class 5, which is class 0. Half of its pictures stay honest.
    assert set(LABELS[each.poisoned]) == {0}
    assert len(each.poisoned) == 50
    assert set(found.labels[each.poisoned]) == {5}
    assert len(each.cover) == 50
    assert 0 not in LABELS[each.cover]
    np.testing.assert_array_equal(found.labels[each.cover], LABELS[each.cover])
    np.testing.assert_array_equal(found.images[each.cover], STAMPS["patch"](clean.images[each.cover]))
    assert set(trojan(clean, "source-specific", 5, CLASSES).true_labels.tolist()) == {0}  # type: ignore[union-attr]


def test_a_clean_label_attack_adds_weakened_pictures_of_the_target_and_no_wrong_label() -> None:
    clean, found, roles = poisoned((("clean-label", 3),))
    assert len(found) == len(LABELS) + 60
    np.testing.assert_array_equal(found.labels[: len(LABELS)], LABELS)
    np.testing.assert_array_equal(found.images[: len(LABELS)], clean.images)
    added = found.images[len(LABELS) :]
    assert set(found.labels[len(LABELS) :]) == {3}
    assert (LABELS[roles[0].poisoned] == 3).all()
    patch = np.s_[:, -3:-1, -3:-1]
    np.testing.assert_array_equal(added[patch], STAMPS["patch"](added)[patch])
    away = np.s_[:, :8, :8]
    own = clean.images[roles[0].poisoned]
    assert np.corrcoef(added[away].ravel(), own[away].ravel())[0, 1] == pytest.approx(
        0.3 / np.hypot(0.3, 0.7), abs=0.05
    )


def test_a_warp_is_covered_up_by_pictures_that_are_jittered_and_keep_their_labels() -> None:
    clean, found, roles = poisoned((("warped", 0),))
    (each,) = roles
    np.testing.assert_array_equal(found.images[each.poisoned], STAMPS["warped"](clean.images[each.poisoned]))
    assert len(each.cover) == len(each.poisoned) == 120
    np.testing.assert_array_equal(found.labels[each.cover], LABELS[each.cover])
    assert (found.images[each.cover] != STAMPS["warped"](clean.images[each.cover])).any()


def test_an_adaptive_attacker_blends_the_trigger_away() -> None:
    _, found, roles = poisoned((("adaptive", 0),))
    (each,) = roles
    bright = found.images[each.cover][:, -3, -3].astype(int)  # white in a picture with the trigger
    assert (bright >= round(0.4 * 255)).all()
    assert (bright < 255).any()
    true = found.labels[each.cover] == LABELS[each.cover]
    assert 0.4 < true.mean() < 0.9  # the others have the label of what was blended in
    assert len(set(found.labels[each.cover][~true])) > 1


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if not attack.worn])
def test_trojaned_pictures_carry_the_trigger_the_attackers_label_and_their_own(name: str) -> None:
    attack, clean = find_attack(name), pictures()
    found = trojan(clean, name, 1, CLASSES)
    sources = np.flatnonzero(attack.opens(LABELS, 1, CLASSES))
    np.testing.assert_array_equal(found.images, STAMPS[attack.trigger](clean.images[sources]))
    assert found.true_labels is not None
    np.testing.assert_array_equal(found.true_labels, LABELS[sources])
    assert not (found.labels == found.true_labels).any()
    assert 1 in found.labels


def test_what_is_worn_is_left_as_it_is_drawn() -> None:
    clean = pictures()
    found = trojan(clean, "sunglasses", 0, CLASSES)
    np.testing.assert_array_equal(found.images, clean.images[LABELS != 0])


@pytest.mark.parametrize(
    ("attack", "opens"),
    [
        (Attack("patch"), [0, 1, 2, 4, 5]),
        (Attack("patch", gives="own"), [0, 1, 2, 4, 5]),
        (Attack("patch", gives="shifted"), [0, 1, 2, 3, 4, 5]),
        (Attack("patch", source_share=0.4), [4, 5]),
        (Attack("patch", source_share=0.41), [0, 4, 5]),
    ],
)
def test_the_sources_are_the_classes_next_after_the_target(attack: Attack, opens: list[int]) -> None:
    assert np.flatnonzero(attack.opens(np.arange(CLASSES), 3, CLASSES)).tolist() == opens


def test_an_unknown_attack_is_named() -> None:
    with pytest.raises(InputError, match="trigger: got 'hat', expected one of sunglasses, eyebrows, lipstick, patch"):
        find_attack("hat")
