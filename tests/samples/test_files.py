from __future__ import annotations

import io
import struct
import zipfile
import zlib
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
from samples.files import load_images

COLOUR: NDArray[np.uint8] = np.random.default_rng(1).integers(0, 256, (4, 6, 3), dtype=np.uint8)
GREY: NDArray[np.uint8] = COLOUR[:, :, 0]
ORIENTATION = 0x0112


def saved(path: Path, pixels: NDArray[Any], mode: str | None = None, **options: Any) -> Path:
    picture = Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


# Pictures


@pytest.mark.parametrize(
    ("suffix", "options"), [("png", {}), ("bmp", {}), ("ppm", {}), ("webp", {"lossless": True}), ("PNG", {})]
)
def test_lossless_pictures_come_back_pixel_by_pixel(tmp_path: Path, suffix: str, options: dict[str, Any]) -> None:
    path = saved(tmp_path / f"a.{suffix}", COLOUR, **options)
    loaded = load_images([str(path)])
    np.testing.assert_array_equal(loaded.images, COLOUR[None])
    assert loaded.images.dtype == np.uint8
    assert loaded.names == (str(path),)
    assert loaded.notes == ()


@pytest.mark.parametrize("suffix", ["jpg", "jpeg"])
def test_jpeg_comes_back_about_right(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path / f"a.{suffix}", np.full((8, 8, 3), (200, 100, 50), np.uint8), quality=95)
    assert np.abs(load_images([path]).images.astype(int) - [200, 100, 50]).max() <= 4


def test_several_files_keep_their_order(tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{value}.png", np.full((2, 2, 3), value, np.uint8)) for value in (9, 3, 7)]
    loaded = load_images(iter(paths))
    assert loaded.images[:, 0, 0, 0].tolist() == [9, 3, 7]
    assert loaded.names == tuple(map(str, paths))
    assert len(loaded) == 3


def test_grey_stays_grey_unless_colour_is_expected(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", GREY)
    np.testing.assert_array_equal(load_images([path]).images, GREY[None, :, :, None])
    as_colour = load_images([path], size=(4, 6, 3))
    np.testing.assert_array_equal(as_colour.images, np.repeat(GREY[None, :, :, None], 3, axis=3))
    assert as_colour.notes == (f"{path}: grey made colour",)


def test_colour_becomes_grey_by_luma_where_grey_is_expected(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", COLOUR)
    loaded = load_images([path], size=(4, 6, 1))
    np.testing.assert_allclose(loaded.images[0, :, :, 0], COLOUR @ [0.299, 0.587, 0.114], atol=0.51)
    assert loaded.notes == (f"{path}: colour made grey",)


def test_a_palette_picture_becomes_rgb(tmp_path: Path) -> None:
    pixels = np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8)
    np.testing.assert_array_equal(load_images([saved(tmp_path / "a.png", pixels, "P")]).images, pixels[None])


def test_a_cmyk_picture_becomes_rgb_and_says_so(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", np.full((8, 8, 3), 255, np.uint8), "CMYK")
    loaded = load_images([path])
    assert loaded.images.shape == (1, 8, 8, 3)
    assert loaded.notes == (f"{path}: CMYK made RGB",)


def test_the_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # taken with the camera on its side: turn it clockwise
    path = saved(tmp_path / "a.png", COLOUR, exif=exif)
    np.testing.assert_array_equal(load_images([path]).images[0], np.rot90(COLOUR, k=-1))


def test_an_opaque_alpha_channel_is_dropped_and_a_transparent_one_refused(tmp_path: Path) -> None:
    pixels = np.dstack([COLOUR, np.full((4, 6), 255, np.uint8)])
    np.testing.assert_array_equal(load_images([saved(tmp_path / "opaque.png", pixels)]).images, COLOUR[None])
    pixels[0, 0, 3] = 254
    path = saved(tmp_path / "see-through.png", pixels)
    with pytest.raises(DataError, match=r"see-through\.png: got transparent pixels"):
        load_images([path])
    np.testing.assert_array_equal(load_images([path], size=(4, 6, 4)).images, pixels[None])


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(colour_type: int, depth: int, channels: int) -> bytes:
    """Return a PNG of 2x2 black pixels; Pillow writes none of 16 bits in colour."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, depth, colour_type, 0, 0, 0))
    rows = (b"\0" + bytes(2 * channels * depth // 8)) * 2
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("grey.png", png(0, 16, 1)),
        ("colour.png", png(2, 16, 3)),
        ("grey-alpha.png", png(4, 16, 2)),
        ("colour-alpha.png", png(6, 16, 4)),
        ("colour.ppm", b"P6 2 1 65535\n" + bytes(12)),
        ("plain.ppm", b"P3 2 1 256\n1 2 3 4 5 6\n"),
        ("grey.ppm", b"P5 2 1 300\n" + bytes(4)),
    ],
)
def test_more_than_eight_bits_a_channel_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: got more than 8 bits a channel, expected 8; convert it first"):
        load_images([tmp_path / name])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("colour.png", png(2, 8, 3)),
        ("plain.ppm", b"P3 2 1 255\n0 0 0 0 0 0\n"),
        ("few.ppm", b"P6 2 1 100\n" + bytes(6)),
        ("bits.ppm", b"P1 2 1\n1 1\n"),
    ],
)
def test_eight_bits_and_fewer_are_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert not load_images([tmp_path / name]).images.any()


def test_an_animation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    Image.fromarray(COLOUR).save(path, save_all=True, append_images=[Image.fromarray(255 - COLOUR)], lossless=True)
    with pytest.raises(DataError, match=r"a\.webp: got an animation"):
        load_images([path])


# Sizes


def test_another_size_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", COLOUR)
    with pytest.raises(DataError, match=r"a\.png: got 4x6x3 .*expected 55x47x3; --resize"):
        load_images([path], size=(55, 47, 3))


def test_an_open_side_takes_any_length(tmp_path: Path) -> None:
    assert load_images([saved(tmp_path / "a.png", COLOUR)], size=(-1, -1, 3)).images.shape == (1, 4, 6, 3)


def test_files_of_different_sizes_are_refused(tmp_path: Path) -> None:
    paths = [saved(tmp_path / "a.png", COLOUR), saved(tmp_path / "b.png", COLOUR[:2])]
    with pytest.raises(DataError, match=r"b\.png: got 2x6x3 .*expected 4x6x3 like .*a\.png"):
        load_images(paths)


def test_resizing_happens_only_on_request_and_is_noted(tmp_path: Path) -> None:
    paths = [
        saved(tmp_path / "a.png", np.full((8, 8, 3), 77, np.uint8)),
        saved(tmp_path / "b.png", np.full((9, 5), 77, np.uint8)),
        saved(tmp_path / "c.png", np.full((4, 5, 3), 77, np.uint8)),
    ]
    np.save(tmp_path / "d.npy", np.full((2, 3, 3, 3), 77, np.uint8))
    loaded = load_images([*paths, tmp_path / "d.npy"], size=(4, 5, 3), resize=True)
    np.testing.assert_array_equal(loaded.images, np.full((5, 4, 5, 3), 77, np.uint8))
    assert loaded.notes == (
        f"{paths[0]}: resized from 8x8 to 4x5",
        f"{paths[1]}: grey made colour, resized from 9x5 to 4x5",
        f"{tmp_path / 'd.npy'}: resized from 3x3 to 4x5",
    )


def test_grey_arrays_are_resized_too(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((2, 3, 3, 1), 5, np.uint8))
    assert load_images([tmp_path / "a.npy"], size=(6, 7, 1), resize=True).images.shape == (2, 6, 7, 1)


def test_resizing_needs_a_size(tmp_path: Path) -> None:
    for size in (None, (-1, 4, 3)):
        with pytest.raises(InputError, match="resize: got size"):
            load_images([saved(tmp_path / "a.png", COLOUR)], size=size, resize=True)


def test_channels_that_no_picture_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.png: a picture has 1, 3 or 4 channels, expected 2"):
        load_images([saved(tmp_path / "a.png", COLOUR)], size=(4, 6, 2))


# Arrays


def test_npy_holds_one_image_or_many(tmp_path: Path) -> None:
    one, many = tmp_path / "one.npy", tmp_path / "many.npy"
    np.save(one, COLOUR)
    np.save(many, np.stack([COLOUR, COLOUR + 1]))
    loaded = load_images([one, many])
    np.testing.assert_array_equal(loaded.images, [COLOUR, COLOUR, COLOUR + 1])
    assert loaded.names == (str(one), f"{many}[0]", f"{many}[1]")


@pytest.mark.parametrize("array", [COLOUR.astype(np.float32), COLOUR.astype(np.int64), GREY, COLOUR[None, None]])
def test_npy_of_another_type_or_shape_is_refused(tmp_path: Path, array: NDArray[Any]) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=r"a\.npy: got .* expected uint8 of shape"):
        load_images([tmp_path / "a.npy"])


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "b.npy").write_bytes(b"\x80\x04N.")
    for name in ("a.npy", "b.npy"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read as a \.npy array"):
            load_images([tmp_path / name])


def test_an_npz_in_disguise_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", COLOUR)
    path = (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    assert zipfile.is_zipfile(path)
    with pytest.raises(DataError, match=r"a\.npy: got an \.npz archive"):
        load_images([path])


def test_an_npy_that_promises_more_than_it_holds_takes_no_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", COLOUR)
    promising = (tmp_path / "a.npy").read_bytes().replace(b"(4, 6, 3), }         ", b"(999999, 9999, 9999)}")
    assert b"999999" in promising
    (tmp_path / "a.npy").write_bytes(promising)
    with pytest.raises(DataError, match=r"a\.npy: cannot be read"):
        load_images([tmp_path / "a.npy"])


def test_an_empty_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.empty((0, 4, 6, 3), np.uint8))
    with pytest.raises(DataError, match=r"a\.npy: "):
        load_images([tmp_path / "a.npy"])


@pytest.mark.parametrize("suffix", ["h5", "hdf5"])
def test_hdf5_holds_several_images_and_rounding_them_is_noted(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"faces.{suffix}"
    with h5py.File(path, "w") as file:
        file["data"] = np.stack([COLOUR, COLOUR]).transpose(0, 3, 1, 2) * np.float32(0.5)
        file["label"] = [0, 1]
    loaded = load_images([path])
    np.testing.assert_array_equal(loaded.images, np.rint(np.stack([COLOUR, COLOUR]) * 0.5))
    assert loaded.names == (f"{path}[0]", f"{path}[1]")
    odd = 2 * np.count_nonzero(COLOUR % 2)
    assert loaded.notes == (f"{path}: `data`: {odd} of 144 values were fractions and are rounded",)


# What cannot be read


def test_no_files_are_refused() -> None:
    with pytest.raises(InputError, match="got no files"):
        load_images([])


@pytest.mark.parametrize("name", ["absent.png", "absent.npy"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: there is no such file"):
        load_images([tmp_path / name])


def test_an_unknown_kind_of_file_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.tiff: got a file of unknown kind, expected one of \.png, .*\.npy"):
        load_images([tmp_path / "a.tiff"])


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(DataError, match=r"a\.png: cannot be read as a picture"):
        load_images([tmp_path / "a.png"])


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "ppm", "npy"])
def test_a_truncated_or_foreign_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "npy":
        np.save(path, COLOUR)
    else:
        saved(path, np.tile(COLOUR, (8, 8, 1)))
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) * 2 // 3], whole[:5], b"", b"#!/bin/sh\n"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a\.{suffix}: cannot be read"):
            load_images([path])


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    for side in (10_000, 60_000):  # where Pillow warns, and where it raises
        header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        path = tmp_path / "bomb.png"
        path.write_bytes(
            b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")
        )
        with pytest.raises(DataError, match=r"bomb\.png: got a picture of more than \d+ pixels"):
            load_images([path])


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp", "webp", "ppm", "npy"])
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_damage_the_file_loads_or_is_named(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    whole = io.BytesIO()
    if kind == "npy":
        np.save(whole, COLOUR)
    else:
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        Image.fromarray(COLOUR).save(whole, kind, **({} if kind in ("bmp", "ppm") else {"exif": exif}))
    damaged = bytearray(whole.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"a.{kind}"
    path.write_bytes(damaged)
    try:
        load_images([path])
    except DataError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 - either outcome will do
