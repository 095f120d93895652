"""Rejected inputs are kept within bounds, the oldest go first, and what cannot be kept hurts nobody."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detector import quarantine as quarantine_module
from detector.errors import DataError, RepositoryError, SetupError
from detector.quarantine import (
    BYTES_VARIABLE,
    DAYS_VARIABLE,
    DROPPED,
    FOLDER_VARIABLE,
    INPUTS_VARIABLE,
    Quarantine,
    Rejected,
    quarantined,
    read_about,
    read_rejected,
    remove,
    request_id_of,
)
from detector.serving import verdict_stage
from tests.conftest import wait_for
from tests.detector.test_serving import arguments, opinions, write_detector
from tests.detector.triton import MetricFamily, PbUtils, request

SHAPE = (5, 4, 3)


def rejected(name: str = "a.0", shape: tuple[int, ...] = SHAPE) -> Rejected:
    image = np.random.default_rng(len(name)).integers(0, 256, shape, dtype=np.uint8)
    return Rejected(name, image, 3, 0.25, 0.01, ("entropy", "nll"), "7", 1.75e9)


def names(folder: Path) -> list[str]:
    return [request_id_of(key) for key in quarantined(folder)]


def test_what_is_kept_can_be_read_again_the_newest_first(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "when it is needed"
    quarantine = Quarantine(folder)
    for name in ("a.0", "b-c.12", "d.1"):
        quarantine.offer(rejected(name))
    quarantine.close()
    assert names(folder) == ["d.1", "b-c.12", "a.0"]
    assert folder.stat().st_mode & 0o077 == 0
    for key in quarantined(folder):
        found, expected = read_rejected(folder, key), rejected(request_id_of(key))
        assert found is not None
        np.testing.assert_array_equal(found.image, expected.image)
        assert vars(found) | {"image": 0} == vars(expected) | {"image": 0}
        assert (folder / f"{key}.npz").stat().st_mode & 0o077 == 0
    assert quarantine.kept == 3


def test_the_oldest_go_when_there_are_too_many(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, most_inputs=2)
    for number in range(5):
        quarantine.offer(rejected(f"a.{number}"))
    quarantine.close()
    assert names(tmp_path) == ["a.4", "a.3"]
    assert (quarantine.kept, quarantine.removed) == (5, 3)
    # Bounds that are tighter hold from the start.
    Quarantine(tmp_path, most_inputs=1).close()
    assert names(tmp_path) == ["a.4"]


def test_the_oldest_go_when_they_are_too_large_together_and_what_is_too_large_alone_is_dropped(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, most_bytes=5000)
    for number in range(6):
        quarantine.offer(rejected(f"a.{number}", (20, 20, 3)))
    quarantine.offer(rejected("huge.0", (100, 100, 3)))
    quarantine.close()
    assert 0 < sum(file.stat().st_size for file in tmp_path.iterdir()) <= 5000
    assert names(tmp_path)[0] == "a.5"
    assert quarantine.dropped == dict.fromkeys(DROPPED, 0) | {"too_large": 1}


def test_what_is_too_old_goes_also_where_nothing_new_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as earlier:
        now = time.time_ns()
        earlier.setattr(time, "time_ns", lambda: now - 2 * 24 * 3600 * 10**9)
        quarantine = Quarantine(tmp_path)
        quarantine.offer(rejected("old.0"))
        quarantine.close()
    monkeypatch.setattr("detector.quarantine._AGED_SECONDS", 0.05)
    monkeypatch.setattr("detector.quarantine._LISTED_SECONDS", 0.0)
    Quarantine(tmp_path, most_days=3).close()
    assert names(tmp_path) == ["old.0"]
    quarantine = Quarantine(tmp_path, most_days=3)
    quarantine.offer(rejected("new.0"))
    wait_for(lambda: names(tmp_path) == ["new.0", "old.0"])
    monkeypatch.setattr(quarantine, "_most_days", 1)
    wait_for(lambda: names(tmp_path) == ["new.0"])
    quarantine.close()
    assert quarantine.removed == 1
    # Nor does it come back where the server starts anew.
    (tmp_path / "00000000000000000001-older.0.npz").touch()
    started = Quarantine.of_environment({FOLDER_VARIABLE: str(tmp_path), DAYS_VARIABLE: "1"})
    assert started is not None
    started.close()
    assert names(tmp_path) == ["new.0"]


def test_an_input_is_removed_for_good_and_nothing_else(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path)
    for name in ("a.0", "b.0"):
        quarantine.offer(rejected(name))
    quarantine.close()
    (tmp_path / "notes.npz").touch()
    newest, oldest = quarantined(tmp_path)
    assert remove(tmp_path, oldest)
    assert not remove(tmp_path, oldest)
    assert not remove(tmp_path, "notes")
    assert quarantined(tmp_path) == [newest]
    assert (tmp_path / "notes.npz").exists()


def test_nobody_waits_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = threading.Event()
    quarantine = Quarantine(tmp_path)
    monkeypatch.setattr(quarantine, "_write", lambda *_: blocked.wait())
    started = time.monotonic()
    for number in range(200):
        quarantine.offer(rejected(f"a.{number}"))
    assert time.monotonic() - started < 1
    assert quarantine.dropped["busy"] >= 100
    blocked.set()
    quarantine.close()
    assert quarantine.kept + quarantine.dropped["busy"] == 200


def test_a_disk_that_fails_is_counted_and_may_recover(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "quarantine"
    quarantine = Quarantine(folder)
    shutil.rmtree(folder)
    quarantine.offer(rejected("lost.0"))
    while not quarantine.dropped["failed"]:
        time.sleep(0.01)
    folder.mkdir()
    quarantine.offer(rejected("found.0"))
    quarantine.close()
    assert names(folder) == ["found.0"]
    assert "was not kept" in capsys.readouterr().err


def test_what_a_killed_process_left_is_removed_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / ".partial-xyz").touch()
    os.utime(tmp_path / ".partial-xyz", (1e9, 1e9))
    (tmp_path / ".partial-new").touch()  # somebody else writes it just now
    (tmp_path / "notes.txt").write_text("mine")
    quarantine = Quarantine(tmp_path, most_inputs=1)
    quarantine.offer(rejected("a.0"))
    quarantine.offer(rejected("b.0"))
    quarantine.close()
    kept = f"{quarantined(tmp_path)[0]}.npz"
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", ".partial-new", kept}


def test_two_versions_share_a_folder(tmp_path: Path) -> None:
    both = [Quarantine(tmp_path, most_inputs=20) for _ in range(2)]
    for number in range(30):
        both[number % 2].offer(rejected(f"a.{number}"))
        time.sleep(0.002)
    for each in both:
        each.close()
    assert sum(each.kept for each in both) == 30
    Quarantine(tmp_path, most_inputs=20).close()  # what each learns of the other's within seconds
    assert len(names(tmp_path)) == 20


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_damaged_file_is_told_by_its_name(tmp_path: Path, content: bytes | None) -> None:
    key = "00000000000000000001-a.0"
    with (tmp_path / f"{key}.npz").open("wb") as file:
        if content is None:
            np.savez(file, image=np.zeros((2, 2)), about=np.array(json.dumps({"scores": []})))
        else:
            file.write(content)
    with pytest.raises(DataError, match=key):
        read_rejected(tmp_path, key)


@pytest.mark.parametrize(
    "key", ["../00000000000000000001-s.0", "../secret", "x", "00000000000000000001-..", "00000000000000000001-a/b", ""]
)
def test_nothing_outside_the_folder_can_be_named(tmp_path: Path, key: str) -> None:
    folder = tmp_path / "quarantine"
    folder.mkdir()
    for name in ("secret", "00000000000000000001-s.0"):
        (tmp_path / f"{name}.npz").write_bytes(b"not to be read")
    assert read_rejected(folder, key) is None
    assert read_about(folder, key) is None


def test_a_clock_that_is_set_back_makes_nothing_older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quarantine = Quarantine(tmp_path, most_inputs=3)
    for number in range(3):
        quarantine.offer(rejected(f"old.{number}"))
    quarantine.close()
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now - 3600 * 10**9)
    quarantine = Quarantine(tmp_path, most_inputs=3)
    for number in range(3):
        quarantine.offer(rejected(f"new.{number}"))
    quarantine.close()
    assert names(tmp_path) == ["new.2", "new.1", "new.0"]


def test_the_folder_is_not_looked_through_for_every_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[Path] = []
    files = quarantine_module._files

    def counted(folder: Path) -> Iterator[tuple[str, int]]:
        listed.append(folder)
        return files(folder)

    monkeypatch.setattr(quarantine_module, "_files", counted)
    quarantine = Quarantine(tmp_path)
    for number in range(300):
        quarantine.offer(rejected(f"a.{number}"))
        while quarantine._waiting.full():
            time.sleep(0.001)
    quarantine.close()
    assert quarantine.kept == 300
    assert len(listed) < 30  # once every five seconds


def test_whatever_fails_the_next_one_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quarantine = Quarantine(tmp_path)
    monkeypatch.setattr("detector.quarantine.json.dumps", lambda _: None)
    quarantine.offer(rejected("a.0"))
    while not quarantine.dropped["failed"] and not quarantine.kept:
        time.sleep(0.01)
    monkeypatch.undo()
    quarantine.offer(rejected("b.0"))
    quarantine.close()
    assert "b.0" in names(tmp_path)


def test_a_disk_that_hangs_does_not_keep_the_server_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detector.quarantine._CLOSE_SECONDS", 0.2)
    quarantine = Quarantine(tmp_path)
    blocked = threading.Event()
    monkeypatch.setattr(quarantine, "_write", lambda *_: blocked.wait())
    for number in range(100):
        quarantine.offer(rejected(f"a.{number}"))
    started = time.monotonic()
    quarantine.close()
    assert time.monotonic() - started < 5
    blocked.set()


def test_what_is_no_number_is_kept_as_such(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path)
    quarantine.offer(replace(rejected("a.0"), entropy_bits=math.nan))
    quarantine.close()
    (key,) = quarantined(tmp_path)
    about = read_about(tmp_path, key)
    assert about is not None
    assert math.isnan(about["entropy_bits"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({INPUTS_VARIABLE: "0"}, f"{INPUTS_VARIABLE}: got '0'"),
        ({DAYS_VARIABLE: "0.5"}, f"{DAYS_VARIABLE}: got '0.5'"),
        ({BYTES_VARIABLE: "1 GB"}, f"{BYTES_VARIABLE}: got '1 GB'"),
        ({FOLDER_VARIABLE: "/proc/quarantine"}, "/proc/quarantine cannot be written"),
        ({FOLDER_VARIABLE: __file__}, "cannot be written"),
    ],
)
def test_an_environment_that_cannot_be_used_is_told(tmp_path: Path, changed: dict[str, str], message: str) -> None:
    with pytest.raises(SetupError, match=message):
        Quarantine.of_environment({FOLDER_VARIABLE: str(tmp_path)} | changed)


def test_without_a_folder_nothing_is_kept() -> None:
    assert Quarantine.of_environment({}) is None
    assert Quarantine.of_environment({FOLDER_VARIABLE: ""}) is None


def config_with_image(folder: Path) -> dict[str, str]:
    given = arguments(folder)
    config = json.loads(given["model_config"]) | {"input": [{"name": "image"}]}
    return given | {"model_config": json.dumps(config)}


def test_the_verdict_stage_keeps_what_it_rejects_under_the_names_that_the_client_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "1").mkdir()
    write_detector(tmp_path, "strip")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "kept"))
    MetricFamily.made.clear()
    stage = verdict_stage(config_with_image(tmp_path), PbUtils())
    images = np.random.default_rng(0).integers(0, 256, (4, *SHAPE), dtype=np.uint8)

    def asked(rows: slice, entropies: list[list[float]], **about: Any) -> Any:
        tensors = opinions(entropies) | {"repaired_probabilities": np.eye(3)[[1] * len(entropies)]}
        return request(["label"], image=images[rows], **tensors, **about)

    stage.execute(
        [
            asked(slice(0, 2), [[0.9], [0.3]], request_id="one"),
            asked(slice(2, 3), [[0.2]], sent='{"stripwire_canary": true}', request_id="two"),
            asked(slice(3, 4), [[0.1]], request_id="no/name"),
        ]
    )
    stage.close()
    (latest, first) = quarantined(tmp_path / "kept")
    found = read_rejected(tmp_path / "kept", first)
    assert found is not None
    assert (found.request_id, found.label, found.scores, found.version) == ("one.1", 1, ("entropy",), "1")
    assert found.entropy_bits == pytest.approx(0.3)
    np.testing.assert_array_equal(found.image, images[1])
    unnamed = read_rejected(tmp_path / "kept", latest)
    assert unnamed is not None
    assert len(unnamed.request_id) == 34  # a new name
    np.testing.assert_array_equal(unnamed.image, images[3])
    (kept,) = MetricFamily.made["stripwire_quarantine_kept_total"].metrics
    assert kept.value == 2
    dropped = MetricFamily.made["stripwire_quarantine_dropped_total"].metrics
    assert [metric.labels["reason"] for metric in dropped] == [*DROPPED]
    MetricFamily.made.clear()


def test_a_version_without_images_cannot_have_a_quarantine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "1").mkdir()
    write_detector(tmp_path, "strip")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "kept"))
    with pytest.raises(RepositoryError, match="export the model again"):
        verdict_stage(arguments(tmp_path), PbUtils())
