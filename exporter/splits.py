"""Clean data in four parts that share no image: overlays, calibration, validation and repair.

An image counts once, however many copies of it there are. Images of one group (`Samples.groups`) are in one part only.
Every part gets its share of each class as exactly as whole numbers allow.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import combinations
from statistics import mode
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

from detector.errors import CalibrationError, DataError, InputError
from samples.types import Samples

Indices = NDArray[np.int64]

_PERCENT = {"calibration": 20, "validation": 15, "repair": 65}
_PERCENT_WITHOUT_REPAIR = {"calibration": 80, "validation": 20}
_LEAST = 2
"""An accuracy and a lesson take at least so many images."""
_OVERLAY_GROUPS = 5
"""At most one in so many groups gives overlays, if these are enough: the rest of its images is of no further use."""


@dataclass(frozen=True)
class Split:
    """Clean data, each image in one part only.

    Attributes:
        overlays: what STRIP blends into inputs.
        calibration: what the threshold is chosen on.
        validation: what the repair is judged by.
        repair: what the repair learns from; empty where there is none.
    """

    overlays: Samples
    calibration: Samples
    validation: Samples
    repair: Samples

    def sizes(self) -> dict[str, int]:
        """Return how many images each part has."""
        return {name: len(part) for name, part in vars(self).items()}

    def to_json(self) -> dict[str, Any]:
        """Return how many images each part has, and a digest of its images and labels."""
        return {name: {"images": len(part), "sha256": part.sha256()} for name, part in vars(self).items()}


def split_clean(
    clean: Samples | None,
    *,
    overlay_count: int,
    least_calibration: int,
    with_repair: bool,
    seed: int,
    overlays: Samples | None = None,
    calibration: Samples | None = None,
    validation: Samples | None = None,
    repair: Samples | None = None,
) -> Split:
    """Return the parts that were given, and draw the others from clean samples.

    Of the clean samples that do not become overlays, 20 % calibrate, 15 % validate and 65 % repair; without a repair,
    80 % calibrate and 20 % validate. Where some of these parts are given, the others share all of it in proportion.
    With groups, these are shares of the groups; overlays come from many of them, and what else is in those is not used.

    Args:
        clean: what to draw from; not needed if all parts are given. Images that are in a given part are not drawn, nor
            are others of their group.
        overlay_count: how many overlays there must be.
        least_calibration: how many calibration images there must be at least.
        with_repair: whether there is a repair; if not, its part is empty.
        seed: the same one draws the same parts.
        overlays: given overlays. The groups of given parts do not count: each file may number them in its own way.
        calibration: given calibration images.
        validation: given validation images.
        repair: given repair images.

    Raises:
        CalibrationError: there are too few images.
        DataError: two given parts share images, or there are not as many overlays as asked for.
        InputError: a part is neither given nor can it be drawn, or one is given that is of no use.
    """
    given = {"overlays": overlays, "calibration": calibration, "validation": validation, "repair": repair}
    parts = {name: part.take(_distinct(part)) for name, part in given.items() if part is not None}
    percent = _PERCENT if with_repair else _PERCENT_WITHOUT_REPAIR
    least = dict.fromkeys(percent, _LEAST) | {"calibration": least_calibration}
    _check_given(parts, overlay_count, least)
    percent = {name: share for name, share in percent.items() if name not in parts}
    drawn_overlays = 0 if "overlays" in parts else overlay_count
    if percent or drawn_overlays:
        if clean is None:
            missing = ", ".join([*(["overlays"] if drawn_overlays else []), *percent])
            raise InputError(f"clean data: got none, expected some to draw from: {missing}; or give data for each")
        units = _units(clean, parts)
        _check_enough(units, drawn_overlays, percent, least)
        drawn = _draw(units, clean.labels, drawn_overlays, percent, np.random.default_rng(seed))
        _check_drawn(drawn, len(units), least)
        parts |= {name: clean.take(indices) for name, indices in drawn.items()}
    if not with_repair:
        parts["repair"] = parts["overlays"].take(np.empty(0, np.int64))
    return Split(**parts)


def _digests(samples: Samples) -> list[bytes]:
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in samples.images]


def _distinct(samples: Samples) -> Indices:
    """Return where each image comes first, ascending."""
    first: dict[bytes, int] = {}
    for index, digest in enumerate(_digests(samples)):
        first.setdefault(digest, index)
    return np.fromiter(first.values(), np.int64)


def _check_given(parts: dict[str, Samples], overlay_count: int, least: dict[str, int]) -> None:
    """Refuse given parts that share images, are too small, or of no use."""
    digests = {name: set(_digests(part)) for name, part in parts.items()}
    common = {(one, two): len(digests[one] & digests[two]) for one, two in combinations(digests, 2)}
    shared = [f"{one} and {two} share {count}" for (one, two), count in common.items() if count]
    if shared:
        raise DataError(f"given parts: {', '.join(shared)} images, expected no image in two parts; remove it from one")
    for name, part in parts.items():
        if name == "overlays":
            if len(part) != overlay_count:
                raise DataError(
                    f"overlays: got {len(part)} distinct images, expected {overlay_count}; "
                    f"give as many, or ask for {len(part)} overlays"
                )
        elif name not in least:
            raise InputError(f"{name} data: got some, expected none where nothing is repaired")
        elif len(part) < least[name]:
            raise CalibrationError(
                f"{name} data: got {len(part)} distinct images, expected at least {least[name]}; give more"
                + (", or a higher target FRR" if name == "calibration" else "")
            )


def _units(clean: Samples, taken: dict[str, Samples]) -> list[Indices]:
    """Return the groups of distinct images, each (images,), leaving out those with an image that is taken."""
    digests = _digests(clean)
    groups = range(len(clean)) if clean.groups is None else clean.groups.tolist()
    foreign = {digest for part in taken.values() for digest in _digests(part)}
    barred = {group for group, digest in zip(groups, digests, strict=True) if digest in foreign}
    members: dict[int, list[int]] = {}
    for index in _distinct(clean).tolist():
        if groups[index] not in barred:
            members.setdefault(groups[index], []).append(index)
    return [np.array(indices, np.int64) for indices in members.values()]


def _check_enough(units: list[Indices], overlay_count: int, percent: dict[str, int], least: dict[str, int]) -> None:
    """Refuse too few images; with groups, the parts may still turn out too small."""
    count = sum(map(len, units))
    total = sum(percent.values())
    needed = overlay_count + max((-(-least[name] * total // share) for name, share in percent.items()), default=0)
    if count >= needed:
        return
    uses = [f"{overlay_count} are overlays"] if overlay_count else []
    uses += [
        f"{share / total:.0%} of the others are for {name}, of which {least[name]} are needed"
        for name, share in percent.items()
    ]
    raise CalibrationError(
        f"clean data: got {count} distinct images, expected at least {needed}: {', '.join(uses)}; "
        "give more clean images, or a higher target FRR"
    )


def _draw(
    units: list[Indices],
    labels: NDArray[np.int64],
    overlay_count: int,
    percent: dict[str, int],
    rng: np.random.Generator,
) -> dict[str, Indices]:
    """Return the indices of each part's images, in random order."""
    donors = _donors(units, overlay_count) if overlay_count else 0
    shares = percent or {"unused": 100}
    total = sum(shares.values())
    sizes = [donors, *((len(units) - donors) * share // total for share in shares.values())]
    sizes[-1] += len(units) - sum(sizes)
    names = ["overlays", *shares]
    members: dict[str, list[Indices]] = {name: [] for name in names}
    classes = np.unique([mode(labels[unit].tolist()) for unit in units], return_inverse=True)[1]
    for number, counts in enumerate(_apportioned(np.bincount(classes), np.array(sizes), rng)):
        own = rng.permutation(np.flatnonzero(classes == number))
        for name, chosen in zip(names, np.split(own, np.cumsum(counts)[:-1]), strict=True):
            members[name] += [units[index] for index in chosen]
    drawn = {name: rng.permutation(np.concatenate(members[name] or [np.empty(0, np.int64)])) for name in percent}
    if overlay_count:
        drawn["overlays"] = _spread(members["overlays"], overlay_count, rng)
    return drawn


def _donors(units: list[Indices], overlay_count: int) -> int:
    """Return how many groups the overlays come from: as many as there are overlays, unless groups are scarce."""
    from_smallest = np.cumsum(np.sort([len(unit) for unit in units]))
    always_enough = int(np.searchsorted(from_smallest, overlay_count)) + 1
    return max(always_enough, min(overlay_count, len(units) // _OVERLAY_GROUPS))


def _spread(units: list[Indices], count: int, rng: np.random.Generator) -> Indices:
    """Return so many images, as evenly from the groups as they allow."""
    ranks = np.concatenate([np.arange(len(unit)) for unit in units])
    images = np.concatenate([rng.permutation(unit) for unit in units])
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

    Args:
        samples: what to divide; copies of an image count once.
        share: of the groups that go into the first part, 0..1; of the images where there are no groups.
        rng: decides which.
    """
    units = _units(samples, {})
    taken = round(len(units) * share)
    parts = _draw(units, samples.labels, 0, {"taken": taken, "rest": len(units) - taken}, rng)
    return samples.take(parts["taken"]), samples.take(parts["rest"])
