"""Reads the German traffic signs as this project keeps them for measurements: 32x32, in sheets of WebP.

Stallkamp et al., "Man vs. computer: Benchmarking machine learning algorithms for traffic sign recognition", Neural
Networks 32, 2012.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detector.errors import DataError
from samples.types import Samples


def read_gtsrb(folder: Path) -> tuple[Samples, Samples]:
    """Return the training signs, in groups of one physical sign each, and the test signs.

    Args:
        folder: `manifest.json` (`cols`, `h`, `w`, `sprites` of [file, split, class, count]), its sheets, and
            `train_tracks.npz` with the track of each training image, by class.

    Raises:
        DataError: there is no such data.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        with np.load(folder / "train_tracks.npz") as stored:
            tracks, track_labels = stored["track"].astype(np.int64), stored["label"].astype(np.int64)
        train, test = (_read_split(folder, manifest, split) for split in ("train", "test"))
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{folder}: cannot be read as traffic signs ({error}); see CONTRIBUTING.md") from error
    if not np.array_equal(train.labels, track_labels):
        raise DataError(f"{folder}: train_tracks.npz does not go with the sheets, expected a label for each cell")
    # Tracks are numbered anew in every class.
    groups = np.unique(np.stack([train.labels, tracks]), axis=1, return_inverse=True)[1].astype(np.int64)
    return Samples(train.images, train.labels, groups=groups.ravel()), test


def _read_split(folder: Path, manifest: dict[str, Any], split: str) -> Samples:
    height, width, columns = manifest["h"], manifest["w"], manifest["cols"]
    images, labels = [], []
    for file, belongs_to, label, count in manifest["sprites"]:
        if belongs_to != split:
            continue
        with Image.open(folder / file) as opened:
            sheet = np.asarray(opened.convert("RGB"))
        cells = sheet.reshape(-1, height, columns, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)
        images.append(cells[:count])
        labels.append(np.full(count, label, np.int64))
    return Samples(np.concatenate(images), np.concatenate(labels))
