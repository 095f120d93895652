from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

import samples.arrays
from detector.errors import DataError
from samples.hdf5 import read_hdf5, write_hdf5
from samples.types import Samples

PIXELS: NDArray[np.uint8] = np.random.default_rng(1).integers(0, 256, (5, 3, 6, 4), dtype=np.uint8)
LABELS: NDArray[np.int64] = np.array([0, 3, 1, 1, 2])


def stored(path: Path, data: Any = PIXELS, label: Any = LABELS, **more: Any) -> Path:
    """Write a file as somebody else would, not through `write_hdf5`; None leaves a part out."""
    with h5py.File(path, "w") as file:
        for name, values in {"data": data, "label": label, **more}.items():
            if values is not None:
                file[name] = values
    return path


@pytest.mark.parametrize("kind", ["uint8", "float32", "float64", ">f8"])
def test_every_pixel_type_of_the_official_files_reads_the_same(tmp_path: Path, kind: str) -> None:
    found = read_hdf5(stored(tmp_path / "a.h5", PIXELS.astype(kind)))
    assert found.images.dtype == np.uint8
    assert found.images.shape == (5, 6, 4, 3)
    np.testing.assert_array_equal(found.images[2, 1, 3], PIXELS[2, :, 1, 3])
    np.testing.assert_array_equal(found.images, PIXELS.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(found.labels, LABELS)
    assert found.true_labels is None


def test_fractions_are_rounded_and_not_cut_off(tmp_path: Path) -> None:
    data = np.array([0.4, 0.6, 254.6, 255.0]).reshape(1, 1, 2, 2)
    assert read_hdf5(stored(tmp_path / "a.h5", data, [0])).images.ravel().tolist() == [0, 1, 255, 255]


def test_labels_may_be_whole_floats_in_a_column(tmp_path: Path) -> None:
    found = read_hdf5(stored(tmp_path / "a.h5", label=LABELS.astype(np.float64)[:, None]))
    assert found.labels.dtype == np.int64
    np.testing.assert_array_equal(found.labels, LABELS)


@pytest.mark.parametrize("true_labels", [None, LABELS[::-1]])
def test_what_is_written_is_read_back(tmp_path: Path, true_labels: NDArray[np.int64] | None) -> None:
    images = np.ascontiguousarray(PIXELS.transpose(0, 2, 3, 1))
    write_hdf5(tmp_path / "a.h5", Samples(images, LABELS, true_labels))
    found = read_hdf5(tmp_path / "a.h5")
    np.testing.assert_array_equal(found.images, images)
    np.testing.assert_array_equal(found.labels, LABELS)
    if true_labels is None:
        assert found.true_labels is None
    else:
        assert found.true_labels is not None
        np.testing.assert_array_equal(found.true_labels, true_labels)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["data"].shape == PIXELS.shape


def test_a_write_that_fails_leaves_the_old_file_and_no_debris(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.h5")
    before = path.read_bytes()
    unwritable = np.array([object()] * 5)
    with pytest.raises(TypeError):
        write_hdf5(path, Samples(PIXELS.transpose(0, 2, 3, 1), unwritable))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_progress_ends_at_the_whole_and_reading_goes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samples.arrays._PIECE_BYTES", 2 * PIXELS[0].nbytes)
    calls: list[tuple[int, int]] = []
    found = read_hdf5(stored(tmp_path / "a.h5"), on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(2, 5), (4, 5), (5, 5)]
    np.testing.assert_array_equal(found.images, PIXELS.transpose(0, 2, 3, 1))


def test_a_file_of_doubles_needs_less_than_twice_its_images_as_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 600  # 37 MB; the piece shrinks as the file does, against the 716 MB of the official one
    assert samples.arrays._PIECE_BYTES <= 16 << 20
    monkeypatch.setattr("samples.arrays._PIECE_BYTES", 1 << 19)
    path = stored(tmp_path / "a.h5", np.full((count, 3, 55, 47), 100.0), np.zeros(count, np.int64))
    tracemalloc.start()
    try:
        images = read_hdf5(path).images
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (images == 100).all()
    assert peak < 2 * images.nbytes


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"data": None}, r"has no `data`"),
        ({"label": None}, r"has no `label`"),
        ({"data": PIXELS[0]}, r"shape \(3, 6, 4\), expected \(count, channels, height, width\)"),
        ({"data": PIXELS.astype(np.int64)}, "is int64, expected one of uint8, float32, float64"),
        ({"data": PIXELS > 9}, "is bool"),
        ({"data": np.full(PIXELS.shape, b"9")}, "expected one of uint8"),
        ({"data": PIXELS[:0], "label": LABELS[:0]}, "expected at least one image"),
        ({"data": PIXELS.transpose(0, 2, 3, 1)}, r"looks like \(count, height, width, channels\)"),
        ({"data": PIXELS[:, :2]}, "1 or 3 channels"),
        ({"data": PIXELS + np.float32(1)}, r"from \d+ to 25[0-6], expected pixels in 0..255"),
        ({"data": PIXELS - 300.0}, "expected pixels in 0..255"),
        ({"data": np.where(PIXELS > 200, np.nan, PIXELS)}, "expected pixels in 0..255"),
        ({"data": np.full(PIXELS.shape, np.inf)}, "expected pixels in 0..255"),
        ({"data": PIXELS / 255}, "multiply it by 255"),
        ({"label": LABELS[:3]}, r"shape \(3,\), expected \(5,\): one number for each image"),
        ({"label": np.eye(4)[LABELS]}, "not one-hot"),
        ({"label": LABELS + 0.5}, "expected whole numbers"),
        ({"label": LABELS - 1}, "from -1 to 2, expected whole numbers from 0"),
        ({"label": np.full(5, np.nan)}, "expected whole numbers"),
        ({"label": np.full(5, b"cat")}, "expected whole numbers"),
        ({"true_label": LABELS[:3]}, r"`true_label` has shape \(3,\)"),
    ],
)
def test_what_is_not_the_official_layout_is_refused_by_name(tmp_path: Path, parts: Any, message: str) -> None:
    if "data" in parts and parts["data"] is not None and parts["data"].dtype == np.float32:
        parts["data"].flat[0] = 256.0
    path = stored(tmp_path / "wrong.h5", **parts)
    with pytest.raises(DataError, match=message) as caught:
        read_hdf5(path)
    assert "wrong.h5" in str(caught.value)


def test_black_images_of_floats_are_images(tmp_path: Path) -> None:
    assert not read_hdf5(stored(tmp_path / "a.h5", np.zeros((2, 1, 4, 4)), [0, 1])).images.any()


@pytest.mark.parametrize("content", [None, b"", b"not HDF5 at all", "cut"])
def test_a_file_that_is_not_whole_hdf5_is_refused(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "a.h5"
    if content == "cut":
        whole = stored(path).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.h5"):
        read_hdf5(path)


@pytest.mark.parametrize("name", ["data", "label", "true_label"])
@pytest.mark.parametrize("link", ["external", "soft"])
def test_links_are_not_followed(tmp_path: Path, name: str, link: str) -> None:
    other = stored(tmp_path / "other.h5", true_label=LABELS)
    path = stored(tmp_path / "a.h5", **{name: None})
    with h5py.File(path, "a") as file:
        if link == "soft":
            file["elsewhere"] = LABELS
        file[name] = h5py.ExternalLink(other, name) if link == "external" else h5py.SoftLink("/elsewhere")
    with pytest.raises(DataError, match=f"`{name}` is a link"):
        read_hdf5(path)


def test_values_kept_in_another_file_are_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(PIXELS.tobytes())
    path = stored(tmp_path / "external.h5", data=None)
    with h5py.File(path, "a") as file:
        file.create_dataset("data", PIXELS.shape, np.uint8, external=[(str(secret), 0, PIXELS.nbytes)])
    with pytest.raises(DataError, match="in another file"):
        read_hdf5(path)
    layout = h5py.VirtualLayout(PIXELS.shape, np.uint8)
    layout[:] = h5py.VirtualSource(str(stored(tmp_path / "other.h5")), "data", PIXELS.shape)
    path = stored(tmp_path / "virtual.h5", data=None)
    with h5py.File(path, "a") as file:
        file.create_virtual_dataset("data", layout)
    with pytest.raises(DataError, match="in another file"):
        read_hdf5(path)


def test_a_group_in_place_of_the_images_is_refused(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.h5", data=None)
    with h5py.File(path, "a") as file:
        file.create_group("data")
    with pytest.raises(DataError, match="`data` is a group"):
        read_hdf5(path)


@pytest.mark.parametrize("name", ["data", "label", "true_label", "group"])
def test_a_data_set_that_is_declared_empty_is_refused(tmp_path: Path, name: str) -> None:
    path = stored(tmp_path / "a.h5", **{name: None})
    with h5py.File(path, "a") as file:
        file[name] = h5py.Empty("u1")
    with pytest.raises(DataError, match=rf"a\.h5: `{name}` is declared empty \(h5py\.Empty\), expected an array"):
        read_hdf5(path)


def test_a_file_that_declares_far_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.h5", data=None, label=[0])
    with h5py.File(path, "a") as file:
        file.create_dataset("data", (100_000, 3, 55, 47), np.float64)  # never written: takes no space
    with pytest.raises(DataError, match="64 times the size of the file"):
        read_hdf5(path)
