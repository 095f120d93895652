"""The greedy choice of overlays, against choosing by trying everything."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from detector.calibration import calibrate
from detector.errors import InputError
from detector.scores import DETECTORS, Evidence, score_bits
from exporter.overlays import (
    PartSize,
    check_overlay_options,
    choose_greedily,
    enough_overlays,
    low_entropies,
    part_sizes,
)


def threshold(
    entropies: np.ndarray,  # type: ignore[type-arg]
    chosen: list[int],
    target_frr: float,
    detector: str = "strip",
) -> float:
    """Return what the calibration would choose with these overlays, in float64."""
    return calibrate(Evidence(score_bits(entropies.astype(np.float64)[:, chosen], detector)), target_frr).threshold_bits


@pytest.fixture(params=range(5))
def entropies(request: pytest.FixtureRequest) -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(request.param).gamma(2.0, 1.0, (39, 7)).astype(np.float32)


def test_the_first_overlay_is_the_best_of_all(entropies: np.ndarray) -> None:  # type: ignore[type-arg]
    (first,) = choose_greedily(entropies, 1, 0.1)
    assert first == max(range(7), key=lambda one: threshold(entropies, [one], 0.1))


@pytest.mark.parametrize("detector", DETECTORS)
def test_every_further_overlay_is_the_best_beside_those_chosen(
    entropies: np.ndarray,  # type: ignore[type-arg]
    detector: str,
) -> None:
    chosen = choose_greedily(entropies, 7, 0.1, detector).tolist()
    assert sorted(chosen) == list(range(7))
    for count in range(1, 7):
        before, left = chosen[:count], chosen[count:]
        reached = {one: threshold(entropies, [*before, one], 0.1, detector) for one in left}
        assert reached[chosen[count]] == pytest.approx(max(reached.values()))


def test_the_choice_comes_near_the_best_of_all_sets_and_beats_the_mean_one(
    entropies: np.ndarray,  # type: ignore[type-arg]
) -> None:
    chosen = choose_greedily(entropies, 3, 0.1).tolist()
    every = [threshold(entropies, list(indices), 0.1) for indices in combinations(range(7), 3)]
    assert threshold(entropies, chosen, 0.1) <= max(every)
    assert threshold(entropies, chosen, 0.1) > np.mean(every)


def test_of_equal_overlays_the_first_is_chosen() -> None:
    assert choose_greedily(np.ones((5, 4)), 3, 0.5).tolist() == [0, 1, 2]


def test_the_threshold_of_every_column_is_that_of_the_calibration(
    entropies: np.ndarray,  # type: ignore[type-arg]
) -> None:
    expected = [threshold(entropies, [column], 0.1) for column in range(7)]
    np.testing.assert_allclose(low_entropies(entropies, 0.1), expected)


def test_with_too_few_images_for_the_target_the_lowest_entropy_counts() -> None:
    assert low_entropies(np.array([[3.0, 1.0], [2.0, 5.0]]), 0.01).tolist() == [2.0, 1.0]


@pytest.mark.parametrize(("images", "count"), [(5, 0), (5, 5), (0, 1)])
def test_a_choice_that_cannot_be_made_is_refused(images: int, count: int) -> None:
    with pytest.raises(InputError, match=f"overlays: got {count} to choose from 4"):
        choose_greedily(np.ones((images, 4)), count, 0.1)


@pytest.mark.parametrize(("count", "pool"), [(1, (4, 64)), (10, (40, 64)), (16, (64, 64)), (100, (400, 400))])
def test_greedy_chooses_from_four_candidates_for_each_overlay_at_least(count: int, pool: tuple[int, int]) -> None:
    assert part_sizes(count, "greedy", 19) == {"overlays": PartSize(*pool), "selection": PartSize(19, 256)}
    assert part_sizes(count, "random", 19) == {"overlays": PartSize(count, count)}


def test_a_part_grows_with_what_nothing_else_needs() -> None:
    assert [PartSize(40, 64).of_spare(spare) for spare in (0, 80, 192, 10_000)] == [40, 50, 64, 64]
    assert PartSize(10, 10).of_spare(10_000) == 10


def measured(between: float, within: float, seed: int = 0) -> np.ndarray:  # type: ignore[type-arg]
    """Return entropies of images that differ by so much, and differ so much from overlay to overlay."""
    generator = np.random.default_rng(seed)
    of_images, of_overlays = generator.normal(5.0, between, (400, 1)), generator.normal(0.0, 2.0, (1, 64))
    return np.asarray(of_images + of_overlays + generator.normal(0.0, within, (400, 64)))


@pytest.mark.parametrize(("between", "within"), [(1.0, 1.0), (1.0, 2.0), (0.5, 2.0)])
def test_enough_overlays_are_those_after_which_the_spread_hardly_falls(between: float, within: float) -> None:
    spread = [(between**2 + within**2 / count) ** 0.5 for count in range(1, 60)]
    expected = next(count for count in range(1, 60) if spread[count] >= 0.99 * spread[count - 1])
    assert enough_overlays(measured(between, within)) == pytest.approx(expected, abs=1)


def test_one_overlay_is_enough_where_all_say_the_same_and_fifty_where_chance_alone_speaks() -> None:
    assert enough_overlays(np.linspace(1.0, 2.0, 40)[:, None] + np.zeros((1, 64))) == 1
    assert enough_overlays(measured(0.0, 1.0)) in (49, 50)


def test_with_auto_as_many_are_chosen_as_are_enough() -> None:
    entropies = measured(1.0, 2.0)
    chosen = choose_greedily(entropies, "auto", 0.1)
    assert chosen.tolist() == choose_greedily(entropies, enough_overlays(entropies), 0.1).tolist()
    assert part_sizes("auto", "greedy", 19) == {"overlays": PartSize(64, 64), "selection": PartSize(19, 256)}


def test_auto_needs_images_to_look_at() -> None:
    check_overlay_options("auto", "greedy", None)
    with pytest.raises(InputError, match="overlays: got auto with overlay choice random, expected greedy"):
        check_overlay_options("auto", "random", None)
