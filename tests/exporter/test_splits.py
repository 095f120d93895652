from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from detector.errors import CalibrationError, DataError, InputError
from exporter.overlays import OVERLAY_CHOICES
from exporter.splits import PARTS, Split, split_clean
from samples.types import Samples

GREEDY = {"overlay_choice": "greedy", "overlay_count": 20}


def images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return images of which no two are alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    pixels[:, 0, 0, :2] = np.stack([np.arange(count) >> 8, np.arange(count) & 255], axis=1)
    pixels[:, 0, 0, 2] = seed
    return pixels


def samples(labels: Any, groups: Any = None, seed: int = 0) -> Samples:
    labels = np.asarray(labels, np.int64)
    return Samples(images(len(labels), seed), labels, None, None if groups is None else np.asarray(groups, np.int64))


def split(clean: Samples | None, **options: Any) -> Split:
    return split_clean(
        clean, **({"overlay_count": 10, "least_calibration": 19, "with_repair": True, "seed": 0} | options)
    )


def pixels_of(part: Samples) -> set[bytes]:
    return {image.tobytes() for image in part.images}


def assert_disjoint(found: Split) -> None:
    parts = vars(found).values()
    assert len(set().union(*map(pixels_of, parts))) == sum(map(len, parts))


# What is drawn


@pytest.mark.parametrize(
    ("with_repair", "choice", "sizes"),
    [
        (True, "random", {"overlays": 10, "selection": 0, "calibration": 94, "validation": 70, "repair": 306}),
        (False, "random", {"overlays": 10, "selection": 0, "calibration": 376, "validation": 94, "repair": 0}),
        (True, "greedy", {"overlays": 64, "selection": 59, "calibration": 71, "validation": 53, "repair": 233}),
        (False, "greedy", {"overlays": 64, "selection": 68, "calibration": 278, "validation": 70, "repair": 0}),
    ],
)
def test_the_shares_are_those_of_the_images_that_are_no_overlays(
    with_repair: bool, choice: str, sizes: dict[str, int]
) -> None:
    clean = samples(np.arange(480) % 12)
    found = split(clean, with_repair=with_repair, overlay_choice=choice)
    assert found.sizes() == sizes
    assert_disjoint(found)
    assert set().union(*map(pixels_of, vars(found).values())) == pixels_of(clean)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 120), min_size=1, max_size=30),
    seed=st.integers(0, 9),
    repair=st.booleans(),
    choice=st.sampled_from(OVERLAY_CHOICES),
)
def test_every_part_gets_its_share_of_each_class_rounded_up_or_down(
    counts: list[int], seed: int, repair: bool, choice: str
) -> None:
    counts += [200]
    clean = samples(np.repeat(np.arange(len(counts)), counts))
    found = split(clean, seed=seed, with_repair=repair, overlay_choice=choice)
    assert_disjoint(found)
    assert sum(found.sizes().values()) == len(clean)
    for part in vars(found).values():
        exact = np.array(counts) * len(part) / len(clean)
        got = np.bincount(part.labels, minlength=len(counts))
        assert (got >= np.floor(exact - 1e-9)).all()
        assert (got <= np.ceil(exact + 1e-9)).all()


def test_rounding_favours_no_class() -> None:
    clean = samples(np.repeat(np.arange(4), [200, 60, 30, 10]))
    drawn = [np.bincount(split(clean, seed=seed).overlays.labels, minlength=4) for seed in range(200)]
    np.testing.assert_allclose(np.mean(drawn, axis=0), [20 / 3, 2, 1, 1 / 3], atol=0.15)


def test_labels_stay_with_their_images() -> None:
    clean = samples(np.arange(480) % 12)
    label_of = {image.tobytes(): label for image, label in zip(clean.images, clean.labels, strict=True)}
    for part in vars(split(clean)).values():
        assert [label_of[image.tobytes()] for image in part.images] == part.labels.tolist()


def test_a_split_depends_on_the_seed_alone() -> None:
    clean = samples(np.arange(480) % 12)
    first, second, other = (split(clean, seed=seed, overlay_choice="greedy").to_json() for seed in (3, 3, 4))
    assert first == second
    assert all(first[name]["sha256"] != other[name]["sha256"] for name in PARTS)


def test_images_of_a_part_are_in_no_order() -> None:
    assert np.any(np.diff(split(samples(np.repeat(np.arange(12), 40))).validation.labels) < 0)


def test_the_json_counts_images_and_names_their_digest() -> None:
    found = split(samples(np.arange(480) % 12))
    assert found.to_json() == {
        name: {"images": len(part), "sha256": part.sha256()} for name, part in vars(found).items()
    }


def test_copies_of_an_image_count_once() -> None:
    once = samples(np.arange(240) % 12)
    twice = once.take(np.concatenate([np.arange(240), np.arange(240)]))
    found = split(twice)
    assert sum(found.sizes().values()) == 240
    assert_disjoint(found)


# Groups


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 9), choice=st.sampled_from(OVERLAY_CHOICES))
def test_groups_stay_whole_and_copies_across_groups_are_in_one_part(
    data: st.DataObject, seed: int, choice: str
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=120, max_size=160))
    groups = np.repeat(np.random.default_rng(seed).permutation(len(sizes)) * 7, sizes)
    clean = samples(groups % 5, groups)
    copies = data.draw(st.lists(st.integers(0, len(clean) - 1), max_size=20))
    clean.images[copies] = clean.images[0]
    found = split(clean, seed=seed, least_calibration=2, overlay_count=5, overlay_choice=choice)
    assert_disjoint(found)
    assert (len(found.overlays) == 5) == (len(found.selection) == 0) == (choice == "random")
    seen = [set(part.groups.tolist()) for part in vars(found).values() if part.groups is not None]
    assert len(seen) == 5
    assert sum(map(len, seen)) == len(set().union(*seen))
    rest = len(set().union(*seen[2:]))
    for name, part_groups in zip(PARTS[2:], seen[2:], strict=True):
        assert abs(len(part_groups) - rest * {"calibration": 0.2, "validation": 0.15, "repair": 0.65}[name]) <= 2


def test_overlays_come_from_as_many_groups_as_there_are_overlays() -> None:
    overlays = split(samples(np.arange(3000) // 30 % 5, np.arange(3000) // 30)).overlays
    assert overlays.groups is not None
    assert len(set(overlays.groups.tolist())) == 10
    assert np.bincount(overlays.labels).tolist() == [2] * 5


def test_where_groups_are_scarce_overlays_share_them_evenly() -> None:
    found = split(samples(np.arange(1000) // 100 % 2, np.arange(1000) // 100))
    assert found.overlays.groups is not None
    assert np.unique(found.overlays.groups, return_counts=True)[1].tolist() == [5, 5]
    assert found.sizes() == {"overlays": 10, "selection": 0, "calibration": 100, "validation": 100, "repair": 600}


def test_a_group_of_several_classes_counts_as_its_most_frequent_one() -> None:
    labels = np.tile([0, 0, 1, 2, 2, 1], 100)
    assert_disjoint(split(samples(labels, np.arange(600) // 3)))


def test_too_few_groups_are_refused() -> None:
    with pytest.raises(CalibrationError, match="of 3 groups of images, those drawn for calibration have 0 images"):
        split(samples(np.zeros(300), np.arange(300) // 100))
    lopsided = np.minimum(np.arange(300), 4)
    with pytest.raises(CalibrationError, match="of 5 groups of images, those drawn for calibration have 0 images"):
        split(samples(np.zeros(300), lopsided), overlay_choice="greedy")


# Parts that are given


def test_given_parts_are_kept_and_none_of_their_images_is_drawn() -> None:
    clean = samples(np.arange(480) % 12)
    overlays, validation = clean.take(np.arange(10)), samples(np.arange(30) % 12, seed=1)
    found = split(clean, overlays=overlays, validation=validation)
    assert pixels_of(found.overlays) == pixels_of(overlays)
    assert pixels_of(found.validation) == pixels_of(validation)
    sizes = {"overlays": 10, "selection": 0, "calibration": 470 * 20 // 85, "validation": 30, "repair": 360}
    assert found.sizes() == sizes
    assert_disjoint(found)


def test_given_parts_are_shuffled_by_the_seed_with_their_labels() -> None:
    by_class = samples(np.repeat(np.arange(12), 40))
    parts = {name: samples(np.repeat(np.arange(10), 4), seed=seed) for seed, name in enumerate(PARTS[2:], start=1)}
    first, second, other = (split(by_class, seed=seed, **parts) for seed in (3, 3, 4))
    for name, part in parts.items():
        shuffled = getattr(first, name)
        assert np.any(np.diff(shuffled.labels) < 0)
        assert shuffled.labels.tolist() == (shuffled.images[:, 0, 0, 1] // 4).tolist()
        assert pixels_of(shuffled) == pixels_of(part)
    assert first.to_json() == second.to_json() != other.to_json()


def test_a_group_with_an_image_in_a_given_part_is_not_drawn() -> None:
    clean = samples(np.arange(600) % 12, np.arange(600) // 3)
    found = split(clean, overlays=Samples(clean.images[:30:3], clean.labels[:30:3]))
    drawn = set().union(*(pixels_of(part) for part in (found.calibration, found.validation, found.repair)))
    assert drawn == pixels_of(clean.take(np.arange(30, 600)))


@pytest.mark.parametrize("name", PARTS)
def test_one_part_alone_can_be_drawn(name: str) -> None:
    given_parts = {
        other: samples(np.arange(40) % 12, seed=seed) for seed, other in enumerate(PARTS, start=1) if other != name
    }
    clean = samples(np.repeat(np.arange(12), 40))
    found = split(clean, overlay_choice="greedy", **given_parts)
    drawn = {"overlays": 64, "selection": 19 + (480 - 19) // 8}.get(name, 480)
    assert found.sizes() == {other: len(part) for other, part in given_parts.items()} | {name: drawn}
    assert len(set(getattr(found, name).labels.tolist())) == 12
    assert_disjoint(found)


@pytest.mark.parametrize("with_repair", [True, False])
def test_no_clean_data_is_needed_where_all_parts_are_given(with_repair: bool) -> None:
    parts = {"overlays": samples(np.zeros(10), seed=1), "calibration": samples(np.zeros(19), seed=2)}
    parts |= {"validation": samples(np.zeros(2), seed=3)}
    if with_repair:
        parts["repair"] = samples(np.zeros(2), seed=4)
    found = split(None, with_repair=with_repair, **parts)
    assert list(found.sizes().values()) == [10, 0, 19, 2, 2 if with_repair else 0]
    assert found.repair.images.shape[1:] == (2, 2, 3)


def test_copies_in_a_given_part_count_once() -> None:
    twice = samples(np.zeros(30), seed=1).take(np.arange(60) // 2)
    assert len(split(samples(np.arange(480) % 12), calibration=twice).calibration) == 30


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"overlays": samples(np.zeros(10)), "calibration": samples(np.zeros(30)), "repair": samples(np.zeros(9))},
            DataError,
            "overlays and calibration share 10, overlays and repair share 9, calibration and repair share 9 images",
        ),
        ({"overlays": samples(np.zeros(12))}, DataError, "got 12 distinct images, expected 10; .* ask for 12 overlays"),
        (
            {"overlays": samples(np.arange(79) // 2), **GREEDY},
            DataError,
            "got 79 .* at least 80 to choose 20 from; give more",
        ),
        (
            {"selection": samples(np.zeros(18)), **GREEDY},
            CalibrationError,
            "selection data: got 18 .* at least 19; .*FRR",
        ),
        (
            {"selection": samples(np.zeros(40))},
            InputError,
            "selection data: got some, .* where chance chooses the over",
        ),
        ({"calibration": samples(np.zeros(18))}, CalibrationError, "calibration data: got 18 .* at least 19; .*FRR"),
        ({"validation": samples(np.zeros(1))}, CalibrationError, "validation data: got 1 .* at least 2; give more$"),
        ({"repair": samples(np.zeros(1))}, CalibrationError, "repair data: got 1 distinct"),
        ({"repair": samples(np.zeros(9)), "with_repair": False}, InputError, "where nothing is repaired"),
    ],
)
def test_given_parts_that_will_not_do_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        split(samples(np.arange(480) % 12, seed=1), **options)


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({}, "overlays, calibration, validation, repair"),
        ({"overlays": samples(np.zeros(10))}, "calibration, validation, repair"),
        ({"overlays": samples(np.zeros(80)), **GREEDY}, "selection, calibration, validation, repair"),
        ({"overlays": samples(np.zeros(10)), "with_repair": False}, "calibration, validation"),
    ],
)
def test_parts_that_are_neither_given_nor_to_be_drawn_are_named(options: dict[str, Any], missing: str) -> None:
    with pytest.raises(InputError, match=f"got none, expected some to draw from: {missing}; give --clean, or data for"):
        split(None, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got 50 distinct images, expected at least 105: 10 are for overlays, 20% of the others are for calibrat"),
        ({**GREEDY, "overlay_count": 100}, "expected at least 514: 400 are for overlays, 19 are for selection, 20% of"),
        ({"with_repair": False, "least_calibration": 99}, "expected at least 134: .*80% of the others.*99 are needed"),
        (
            {"calibration": samples(np.zeros(30), seed=1), "overlay_count": 45},
            "at least 56: 45 are for overlays, 19% of",
        ),
        ({"overlays": samples(np.zeros(10))}, "got 40 distinct images, expected at least 95: 20% of the others"),
    ],
)
def test_too_few_clean_images_are_refused_with_the_number_needed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        split(samples(np.arange(50) % 5), **options)


@settings(max_examples=40, deadline=None)
@given(
    overlays=st.integers(1, 40),
    least=st.integers(1, 60),
    with_repair=st.booleans(),
    choice=st.sampled_from(OVERLAY_CHOICES),
    further=st.integers(0, 500),
)
def test_the_number_named_is_enough_and_one_fewer_is_not(
    overlays: int, least: int, with_repair: bool, choice: str, further: int
) -> None:
    options: dict[str, Any] = {"overlay_count": overlays, "least_calibration": least, "with_repair": with_repair}
    options["overlay_choice"] = choice
    with pytest.raises(CalibrationError, match="expected at least") as caught:
        split(samples([0]), **options)
    needed = int(str(caught.value).split("expected at least ")[1].split(":")[0])
    found = split(samples(np.arange(needed + further) % 3), **options)
    assert found.sizes()["calibration"] >= least
    assert len(found.overlays) >= (4 * overlays if choice == "greedy" else overlays)
    with pytest.raises(CalibrationError, match=f"got {needed - 1} distinct"):
        split(samples(np.arange(needed - 1) % 3), **options)
