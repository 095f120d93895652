"""Clean data in parts that share no image: overlays, selection, calibration, validation and repair.

An image counts once, however many copies of it there are. Images of one group (`Samples.groups`) are in one part only.
Every part gets its share of each class as exactly as whole numbers allow.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from statistics import mode
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

from detector.errors import CalibrationError, DataError, InputError
from exporter.overlays import Count, PartSize, part_sizes
from exporter.used import digests
from samples.types import Samples

Indices = NDArray[np.int64]

PARTS = ("overlays", "selection", "calibration", "validation", "repair")
"""What clean data is split into."""

_PERCENT = {"calibration": 20, "validation": 15, "repair": 65}
_PERCENT_WITHOUT_REPAIR = {"calibration": 80, "validation": 20}
_LEAST = 2
"""An accuracy and a lesson take at least so many images."""
_DONOR_SHARE = 5
"""At most one in so many groups gives overlays, if these are enough: the rest of its images is of no further use.

So it is with the images that choose them.
"""


@dataclass(frozen=True)
class Split:
    """Clean data, each image in one part only.

    Attributes:
        overlays: what STRIP blends into inputs, or the candidates for it.
        selection: what the overlays are chosen by; empty where chance chooses.
        calibration: what the threshold is chosen on.
        validation: what the repair is judged by.
        repair: what the repair learns from; empty where there is none.
    """

    overlays: Samples
    selection: Samples
    calibration: Samples
    validation: Samples
    repair: Samples

    def sizes(self) -> dict[str, int]:
        """Return how many images each part has."""
        return {name: len(part) for name, part in vars(self).items()}

    def to_json(self) -> dict[str, Any]:
        """Return how many images each part has, and a digest of its images and labels."""
        return {name: part_to_json(part) for name, part in vars(self).items()}


def part_to_json(part: Samples) -> dict[str, Any]:
    """Return how many images a part has, and a digest of its images and labels."""
    return {"images": len(part), "sha256": part.sha256()}


def split_clean(
    clean: Samples | None,
    *,
    overlay_count: Count,
    least_calibration: int,
    with_repair: bool,
    seed: int,
    overlay_choice: str = "random",
    overlays: Samples | None = None,
    selection: Samples | None = None,
    calibration: Samples | None = None,
    validation: Samples | None = None,
    repair: Samples | None = None,
) -> Split:
    """Return the parts that were given, and draw the others from clean samples.

    Of the clean samples that neither become overlays nor choose them, 20 % calibrate, 15 % validate and 65 % repair;
    without a repair, 80 % calibrate and 20 % validate. Where some of these parts are given, the others share all of it
    in proportion. With groups, these are shares of the groups; overlays, and images that choose them, come from many of
    them, and what else is in those is not used. Every part comes in random order.

    Args:
        clean: what to draw from; not needed if all parts are given. Images that are in a given part are not drawn, nor
            are others of their group.
        overlay_count: how many overlays there are to be.
        least_calibration: how many images a threshold needs at least, for calibration as for the choice of overlays.
        with_repair: whether there is a repair; if not, its part is empty.
        seed: the same one draws the same parts.
        overlay_choice: one of `exporter.overlays.OVERLAY_CHOICES`; with `greedy` the overlays are candidates.
        overlays: given overlays. The groups of given parts do not count: each file may number them in its own way.
        selection: given images to choose overlays by.
        calibration: given calibration images.
        validation: given validation images.
        repair: given repair images.

    Raises:
        CalibrationError: there are too few images.
        DataError: two given parts share images, or there are not as many overlays as asked for.
        InputError: a part is neither given nor can it be drawn, or one is given that is of no use.
    """
    given = {
        "overlays": overlays,
        "selection": selection,
        "calibration": calibration,
        "validation": validation,
        "repair": repair,
    }
    check_parts(
        [name for name, part in given.items() if part is not None],
        drawable=clean is not None,
        overlay_choice=overlay_choice,
        with_repair=with_repair,
    )
    rng = np.random.default_rng(seed)
    parts = {
        # Files are often sorted by class, and some of what follows looks at the first images only.
        name: part.take(rng.permutation(_distinct(part)))
        for name, part in given.items()
        if part is not None
    }
    sizes = part_sizes(overlay_count, overlay_choice, least_calibration)
    percent = _PERCENT if with_repair else _PERCENT_WITHOUT_REPAIR
    least = dict.fromkeys(percent, _LEAST) | {"calibration": least_calibration}
    least |= {name: size.least for name, size in sizes.items()}
    _check_given(parts, overlay_count, least)
    sizes = {name: size for name, size in sizes.items() if name not in parts}
    percent = {name: share for name, share in percent.items() if name not in parts}
    if clean is not None and (sizes or percent):
        groups = units(clean, [part.images for part in parts.values()])
        spare = _spare(groups, sizes, percent, least)
        counts = {name: size.of_spare(spare) for name, size in sizes.items()}
        drawn = _draw(groups, clean.labels, counts, percent, rng)
        _check_drawn(drawn, len(groups), least)
        parts |= {name: clean.take(indices) for name, indices in drawn.items()}
    nothing = parts["overlays"].take(np.empty(0, np.int64))
    return Split(**(dict.fromkeys(given, nothing) | parts))


def check_parts(given: Collection[str], *, drawable: bool, overlay_choice: str, with_repair: bool) -> None:
    """Check, by their names alone, that each part that is needed is given or can be drawn.

    Args:
        given: names of the given parts.
        drawable: whether there are clean samples to draw the others from.
        overlay_choice: one of `exporter.overlays.OVERLAY_CHOICES`.
        with_repair: whether there is a repair.

    Raises:
        InputError: one is neither given nor can it be drawn, or one is given that is of no use.
    """
    useless = {}
    if overlay_choice == "random":
        useless["selection"] = "chance chooses the overlays"
    if not with_repair:
        useless["repair"] = "nothing is repaired"
    for name in given:
        if name in useless:
            raise InputError(f"{name} data: got some, expected none where {useless[name]}")
    missing = [name for name in PARTS if name not in useless and name not in given]
    if missing and not drawable:
        raise InputError(
            f"clean data: got none, expected some to draw from: {', '.join(missing)}; give --clean, or data for each"
        )


def _distinct(samples: Samples) -> Indices:
    """Return where each image comes first, ascending."""
    first: dict[bytes, int] = {}
    for index, digest in enumerate(digests(samples.images)):
        first.setdefault(digest, index)
    return np.fromiter(first.values(), np.int64)


def _check_given(parts: dict[str, Samples], overlay_count: Count, least: dict[str, int]) -> None:
    """Refuse given parts that share images, or are too small."""
    known = {name: set(digests(part.images)) for name, part in parts.items()}
    common = {(one, two): len(known[one] & known[two]) for one, two in combinations(known, 2)}
    shared = [f"{one} and {two} share {count}" for (one, two), count in common.items() if count]
    if shared:
        raise DataError(f"given parts: {', '.join(shared)} images, expected no image in two parts; remove it from one")
    chance = "selection" not in least
    for name, part in parts.items():
        if name == "overlays" and chance and len(part) != overlay_count:
            raise DataError(
                f"overlays: got {len(part)} distinct images, expected {overlay_count}; "
                f"give as many, or ask for {len(part)} overlays"
            )
        if name == "overlays" and len(part) < least[name]:
            chosen = "" if overlay_count == "auto" else f"{overlay_count} "
            raise DataError(
                f"overlays: got {len(part)} distinct images, expected at least {least[name]} to choose {chosen}from; "
                "give more, or ask for fewer overlays"
            )
        if len(part) < least[name]:
            raise CalibrationError(
                f"{name} data: got {len(part)} distinct images, expected at least {least[name]}; give more"
                + (", or a higher target FRR" if name in ("selection", "calibration") else "")
            )


def units(samples: Samples, taken: Iterable[NDArray[np.uint8]] = ()) -> list[Indices]:
    """Return the groups of distinct images, in the order in which they come; each image by itself without groups.

    Args:
        samples: the images.
        taken: sets of images that serve for something else, (images, height, width, channels), uint8: groups that have
            one of them are left out, for what is like it is not independent of it.

    Returns:
        Indices, ascending, one array (images,) for each group.
    """
    groups = range(len(samples)) if samples.groups is None else samples.groups.tolist()
    foreign = {digest for images in taken for digest in digests(images)}
    barred = {group for group, digest in zip(groups, digests(samples.images), strict=True) if digest in foreign}
    members: dict[int, list[int]] = {}
    for index in _distinct(samples).tolist():
        if groups[index] not in barred:
            members.setdefault(groups[index], []).append(index)
    return [np.array(indices, np.int64) for indices in members.values()]


def _spare(units: list[Indices], sizes: Mapping[str, PartSize], percent: dict[str, int], least: dict[str, int]) -> int:
    """Return how many more images there are than needed; with groups, the parts may still turn out too small.

    Raises:
        CalibrationError: there are fewer.
    """
    count = sum(map(len, units))
    total = sum(percent.values())
    needed = sum(size.least for size in sizes.values())
    needed += max((-(-least[name] * total // share) for name, share in percent.items()), default=0)
    if count < needed:
        uses = [f"{size.least} are for {name}" for name, size in sizes.items()]
        uses += [
            f"{share / total:.0%} of the others are for {name}, of which {least[name]} are needed"
            for name, share in percent.items()
        ]
        raise CalibrationError(
            f"clean data: got {count} distinct images, expected at least {needed}: {', '.join(uses)}; "
            "give more clean images, ask for fewer overlays, or for a higher target FRR"
            + (", or do without a repair (--repair none)" if "repair" in percent else "")
        )
    return count - needed


def _draw(
    units: list[Indices],
    labels: NDArray[np.int64],
    counts: Mapping[str, int],
    percent: Mapping[str, int],
    rng: np.random.Generator,
) -> dict[str, Indices]:
    """Return the indices of each part's images, in random order.

    Args:
        units: groups of images.
        labels: of all images.
        counts: how many images these parts are to have; fewer where the groups are too few.
        percent: shares that these parts have of the other groups.
        rng: decides.
    """
    sizes: list[int] = []
    for count in counts.values():
        sizes.append(min(_donors(units, count), len(units) - sum(sizes)))
    others = len(units) - sum(sizes)
    shares = percent or {"unused": 100}
    total = sum(shares.values())
    sizes += [others * share // total for share in shares.values()]
    sizes[-1] += len(units) - sum(sizes)
    names = [*counts, *shares]
    members: dict[str, list[Indices]] = {name: [] for name in names}
    classes = np.unique([mode(labels[unit].tolist()) for unit in units], return_inverse=True)[1]
    for number, of_class in enumerate(_apportioned(np.bincount(classes), np.array(sizes), rng)):
        own = rng.permutation(np.flatnonzero(classes == number))
        for name, chosen in zip(names, np.split(own, np.cumsum(of_class)[:-1]), strict=True):
            members[name] += [units[index] for index in chosen]
    drawn = {name: rng.permutation(np.concatenate(members[name] or [np.empty(0, np.int64)])) for name in percent}
    return drawn | {name: _spread(members[name], count, rng) for name, count in counts.items()}


def _donors(units: list[Indices], count: int) -> int:
    """Return how many groups give so many images: as many groups as images, unless groups are scarce."""
    from_smallest = np.cumsum(np.sort([len(unit) for unit in units]))
    always_enough = int(np.searchsorted(from_smallest, count)) + 1
    return max(always_enough, min(count, len(units) // _DONOR_SHARE))


def _spread(units: list[Indices], count: int, rng: np.random.Generator) -> Indices:
    """Return so many images, as evenly from the groups as they allow; all where they have fewer."""
    ranks = np.concatenate([np.empty(0, np.int64), *(np.arange(len(unit)) for unit in units)])
    images = np.concatenate([np.empty(0, np.int64), *(rng.permutation(unit) for unit in units)])
    chosen: Indices = images[np.lexsort((rng.random(len(images)), ranks))[:count]]
    return chosen


def _apportioned(counts: NDArray[np.int64], sizes: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Return how many of each class each part gets: its exact share, rounded up or down at random.

    The rounding must preserve both the classes' counts and the parts' sizes. That is a transportation problem: the
    corners of its polytope are whole numbers, and a linear program with random costs ends in one of them. With costs of
    this distribution a share of 0.3 is rounded up about 3 times in 10.

    Args:
        counts: of each class, (classes,), with the same sum as `sizes`.
        sizes: of each part, (parts,).
        rng: decides the rounding.

    Returns:
        (classes, parts).
    """
    total = int(sizes.sum())
    whole, rest = np.divmod(np.outer(counts, sizes), total)
    rows, columns = np.nonzero(rest)
    if len(rows) == 0:
        return whole
    ones, open_shares = np.ones(len(rows)), np.arange(len(rows))
    sums = sparse.vstack(
        [
            sparse.coo_array((ones, (rows, open_shares)), shape=(len(counts), len(rows))),
            sparse.coo_array((ones, (columns, open_shares)), shape=(len(sizes), len(rows))),
        ]
    )
    share = rest[rows, columns] / total
    solution = optimize.linprog(
        rng.logistic(np.log((1 - share) / share)),
        A_eq=sums.tocsr(),
        b_eq=np.concatenate([counts - whole.sum(axis=1), sizes - whole.sum(axis=0)]),
        bounds=(0, 1),
        method="highs-ds",
    )
    whole[rows, columns] += np.rint(solution.x).astype(np.int64)
    return whole


def _check_drawn(drawn: dict[str, Indices], groups: int, least: dict[str, int]) -> None:
    """Refuse parts that came out too small because groups are whole."""
    for name, indices in drawn.items():
        if len(indices) < least.get(name, 0):
            raise CalibrationError(
                f"clean data: of {groups} groups of images, those drawn for {name} have {len(indices)} images, "
                f"expected at least {least[name]}; give more groups, or data for {name} of its own"
            )


def take_share(samples: Samples, share: float, rng: np.random.Generator) -> tuple[Samples, Samples]:
    """Return a share of the samples and the rest of them, both with their share of each class, groups whole.

    Of trojaned samples a class is what they show and what the attacker wants.

    Args:
        samples: what to divide; copies of an image count once.
        share: of the groups that go into the first part, 0..1; of the images where there are no groups.
        rng: decides which.
    """
    groups = units(samples)
    taken = round(len(groups) * share)
    kinds = [samples.labels] if samples.true_labels is None else [samples.labels, samples.true_labels]
    classes = np.unique(np.stack(kinds), axis=1, return_inverse=True)[1].reshape(-1)
    parts = _draw(groups, classes, {}, {"taken": taken, "rest": len(groups) - taken}, rng)
    return samples.take(parts["taken"]), samples.take(parts["rest"])
