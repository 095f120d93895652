"""Data sets as folders of pictures: one sub-folder for each class."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from detector.errors import DataError
from samples.arrays import OnProgress
from samples.files import PICTURE_SUFFIXES, read_picture
from samples.sizes import Size, check_resize, check_size, fitted, sides
from samples.types import Dataset, Samples

CLASSES_FILE = "classes.txt"
_NAMES_SHOWN = 4

_GTSRB_NAME = re.compile(r"(\d{5})_\d{5}")
"""Track and frame, as in the training pictures of the German Traffic Sign Recognition Benchmark."""


def read_folder(
    folder: Path, *, image_shape: Size | None = None, resize: bool = False, on_progress: OnProgress | None = None
) -> Dataset:
    """Read pictures from the class folders of a folder, class by class and in the order of their names.

    The label of a picture is the line of its class folder in `classes.txt` (from 0), if the folder has such a file;
    else the number that the class folder is named by, if all are; else its rank in alphabetical order. Hidden entries
    and files that are no pictures are left out and counted in the notes. Where pictures are named as those of GTSRB,
    the frames of one track are one group; a picture among them that is named otherwise is a group of its own.

    Args:
        folder: holds the class folders.
        image_shape: what the images must be; it makes grey of colour and the reverse. None: as the first picture is.
        resize: change the images' height and width to that instead of refusing them.
        on_progress: called with (pictures read, pictures in all).

    Raises:
        DataError: the folder is not laid out so, or a picture cannot be used; the message names it.
        InputError: `resize` has no shape to go by.
    """
    check_resize(image_shape, resize)
    skipped: list[Path] = []
    class_folders, notes = _numbered(folder, _class_folders(folder, skipped))
    pictures = [(label, path) for label, found in class_folders.items() for path in _pictures(folder, found, skipped)]
    if skipped:
        notes.append(f"left out as no pictures: {len(skipped)}, such as {skipped[0].relative_to(folder)}")
    groups, grouping = _tracks(folder, pictures)
    images, conversions = _read(pictures, image_shape, resize, on_progress)
    samples = Samples(images, np.array([label for label, _ in pictures], np.int64), groups=groups)
    return Dataset(
        samples, (*notes, *grouping, *conversions), {label: found.name for label, found in class_folders.items()}
    )


def _read(
    pictures: list[tuple[int, Path]], image_shape: Size | None, resize: bool, on_progress: OnProgress | None
) -> tuple[NDArray[np.uint8], list[str]]:
    """Return (count, height, width, channels), and what was done to how many pictures."""
    channels = image_shape[2] if image_shape is not None and image_shape[2] > 0 else None
    conversions: dict[str, list[Path]] = {}
    images = np.empty((0, 0, 0, 0), np.uint8)
    for index, (_, path) in enumerate(pictures):
        found, done = read_picture(path, channels)
        picture = fitted(path, found, image_shape, resize=resize)
        if picture.shape != found.shape:
            done.append(f"resized to {sides(picture.shape[1:3])}")
        if index == 0:
            images = np.empty((len(pictures), *picture.shape[1:]), np.uint8)
        _, height, width, depth = images.shape
        check_size(path, picture.shape, (height, width, depth), like=str(pictures[0][1]))
        images[index] = picture[0]
        for conversion in done:
            conversions.setdefault(conversion, []).append(path)
        if on_progress is not None:
            on_progress(index + 1, len(pictures))
    return images, [
        f"{what}: {len(paths)} of {len(pictures)} pictures, such as {paths[0]}" for what, paths in conversions.items()
    ]


def _entries(folder: Path, inside: Path, skipped: list[Path]) -> tuple[list[Path], list[Path]]:
    """Return the folders and the pictures in `inside`, by name; the rest goes to `skipped`."""
    folders, pictures = [], []
    try:
        for entry in sorted(inside.iterdir()):
            if entry.name.startswith("."):
                skipped.append(entry)
            elif entry.is_dir():
                folders.append(entry)
            elif entry.suffix.lower() in PICTURE_SUFFIXES:
                pictures.append(entry)
            elif entry != folder / CLASSES_FILE:
                skipped.append(entry)
    except OSError as error:
        raise DataError(f"{inside}: cannot be listed: {error}") from error
    for entry in folders + pictures:
        _check_inside(folder, entry)
    for entry in pictures:
        if not entry.is_file():  # to open a pipe is to wait for ever
            raise DataError(f"{entry}: is not a file, expected a picture")
    return folders, pictures


def _check_inside(folder: Path, entry: Path) -> None:
    """Refuse a link that leads out of the folder: nobody meant the files there to be read."""
    if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(os.path.realpath(folder)):
        raise DataError(f"{entry}: is a link that leads out of {folder}, expected everything in it; copy what is meant")


def _class_folders(folder: Path, skipped: list[Path]) -> list[Path]:
    class_folders, loose = _entries(folder, folder, skipped)
    if not class_folders:
        raise DataError(f"{folder}: has no class folders, expected one sub-folder with pictures for each class")
    if loose:
        raise DataError(f"{loose[0]}: lies beside the class folders, expected every picture in one of them")
    return class_folders


def _pictures(folder: Path, class_folder: Path, skipped: list[Path]) -> list[Path]:
    nested, pictures = _entries(folder, class_folder, skipped)
    if nested:
        raise DataError(f"{nested[0]}: is a folder in a class folder, expected pictures only; one folder is one class")
    if not pictures:
        raise DataError(
            f"{class_folder}: has no pictures, expected some ({', '.join(PICTURE_SUFFIXES)}); fill it, or remove it"
        )
    return pictures


def _numbered(folder: Path, class_folders: list[Path]) -> tuple[dict[int, Path], list[str]]:
    """Return the class folders by label, ascending, and a note on how they were numbered."""
    names = [found.name for found in class_folders]
    hint = ""
    if (folder / CLASSES_FILE).exists():
        labels = _listed(folder, names)
        note = f"labels are the lines of {CLASSES_FILE}, from 0"
    elif all(name.isascii() and name.isdecimal() for name in names):
        labels = {name: int(name) for name in names}
        note = "labels are the numbers that the class folders are named by"
        if list(labels.values()) != list(range(len(names))):
            hint = (
                "; Keras' image_dataset_from_directory numbers them in alphabetical order instead: for a network that "
                f"was trained so, list them in that order in {CLASSES_FILE}"
            )
    else:
        labels = {name: rank for rank, name in enumerate(names)}
        note = (
            "labels are ranks of the class folders in alphabetical order, as Keras' image_dataset_from_directory "
            "numbers them"
        )
        hint = f"; for a network that was trained with other numbers, list the folders in its order in {CLASSES_FILE}"
    by_label: dict[int, Path] = {}
    for found in class_folders:
        other = by_label.setdefault(labels[found.name], found)
        if other != found:
            raise DataError(f"{found}: is class {labels[found.name]} as {other.name} is, expected one folder a class")
    by_label = dict(sorted(by_label.items()))
    shown = [f"{found.name} -> {label}" for label, found in by_label.items()]
    more = [f"{len(shown) - _NAMES_SHOWN} more"] if len(shown) > _NAMES_SHOWN else []
    return by_label, [f"{note} ({', '.join([*shown[:_NAMES_SHOWN], *more])}){hint}"]


def _listed(folder: Path, names: list[str]) -> Mapping[str, int]:
    """Return the line, from 0, at which `classes.txt` lists each class folder."""
    path = folder / CLASSES_FILE
    _check_inside(folder, path)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error
    listed = [line for line in lines if line]
    labels = {name: label for label, name in enumerate(listed)}
    if len(labels) < len(listed):
        twice = next(name for label, name in enumerate(listed) if labels[name] != label)
        raise DataError(f"{path}: lists {twice} twice, expected every class folder once, one a line")
    missing = [name for name in names if name not in labels]
    if missing:
        raise DataError(f"{path}: does not list the class folder {missing[0]}, expected every one, one a line")
    return labels


def _tracks(folder: Path, pictures: list[tuple[int, Path]]) -> tuple[NDArray[np.int64] | None, list[str]]:
    """Return a number for each track of each class, where any picture is named by track and frame, and what to say."""
    tracks: list[tuple[int, str]] = []
    others: list[Path] = []
    for label, path in pictures:
        match = _GTSRB_NAME.fullmatch(path.stem)
        # A whole file name is the number of no track: the picture has a group to itself.
        tracks.append((label, path.name if match is None else match[1]))
        if match is None:
            others.append(path)
    if len(others) == len(pictures):
        return None, []
    notes = ["files are named TRACK_FRAME as in GTSRB: the frames of a track stay together"]
    if others:
        notes.append(
            f"not named so, each taken for a track of its own: {len(others)} of {len(pictures)} pictures, such as "
            f"{others[0].relative_to(folder)}"
        )
    numbers = {track: number for number, track in enumerate(dict.fromkeys(tracks))}
    return np.array([numbers[track] for track in tracks], np.int64), notes
