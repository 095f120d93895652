"""Data sets as people have them: HDF5, `.npz` and folders of pictures, read alike and refused alike."""

from __future__ import annotations

import io
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from detector.errors import DataError, InputError
from samples.hdf5 import read_hdf5, write_hdf5
from samples.readers import read_samples
from samples.types import Samples

IMAGES: NDArray[np.uint8] = np.random.default_rng(1).integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)
LABELS: NDArray[np.int64] = np.array([0, 3, 1, 1, 2])


def as_npz(path: Path, images: Any = IMAGES, labels: Any = LABELS, **more: Any) -> Path:
    np.savez(
        path, **{name: part for name, part in {"images": images, "labels": labels, **more}.items() if part is not None}
    )
    return path


def as_hdf5(path: Path, images: Any = IMAGES, labels: Any = LABELS, **more: Any) -> Path:
    """Write (count, height, width, channels) in the official layout."""
    with h5py.File(path, "w") as file:
        file["data"] = np.moveaxis(images, -1, 1)
        file["label"] = labels
        for name, part in more.items():
            file[name] = part
    return path


def picture(path: Path, pixels: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)
    return path


def as_folder(path: Path, images: Any = IMAGES, labels: Any = LABELS, *, suffix: str = "png") -> Path:
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        picture(path / f"{label:05}" / f"{index:03}.{suffix}", image)
    return path


# All three


@pytest.mark.parametrize("write", [as_npz, as_hdf5, as_folder])
def test_the_same_data_is_the_same_whatever_it_is_kept_in(tmp_path: Path, write: Callable[..., Path]) -> None:
    name = {as_npz: "a.npz", as_hdf5: "a.HDF5", as_folder: "a"}[write]
    order = np.argsort(LABELS, kind="stable")
    calls: list[tuple[int, int]] = []
    found = read_samples(
        write(tmp_path / name, IMAGES[order], LABELS[order]),
        image_shape=(6, 4, 3),
        on_progress=lambda done, total: calls.append((done, total)),
    )
    np.testing.assert_array_equal(found.samples.images, IMAGES[order])
    np.testing.assert_array_equal(found.samples.labels, LABELS[order])
    assert found.samples.images.dtype == np.uint8
    assert found.samples.labels.dtype == np.int64
    assert found.samples.sha256() == Samples(IMAGES[order], LABELS[order]).sha256()
    assert calls[-1] == (5, 5)


@pytest.mark.parametrize("write", [as_npz, as_hdf5, as_folder])
@pytest.mark.parametrize(
    ("image_shape", "expected"), [((55, 47, 3), "55x47x3"), ((6, 5, 3), "6x5x3"), ((-1, 5, 3), "anyx5x3")]
)
def test_images_of_another_size_are_refused_with_the_way_out(
    tmp_path: Path, write: Callable[..., Path], image_shape: tuple[int, int, int], expected: str
) -> None:
    name = {as_npz: "a.npz", as_hdf5: "a.h5", as_folder: "a"}[write]
    with pytest.raises(
        DataError, match=rf"a.*: got 6x4x3 \(height x width x channels\), expected {expected}; --resize"
    ):
        read_samples(write(tmp_path / name), image_shape=image_shape)


@pytest.mark.parametrize("write", [as_npz, as_hdf5, as_folder])
def test_images_are_resized_only_on_request_and_that_is_noted(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write(tmp_path / {as_npz: "a.npz", as_hdf5: "a.h5", as_folder: "a"}[write], np.full((5, 6, 4, 3), 77))
    if path.is_file():
        path = write(path, np.full((5, 6, 4, 3), 77.0))
    found = read_samples(path, image_shape=(9, 8, 3), resize=True)
    np.testing.assert_array_equal(found.samples.images, np.full((5, 9, 8, 3), 77))
    assert "resized" in found.notes[-1]
    assert "9x8" in found.notes[-1]
    with pytest.raises(InputError, match="resize: got size None"):
        read_samples(path, resize=True)


@pytest.mark.parametrize(("write", "name"), [(as_npz, "a.npz"), (as_hdf5, "a.h5")])
def test_arrays_are_never_made_grey_or_colour(tmp_path: Path, write: Callable[..., Path], name: str) -> None:
    with pytest.raises(DataError, match=r"got 8x8x3 .*expected 8x8x1"):
        read_samples(write(tmp_path / name), image_shape=(8, 8, 1), resize=True)


@pytest.mark.parametrize("write", [as_npz, as_hdf5])
@pytest.mark.parametrize("kind", ["uint8", "float32", "float64", ">f8"])
def test_every_pixel_type_reads_the_same(tmp_path: Path, write: Callable[..., Path], kind: str) -> None:
    path = write(tmp_path / {as_npz: "a.npz", as_hdf5: "a.h5"}[write], IMAGES.astype(kind), LABELS.astype(np.float64))
    found = read_samples(path)
    np.testing.assert_array_equal(found.samples.images, IMAGES)
    np.testing.assert_array_equal(found.samples.labels, LABELS)
    assert found.notes == ()


@pytest.mark.parametrize(("write", "name"), [(as_npz, "a.npz"), (as_hdf5, "a.h5")])
@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES.astype(np.int32), LABELS, "is int32, expected one of uint8, float32, float64 in 0..255"),
        (IMAGES > 9, LABELS, "is bool, expected one of"),
        (IMAGES[:0], LABELS[:0], "expected at least one image"),
        (IMAGES[:, :0], LABELS, "expected at least one image"),
        (IMAGES - 300.0, LABELS, r"has values from -\d+ to -\d+, expected pixels in 0..255"),
        (IMAGES + 300.0, LABELS, "expected pixels in 0..255"),
        (np.where(IMAGES > 200, np.nan, IMAGES), LABELS, "has values from nan to nan, expected pixels in 0..255"),
        (np.full(IMAGES.shape, np.inf), LABELS, "expected pixels in 0..255"),
        (IMAGES / 255, LABELS, "expected pixels in 0..255; multiply it by 255"),
        (IMAGES[..., :2], LABELS, "expected .count, .*1 or 3 channels"),
        (IMAGES, LABELS[:3], r"has shape \(3,\), expected \(5,\): one number for each image"),
        (IMAGES, np.int64(3), r"has shape \(\), expected \(5,\)"),
        (IMAGES, np.eye(4)[LABELS], "not one-hot"),
        (IMAGES, LABELS + 0.5, "expected whole numbers from 0"),
        (IMAGES, LABELS - 1, "has values from -1 to 2, expected whole numbers from 0"),
        (IMAGES, np.full(5, np.nan), "expected whole numbers from 0"),
        (IMAGES, np.full(5, 1e300), "expected whole numbers from 0"),
        (IMAGES, np.full(5, b"cat"), "expected whole numbers$"),
    ],
)
def test_arrays_that_are_no_data_set_are_refused_in_the_same_words(
    tmp_path: Path, write: Callable[..., Path], name: str, images: Any, labels: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_samples(write(tmp_path / name, images, labels))
    assert str(caught.value).startswith(f"{tmp_path / name}: `")


@pytest.mark.parametrize(("write", "name"), [(as_npz, "a.npz"), (as_hdf5, "a.h5")])
def test_fractions_are_rounded_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., Path], name: str
) -> None:
    monkeypatch.setattr("samples.arrays._PIECE_BYTES", 1)  # an image at a time
    images = IMAGES.astype(np.float64)
    images[:2, 0, 0, 0] = 0.6
    found = read_samples(write(tmp_path / name, images))
    assert found.samples.images[:2, 0, 0, 0].tolist() == [1, 1]
    kept = "images" if name == "a.npz" else "data"
    assert found.notes == (f"`{kept}`: 2 of 360 values were fractions and are rounded",)


@pytest.mark.parametrize("part", ["true_label", "group"])
@pytest.mark.parametrize(("write", "name"), [(as_npz, "a.npz"), (as_hdf5, "a.h5")])
def test_true_labels_and_groups_are_read_and_checked_as_labels_are(
    tmp_path: Path, write: Callable[..., Path], name: str, part: str
) -> None:
    numbers = np.array([7, 7, 10**12, 8, 8])
    found = read_samples(write(tmp_path / name, **{part: numbers})).samples
    given_part, absent = (found.true_labels, found.groups)[:: 1 if part == "true_label" else -1]
    assert given_part is not None
    assert absent is None
    np.testing.assert_array_equal(given_part, numbers)
    with pytest.raises(DataError, match=rf"`{part}` has shape \(4,\), expected \(5,\)"):
        read_samples(write(tmp_path / name, **{part: numbers[:4]}))


def test_digests_tell_apart_what_differs_in_any_part() -> None:
    plain = Samples(IMAGES, LABELS)
    assert plain.digests() == {"images_sha256": plain.sha256()}
    numbers = np.arange(5)
    both = Samples(IMAGES, LABELS, numbers, numbers + 1).digests()
    assert both.keys() == {"images_sha256", "true_labels_sha256", "groups_sha256"}
    assert len(set(both.values())) == 3
    other = Samples(IMAGES, LABELS, numbers, numbers).digests()
    assert [name for name in both if both[name] != other[name]] == ["groups_sha256"]


def test_groups_are_written_and_go_with_their_images(tmp_path: Path) -> None:
    written = Samples(IMAGES, LABELS, None, np.array([4, 4, 9, 9, 9]))
    write_hdf5(tmp_path / "a.h5", written)
    found = read_hdf5(tmp_path / "a.h5").take(np.array([4, 0]))
    assert found.groups is not None
    assert found.groups.tolist() == [9, 4]


@pytest.mark.parametrize("name", ["absent", "absent.h5", "absent.npz"])
def test_what_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: there is no such file or folder, expected \.h5, \.hdf5, \.npz or a"):
        read_samples(tmp_path / name)


def test_a_file_of_unknown_kind_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IMAGES)
    with pytest.raises(DataError, match=r"a\.npy: got a file of unknown kind, expected \.h5"):
        read_samples(tmp_path / "a.npy")


@pytest.mark.parametrize("kind", ["npz", "packed npz", "h5", "folder"])
def test_reading_needs_less_than_twice_the_images_as_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    count = 600  # 37 MB of float64; the piece shrinks as the file does, against the official one's 716 MB
    monkeypatch.setattr("samples.arrays._PIECE_BYTES", 1 << 19)
    images = np.random.default_rng(0).integers(0, 256, (count, 55, 47, 3)).astype(np.float64)
    if kind == "folder":
        path = as_folder(tmp_path / "a", images, np.arange(count) % 7, suffix="ppm")
    elif kind == "h5":
        path = as_hdf5(tmp_path / "a.h5", images, np.arange(count))
    else:
        path = tmp_path / "a.npz"
        (np.savez if kind == "npz" else np.savez_compressed)(path, x=images, y=np.arange(count))
    del images
    tracemalloc.start()
    try:
        found = read_samples(path).samples.images
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.nbytes == count * 55 * 47 * 3
    assert peak < 2 * found.nbytes


# .npz


@pytest.mark.parametrize("names", [("images", "labels"), ("data", "label"), ("x", "y")])
def test_npz_goes_by_the_usual_names(tmp_path: Path, names: tuple[str, str]) -> None:
    arrays: dict[str, Any] = {names[0]: IMAGES, names[1]: LABELS}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    np.testing.assert_array_equal(read_samples(tmp_path / "a.npz").samples.images, IMAGES)


def test_npz_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samples.arrays._PIECE_BYTES", 2 * IMAGES[0].nbytes)
    calls: list[tuple[int, int]] = []
    found = read_samples(as_npz(tmp_path / "a.npz"), on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(2, 5), (4, 5), (5, 5)]
    np.testing.assert_array_equal(found.samples.images, IMAGES)


def test_npz_may_have_channels_first_or_none(tmp_path: Path) -> None:
    first = read_samples(as_npz(tmp_path / "first.npz", IMAGES.transpose(0, 3, 1, 2).copy())).samples.images
    np.testing.assert_array_equal(first, IMAGES)
    grey = read_samples(as_npz(tmp_path / "grey.npz", IMAGES[..., 0].copy()), image_shape=(6, 4, 1)).samples.images
    np.testing.assert_array_equal(grey, IMAGES[..., :1])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"images": None},
            r"has no images with labels \(but \['labels'\]\), expected `images` with `labels` or `data`",
        ),
        ({"labels": None, "label": LABELS}, "which may be images and labels in several ways"),
        ({"x": IMAGES, "y": LABELS}, r"\['images', 'labels', 'x', 'y'\], which may be"),
        ({"group": LABELS, "groups": LABELS}, "both `groups` and `group`"),
        ({"true_label": LABELS, "true_labels": LABELS}, "both `true_labels` and `true_label`"),
        ({"images": IMAGES[:, :3]}, r"\(5, 3, 4, 3\), in which both the second and the last axis may be the channels"),
        ({"images": IMAGES[0, 0]}, r"has shape \(4, 3\), expected \(count, height, width, 1 or 3 channels\)"),
        ({"images": IMAGES[..., None]}, r"has shape \(5, 6, 4, 3, 1\), expected"),
        ({"images": np.asfortranarray(IMAGES)}, "column by column .*ascontiguousarray"),
        ({"images": IMAGES.astype("complex64")}, "is complex64, expected one of"),
        ({"images": np.zeros((5, 6, 4, 3), [("a", "u1")])}, "expected one of uint8"),
    ],
)
def test_npz_that_leaves_a_doubt_is_refused_by_name(tmp_path: Path, parts: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_samples(as_npz(tmp_path / "a.npz", **parts))
    assert str(caught.value).startswith(f"{tmp_path / 'a.npz'}: ")


def npz_of(path: Path, images: bytes, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """Write an archive whose member `images` is made of these bytes."""
    labels = io.BytesIO()
    np.save(labels, LABELS)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("images.npy", images)
        archive.writestr("labels.npy", labels.getvalue())
    return path


def saved(array: NDArray[Any]) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def test_npz_with_pickled_objects_is_never_unpickled(tmp_path: Path) -> None:
    path = as_npz(tmp_path / "a.npz", np.array([{"a": 1}] * 5, dtype=object), LABELS)
    with pytest.raises(DataError, match=r"expected \(count, height"):
        read_samples(path)
    path = as_npz(tmp_path / "b.npz", np.full(IMAGES.shape, None, dtype=object), LABELS)
    with pytest.raises(DataError, match="`images` is object, expected one of"):
        read_samples(path)
    path = as_npz(tmp_path / "c.npz", IMAGES, np.array([print] * 5, dtype=object))
    with pytest.raises(DataError, match="`labels` is object, expected whole numbers"):
        read_samples(path)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (b"(999999999, 99, 99, 3)", "over 64 times the size of the file"),
        (b"(9, 6, 4, 3)", r"`labels` has shape \(5,\), expected \(9,\)"),
        (b"(5, 6, 3, 3)", r"goes on after the shape \(5, 6, 3, 3\)"),
        (b"(-5, 6, 4, 3)", "cannot be read as .npz"),
    ],
)
def test_npz_that_declares_another_shape_than_it_holds_is_refused(
    tmp_path: Path, declared: bytes, message: str
) -> None:
    content = saved(IMAGES)
    padding = b" " * (len(declared) - len(b"(5, 6, 4, 3)"))
    content = content.replace(b"(5, 6, 4, 3), }" + padding, declared + b", }")
    assert declared in content
    with pytest.raises(DataError, match=message):
        read_samples(npz_of(tmp_path / "a.npz", content))


def test_npz_that_ends_early_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`images` ends before the shape \(5, 6, 4, 3\)"):
        read_samples(npz_of(tmp_path / "a.npz", saved(IMAGES)[:-7]))


def test_npz_that_unpacks_to_far_more_than_it_takes_is_refused(tmp_path: Path) -> None:
    path = npz_of(tmp_path / "a.npz", saved(np.zeros((5, 3800, 3800, 1), np.uint8)))
    with pytest.raises(DataError, match="`images` unpacks to over 64 times the size of the file"):
        read_samples(path)


def test_npz_packed_as_numpy_never_does_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`images` is packed in a way .*savez_compressed"):
        read_samples(npz_of(tmp_path / "a.npz", saved(IMAGES), zipfile.ZIP_BZIP2))


@pytest.mark.parametrize("content", [b"", b"not an archive", None])
def test_a_file_that_is_not_whole_npz_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = as_npz(tmp_path / "a.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(DataError, match=r"a\.npz: cannot be read as \.npz"):
        read_samples(path)


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("packed", [True, False])
def test_whatever_the_damage_npz_loads_or_is_named(tmp_path: Path, data: st.DataObject, packed: bool) -> None:
    path = tmp_path / "a.npz"
    (np.savez_compressed if packed else np.savez)(path, images=IMAGES, labels=LABELS)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        read_samples(path)
    except DataError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 - either outcome will do


# Folders


def test_a_folder_as_gtsrb_comes_reads_with_its_tracks_as_groups(tmp_path: Path) -> None:
    folder, rng = tmp_path / "Images", np.random.default_rng(2)
    for label in (0, 1, 14):
        for track in range(2):
            for frame in range(3):
                height, width = rng.integers(20, 60, 2)
                name = f"{label:05}/{track:05}_{frame:05}.ppm"
                picture(folder / name, np.full((height, width, 3), 10 * label + track))
        (folder / f"{label:05}" / f"GT-{label:05}.csv").write_text("Filename;Width;Height\n")
    (folder / "Readme.txt").write_text("about")
    found = read_samples(folder, image_shape=(32, 32, 3), resize=True)
    assert found.samples.images.shape == (18, 32, 32, 3)
    assert found.samples.images[:, 0, 0, 0].tolist() == [0] * 3 + [1] * 3 + [10] * 3 + [11] * 3 + [140] * 3 + [141] * 3
    assert found.samples.labels.tolist() == [0] * 6 + [1] * 6 + [14] * 6
    assert found.samples.groups is not None
    assert found.samples.groups.tolist() == np.repeat(np.arange(6), 3).tolist()
    assert found.class_names == {0: "00000", 1: "00001", 14: "00014"}
    assert found.notes[0].startswith(
        "labels are the numbers that the class folders are named by (00000 -> 0, 00001 -> 1, 00014 -> 14); Keras'"
    )
    assert found.notes[1:] == (
        "left out as no pictures: 4, such as Readme.txt",
        "files are named TRACK_FRAME as in GTSRB: the frames of a track stay together",
        f"resized to 32x32: 18 of 18 pictures, such as {folder / '00000' / '00000_00000.ppm'}",
    )


def test_a_picture_that_belongs_to_no_track_leaves_the_others_in_theirs(tmp_path: Path) -> None:
    for name in ("00000_00000", "00000_00001", "00001_00000", "extra", "other"):
        picture(tmp_path / "a" / "stop" / f"{name}.png", np.zeros((4, 4, 3)))
    picture(tmp_path / "a" / "yield" / "extra.png", np.zeros((4, 4, 3)))
    found = read_samples(tmp_path / "a")
    assert found.samples.groups is not None
    assert found.samples.groups.tolist() == [0, 0, 1, 2, 3, 4]
    assert found.notes[1:] == (
        "files are named TRACK_FRAME as in GTSRB: the frames of a track stay together",
        "not named so, each taken for a track of its own: 3 of 6 pictures, such as stop/extra.png",
    )


def test_pictures_of_any_other_name_have_no_groups(tmp_path: Path) -> None:
    assert read_samples(as_folder(tmp_path / "a")).samples.groups is None


def one_each(folder: Path, *names: str) -> Path:
    """Make class folders of one picture whose grey is the rank of its name among these."""
    for rank, name in enumerate(names):
        picture(folder / name / "a.png", np.full((4, 4, 3), rank))
    return folder


def labels_of(folder: Path, *names: str) -> dict[str, int]:
    found = read_samples(folder)
    return {
        names[rank]: label for rank, label in zip(found.samples.images[:, 0, 0, 0], found.samples.labels, strict=True)
    }


def test_class_folders_are_numbered_as_keras_does(tmp_path: Path) -> None:
    names = ("dog", "cat", "Zebra", "1")
    folder = one_each(tmp_path / "a", *names)
    assert labels_of(folder, *names) == {"1": 0, "Zebra": 1, "cat": 2, "dog": 3}
    found = read_samples(folder)
    assert found.class_names == {0: "1", 1: "Zebra", 2: "cat", 3: "dog"}
    assert found.notes == (
        "labels are ranks of the class folders in alphabetical order, as Keras' image_dataset_from_directory numbers "
        "them (1 -> 0, Zebra -> 1, cat -> 2, dog -> 3); for a network that was trained with other numbers, list the "
        "folders in its order in classes.txt",
    )


def test_class_folders_named_by_numbers_have_these_as_labels(tmp_path: Path) -> None:
    names = tuple(map(str, range(12)))
    folder = one_each(tmp_path / "a", *names)
    assert labels_of(folder, *names) == {str(label): label for label in range(12)}
    assert (
        "in alphabetical order instead: for a network that was trained so, list them" in read_samples(folder).notes[0]
    )
    padded = one_each(tmp_path / "b", *(f"{label:02}" for label in range(12)))
    assert read_samples(padded).notes == (
        "labels are the numbers that the class folders are named by (00 -> 0, 01 -> 1, 02 -> 2, 03 -> 3, 8 more)",
    )


def test_classes_txt_decides_over_the_names(tmp_path: Path) -> None:
    names = ("0", "10", "2")
    folder = one_each(tmp_path / "a", *names)
    (folder / "classes.txt").write_bytes("\ufeff2\r\nhorse\r\n10\r\n\r\n0\r\n".encode())
    assert labels_of(folder, *names) == {"2": 0, "10": 2, "0": 3}
    assert read_samples(folder).class_names == {0: "2", 2: "10", 3: "0"}
    assert read_samples(folder).notes == ("labels are the lines of classes.txt, from 0 (2 -> 0, 10 -> 2, 0 -> 3)",)


def test_pictures_become_grey_or_colour_as_the_shape_says(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "cat" / "1.png", np.full((4, 4), 7))
    picture(tmp_path / "a" / "dog" / "2.webp", np.full((4, 4, 3), 9), lossless=True)
    found = read_samples(tmp_path / "a", image_shape=(4, 4, 3))
    assert found.samples.images[:, 0, 0].tolist() == [[7, 7, 7], [9, 9, 9]]
    assert found.notes[-1] == f"grey made colour: 1 of 2 pictures, such as {tmp_path / 'a' / 'cat' / '1.png'}"
    assert read_samples(tmp_path / "a", image_shape=(4, 4, 1)).samples.images[:, 0, 0].tolist() == [[7], [9]]


def test_hidden_entries_and_thumbnails_are_left_out(tmp_path: Path) -> None:
    folder = one_each(tmp_path / "a", "cat")
    for name in (".DS_Store", "cat/.hidden.png", "cat/Thumbs.db", ".git/HEAD", "cat/.ipynb_checkpoints/a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"nothing")
    found = read_samples(folder)
    assert len(found.samples) == 1
    assert found.notes[-1] == "left out as no pictures: 5, such as .DS_Store"


def test_a_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    folder = one_each(tmp_path / "a", "cat", "dog")
    (folder / "cat" / "b.png").symlink_to(folder / "dog" / "a.png")
    assert read_samples(folder).samples.labels.tolist() == [0, 0, 1]


def spoil_nothing(folder: Path) -> None:
    for entry in sorted(folder.rglob("*"), reverse=True):
        entry.unlink() if entry.is_file() else entry.rmdir()


def add_damage(folder: Path) -> None:
    whole = (folder / "cat" / "a.png").read_bytes()
    (folder / "dog" / "b.png").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_nothing, "a: has no class folders, expected one sub-folder with pictures for each class"),
        (lambda a: picture(a / "loose.png", np.zeros((4, 4, 3))), r"loose\.png: lies beside the class folders"),
        (lambda a: (a / "empty").mkdir(), "empty: has no pictures, expected some"),
        (lambda a: picture(a / "dog" / "small" / "a.png", np.zeros((4, 4, 3))), "dog/small: is a folder in a class"),
        (add_damage, r"dog/b\.png: cannot be read as a picture"),
        (
            lambda a: picture(a / "dog" / "b.png", np.zeros((4, 5, 3))),
            r"b\.png: got 4x5x3 .*4x4x3 like .*a\.png; --res",
        ),
        (lambda a: (a / "dog" / "b.png").symlink_to("/etc/hostname"), r"dog/b\.png: is a link that leads out of"),
        (lambda a: (a / "fox").symlink_to("/usr"), "fox: is a link that leads out of"),
        (lambda a: (a / "fox").symlink_to(".."), "fox: is a link that leads out of"),
        (lambda a: (a / "fox").symlink_to("."), "fox/cat: is a folder in a class folder"),
        (lambda a: (a / "classes.txt").symlink_to("/etc/passwd"), r"classes\.txt: is a link that leads out of"),
        (lambda a: (a / "dog" / "b.png").symlink_to("b.png"), r"dog/b\.png: is not a file"),
        (lambda a: (a / "dog" / "b.png").symlink_to("gone.png"), r"dog/b\.png: is not a file"),
        (lambda a: os.mkfifo(a / "dog" / "b.png"), r"dog/b\.png: is not a file"),
        (lambda a: (a / "classes.txt").write_text("cat\n"), r"classes\.txt: does not list the class folder dog"),
        (lambda a: (a / "classes.txt").write_text("cat\ndog\ncat\n"), r"classes\.txt: lists cat twice"),
        (lambda a: (a / "classes.txt").write_bytes(b"\xff\xfe\n"), r"classes\.txt: cannot be read as text"),
        (lambda a: (a / "classes.txt").mkdir(), r"classes\.txt: cannot be read as text"),
    ],
)
def test_a_folder_that_is_no_data_set_is_refused_by_name(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    folder = one_each(tmp_path / "a", "cat", "dog")
    spoil(folder)
    with pytest.raises(DataError, match=message) as caught:
        read_samples(folder)
    assert str(caught.value).startswith(str(folder))


def test_two_folders_of_one_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a/1: is class 1 as 01 is, expected one folder a class"):
        read_samples(one_each(tmp_path / "a", "01", "1"))


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    folder = one_each(tmp_path / "a", "cat")
    monkeypatch.setattr(Path, "iterdir", refuse)  # root, who runs many a CI, may list everything
    with pytest.raises(DataError, match=r"a: cannot be listed: .*Permission denied"):
        read_samples(folder)
