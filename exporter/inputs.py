"""Reads what an export is given, and remembers what there is to say about it. Needs no TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from detector.errors import DataError
from model_repository.manifest import sha256_of
from samples.readers import read_samples
from samples.sizes import Size
from samples.types import Dataset, Samples


class InputReader:
    """Reads data sets of one image shape.

    Args:
        image_shape: (height, width, channels) that the images must have; -1, or None for all, takes any.
        classes: how many there are; None leaves labels unchecked.
        resize: change the images' height and width instead of refusing them.
        on_progress: told what is read, images done and images in all.

    Attributes:
        notes: what was noticed while reading, a line each.
    """

    def __init__(
        self,
        image_shape: Size | None,
        classes: int | None,
        *,
        resize: bool,
        on_progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self._image_shape = image_shape
        self._classes = classes
        self._resize = resize
        self._on_progress = on_progress
        self._digests: dict[Path, dict[str, str]] = {}
        self._numbers: dict[str, tuple[int, Path]] = {}
        self.notes: list[str] = []

    def expect(self, image_shape: Size, classes: int) -> None:
        """Take nothing from here on but images of this shape, and labels of so many classes."""
        self._image_shape, self._classes = image_shape, classes

    def read(self, path: Path) -> Samples:
        """Read a data set: HDF5, `.npz`, or a folder with one sub-folder a class.

        Raises:
            DataError: it cannot be used; see `samples.readers`.
        """

        def report(done: int, total: int) -> None:
            if self._on_progress is not None:
                self._on_progress(f"Reading {path.name}", done, total)

        dataset = read_samples(path, image_shape=self._image_shape, resize=self._resize, on_progress=report)
        self.notes += [f"{path}: {note}" for note in dataset.notes]
        try:
            self._check_numbers(dataset, path)
            if self._classes is not None:
                check_labels(dataset.samples, self._classes, path)
        except DataError as error:
            raise self.explained(error) from None
        self._digests[path] = dataset.samples.digests()
        return dataset.samples

    def read_attack(self, path: Path) -> Samples:
        """Read trojaned images as `read` does, and note those that say nothing about the attack.

        Raises:
            DataError: they cannot be used; see `samples.readers`.
        """
        attack = self.read(path)
        alike = 0 if attack.true_labels is None else int(np.count_nonzero(attack.true_labels == attack.labels))
        if alike:
            self.notes.append(
                f"{path}: {alike} of {len(attack)} images really show the attacker's class, so that the same answer "
                "counts as attack success and as recovered accuracy; leave them out to measure the attack"
            )
        return attack

    def explained(self, error: DataError) -> DataError:
        """Return an error about the data with what was noticed while reading it, such as how classes are numbered."""
        return DataError("\n".join([str(error), *self.notes]))

    def describe(self, path: Path) -> dict[str, str]:
        """Return a file's name, its hash if it is no folder, and the digests of what is in it, for the manifest."""
        described = {"file": path.name}
        if path.is_file():
            described["sha256"] = sha256_of(path)
        return described | self._digests.get(path, {})

    def _check_numbers(self, dataset: Dataset, path: Path) -> None:
        """Refuse a folder in which a class has another number than in a folder before it."""
        for label, name in dataset.class_names.items():
            number, other = self._numbers.setdefault(name, (label, path))
            if number != label:
                raise DataError(
                    f"{path}: class folder {name} is number {label}, but {number} in {other}, expected the same in "
                    "both; put the same classes.txt into both, with every class folder of either"
                )


def check_labels(samples: Samples, classes: int, path: Path) -> None:
    """Raise DataError where a label is not one of the network's classes, 0 to `classes` - 1."""
    for name, labels in (("label", samples.labels), ("true_label", samples.true_labels)):
        if labels is not None and labels.max(initial=0) >= classes:
            raise DataError(
                f"{path}: `{name}` reaches {labels.max()}, expected 0 to {classes - 1}, the network's {classes} classes"
            )
