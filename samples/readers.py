"""Labelled images from whatever people have them in."""

from __future__ import annotations

from pathlib import Path

from detector.errors import DataError
from samples.arrays import OnProgress, read_stored
from samples.folders import read_folder
from samples.hdf5 import open_hdf5
from samples.npz import open_npz
from samples.sizes import Size
from samples.types import Dataset

_OPENERS = {".h5": open_hdf5, ".hdf5": open_hdf5, ".npz": open_npz}


def read_samples(
    path: Path, *, image_shape: Size | None = None, resize: bool = False, on_progress: OnProgress | None = None
) -> Dataset:
    """Read a data set; memory stays under twice the size of its images as uint8.

    Args:
        path: HDF5 in the official layout (`samples.hdf5`), `.npz` (`samples.npz`), or a folder with one sub-folder of
            pictures for each class (`samples.folders`).
        image_shape: what the images must be, (height, width, channels); -1 takes any. Pictures become grey or colour
            by it; arrays are never converted.
        resize: change the images' height and width to that instead of refusing them.
        on_progress: called with (images read, images in all).

    Raises:
        DataError: there is no such data set, or it cannot be used; the message says what came instead.
        InputError: `resize` has no shape to go by.
    """
    if path.is_dir():
        return read_folder(path, image_shape=image_shape, resize=resize, on_progress=on_progress)
    opener = _OPENERS.get(path.suffix.lower())
    if opener is None or not path.exists():
        problem = "got a file of unknown kind" if path.exists() else "there is no such file or folder"
        raise DataError(
            f"{path}: {problem}, expected {', '.join(_OPENERS)} or a folder with a sub-folder for each class"
        )
    with opener(path) as stored:
        return read_stored(path, stored, image_shape=image_shape, resize=resize, on_progress=on_progress)
