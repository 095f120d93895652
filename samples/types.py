"""The shapes in which labelled images travel through Stripwire."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Samples:
    """Labelled images.

    Attributes:
        images: (count, height, width, channels), uint8, 0..255.
        labels: (count,), int64. Of trojaned images: the class that the attacker wants.
        true_labels: (count,), int64: the class that a trojaned image really shows, where known.
        groups: (count,), int64, where known: images of one group belong together (frames of one traffic sign, photos
            of one session), and a split puts them into one part.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    true_labels: NDArray[np.int64] | None = None
    groups: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: NDArray[np.int64]) -> Samples:
        """Return the samples at `indices`, (count,) int64, in that order."""
        true_labels = None if self.true_labels is None else self.true_labels[indices]
        groups = None if self.groups is None else self.groups[indices]
        return Samples(self.images[indices], self.labels[indices], true_labels, groups)

    def sha256(self) -> str:
        """Return a hexadecimal digest of images and labels: the same whatever kind of file they came from."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels, "<i8").data)
        return digest.hexdigest()

    def digests(self) -> dict[str, str]:
        """Return `images_sha256`, which is `sha256`, and those of true labels and groups where they are known."""
        more = {"true_labels": self.true_labels, "groups": self.groups}
        return {"images_sha256": self.sha256()} | {
            f"{name}_sha256": hashlib.sha256(np.ascontiguousarray(numbers, "<i8").data).hexdigest()
            for name, numbers in more.items()
            if numbers is not None
        }


@dataclass(frozen=True)
class Dataset:
    """A data set as it was read.

    Attributes:
        samples: its images and labels.
        notes: how labels were numbered and images grouped, and what was skipped, converted, rounded or resized; a line
            each.
        class_names: of a folder: the name of the class folder behind each label.
    """

    samples: Samples
    notes: tuple[str, ...] = ()
    class_names: Mapping[int, str] = field(default_factory=dict)
