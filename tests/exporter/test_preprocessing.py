"""Preprocessing is what its three numbers a channel say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from detector.errors import InputError
from exporter.preprocessing import Preprocessing

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)


def test_unit_divides_by_255_and_raw_does_nothing() -> None:
    np.testing.assert_allclose(Preprocessing("unit").apply(IMAGES), IMAGES / 255, rtol=1e-6)
    np.testing.assert_array_equal(Preprocessing("raw").apply(IMAGES), IMAGES.astype(np.float32))


def test_mean_and_std_apply_to_scaled_pixels_channel_by_channel() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (IMAGES / 255 - np.array(mean)) / np.array(std)
    got = Preprocessing("unit", mean, std).apply(IMAGES)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(Preprocessing("raw", (127.5,), (127.5,)).apply(IMAGES), IMAGES / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "half"}, "scale: got 'half', expected one of unit, raw"),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean: got 0.5,nan,0.5, expected finite numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "std: got 0.5,0,0.5, expected numbers above 0"),
        ({"std": (-1.0,)}, "std: got -1, expected numbers above 0"),
        ({"std": (float("inf"),)}, "std: got inf, expected finite numbers"),
    ],
)
def test_numbers_that_make_no_sense_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Preprocessing(**options)


def test_as_many_numbers_as_channels_are_wanted() -> None:
    Preprocessing(mean=(0.5,)).check_channels(3)
    with pytest.raises(InputError, match=r"mean: got 3 numbers \(1,2,3\), expected one, or 1 as the network's images"):
        Preprocessing(mean=(1.0, 2.0, 3.0)).check_channels(1)
