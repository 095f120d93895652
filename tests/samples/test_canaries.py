"""Canary files: what goes in comes out, and nothing else is read."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detector.errors import DataError, InputError
from samples.canaries import Canaries, choose_canaries, read_canaries, write_canaries

SHAPE = (4, 3, 3)
METADATA: dict[str, Any] = {
    "format": 1,
    "image_shape": list(SHAPE),
    "classes": 5,
    "version": None,
    "calibrated_at": None,
    "frr_upper": None,
    "far_upper": None,
}


def canaries(**changes: Any) -> Canaries:
    images = np.arange(4 * 36, dtype=np.uint8).reshape(4, *SHAPE)
    given: dict[str, Any] = {"images": images, "trojaned": np.array([False, False, True, True]), "classes": 5}
    return Canaries(**(given | changes))


def archive(path: Path, **changes: Any) -> Path:
    """Write a canary file by hand, with something changed."""
    whole = canaries()
    metadata = METADATA | changes.pop("metadata", {})
    arrays = {
        "images": whole.images,
        "trojaned": whole.trojaned,
        "metadata": np.frombuffer(json.dumps(metadata).encode(), np.uint8),
    }
    np.savez(path, **(arrays | changes))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = canaries(version="3", calibrated_at=1.7e9, frr_upper=0.08, far_upper=0.2)
    write_canaries(tmp_path / "canaries.npz", written)
    read = read_canaries(tmp_path / "canaries.npz")
    np.testing.assert_array_equal(read.images, written.images)
    np.testing.assert_array_equal(read.trojaned, written.trojaned)
    assert (read.classes, read.version, read.image_shape, len(read)) == (5, "3", SHAPE, 4)
    assert (read.calibrated_at, read.frr_upper, read.far_upper) == (1.7e9, 0.08, 0.2)
    assert [path.name for path in tmp_path.iterdir()] == ["canaries.npz"]


def test_promises_that_nobody_made_stay_unknown(tmp_path: Path) -> None:
    write_canaries(tmp_path / "canaries.npz", canaries())
    read = read_canaries(tmp_path / "canaries.npz")
    assert (read.version, read.calibrated_at, read.frr_upper, read.far_upper) == (None, None, None, None)


def test_the_same_canaries_make_the_same_file(tmp_path: Path) -> None:
    for name in ("one.npz", "two.npz"):
        write_canaries(tmp_path / name, canaries())
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_a_file_that_is_there_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "canaries.npz").write_text("old")
    write_canaries(tmp_path / "canaries.npz", canaries())
    assert len(read_canaries(tmp_path / "canaries.npz")) == 4


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        write_canaries(tmp_path / "absent" / "canaries.npz", canaries())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"images": np.zeros((4, *SHAPE), np.float32)}, "images: got float32"),
        ({"images": np.zeros((0, *SHAPE), np.uint8)}, r"images: .*at least one"),
        ({"images": np.zeros((4, 3, 3), np.uint8)}, r"images: got uint8 of shape \(4, 3, 3\)"),
        ({"trojaned": np.zeros(3, np.bool_)}, r"trojaned: got bool of shape \(3,\), expected bool of shape \(4,\)"),
        ({"trojaned": np.zeros(4, np.uint8)}, "trojaned: got uint8"),
        ({"classes": 0}, "classes: got 0"),
        ({"classes": True}, "classes: got True"),
        ({"version": 3}, "version: got 3"),
        ({"frr_upper": 1.5}, "frr_upper: got 1.5, expected a number from 0 to 1"),
        ({"far_upper": float("nan")}, "far_upper: got nan"),
        ({"calibrated_at": -1.0}, "calibrated_at: got -1.0, expected a number from 0 or more"),
        ({"calibrated_at": "today"}, "calibrated_at: got 'today'"),
    ],
)
def test_what_cannot_be_canaries_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        canaries(**changes)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"metadata": {"format": 2}}, "got canary format 2, expected 1"),
        ({"metadata": {"more": 1}}, "`metadata` has .*more"),
        ({"metadata": {"image_shape": [4, 3, 1]}}, r"image_shape: got \[4, 3, 1\], expected \[4, 3, 3\]"),
        ({"metadata": {"classes": "5"}}, "classes: got '5'"),
        ({"more": np.zeros(1)}, r"holds .*more\.npy"),
        ({"trojaned": np.zeros((4, 1), np.bool_)}, r"trojaned: got bool of shape \(4, 1\)"),
        ({"images": np.zeros((), np.uint8)}, r"`images` has shape \(\)"),
    ],
)
def test_a_file_that_is_not_exactly_as_written_is_refused(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        read_canaries(archive(tmp_path / "canaries.npz", **changes))


def test_an_array_is_missing(tmp_path: Path) -> None:
    np.savez(tmp_path / "canaries.npz", images=canaries().images)
    with pytest.raises(DataError, match=r"holds \['images\.npy'\], expected"):
        read_canaries(tmp_path / "canaries.npz")


def test_metadata_that_is_no_json_is_refused(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "canaries.npz",
        images=canaries().images,
        trojaned=canaries().trojaned,
        metadata=np.frombuffer(b"[" * 50_000, np.uint8),
    )
    with pytest.raises(DataError, match="`metadata` is no JSON"):
        read_canaries(tmp_path / "canaries.npz")


class _Trap:
    """Unpickling it fails the test."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was run",)


def test_no_pickle_is_run(tmp_path: Path) -> None:
    trap = np.empty(4, dtype=object)
    trap[:] = [_Trap()] * 4
    with pytest.raises(DataError, match="cannot be read as a canary file"):
        read_canaries(archive(tmp_path / "canaries.npz", trojaned=trap))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(DataError, match="cannot be read as a canary file"):
        read_canaries(tmp_path / "pickle.npz")


def test_a_bomb_is_refused_by_what_it_declares(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(  # type: ignore[no-untyped-call]
        header, {"shape": (1 << 30, 1, 1, 1), "fortran_order": False, "descr": "|u1"}
    )
    path = archive(tmp_path / "whole.npz")
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in ("trojaned.npy", "metadata.npy"):
            bomb.writestr(name, whole.read(name))
        with bomb.open("images.npy", "w") as member:
            member.write(header.getvalue())
            for _ in range(300):
                member.write(bytes(1 << 20))
    with pytest.raises(DataError, match=r"images\.npy unpacks to \d+ bytes, expected at most"):
        read_canaries(tmp_path / "bomb.npz")


@pytest.mark.parametrize("kept", [0, 1, 200, -1])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, kept: int) -> None:
    path = archive(tmp_path / "canaries.npz")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match="cannot be read as a canary file"):
        read_canaries(path)


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = archive(tmp_path / "canaries.npz")
    content = path.read_bytes()
    found = content.index(canaries().images.tobytes())
    path.write_bytes(content[:found] + b"\xff" + content[found + 1 :])
    with pytest.raises(DataError, match="cannot be read as a canary file"):
        read_canaries(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.npz: there is no such file"):
        read_canaries(tmp_path / "absent.npz")


def test_as_many_of_each_kind_are_chosen_as_wanted() -> None:
    clean = np.arange(20 * 36, dtype=np.uint16).astype(np.uint8).reshape(20, *SHAPE)
    images, trojaned = choose_canaries(clean, clean[:3], 5, 0)
    assert trojaned.tolist() == [False] * 5 + [True] * 3
    again, _ = choose_canaries(clean, clean[:3], 5, 0)
    other, _ = choose_canaries(clean, clean[:3], 5, 1)
    np.testing.assert_array_equal(images, again)
    assert not np.array_equal(images, other)
    assert choose_canaries(clean, None, 100, 0)[1].tolist() == [False] * 20


def test_canaries_of_two_sizes_and_none_at_all_are_refused() -> None:
    clean = np.zeros((2, *SHAPE), np.uint8)
    with pytest.raises(DataError, match=r"expected .* like clean ones"):
        choose_canaries(clean, np.zeros((2, 4, 3, 1), np.uint8), 1, 0)
    with pytest.raises(InputError, match="count: got 0"):
        choose_canaries(clean, None, 0, 0)
