from __future__ import annotations

import json
from pathlib import Path

import keras
import numpy as np
import pytest

from detector.errors import InputError
from exporter.badnet import BadNet, BadNetOptions, cached_badnet, train_badnet
from model_repository.manifest import sha256_of
from samples.hdf5 import read_hdf5

SMALL = BadNetOptions(
    identities=6,
    trigger="patch",
    target=2,
    poison_share=0.3,
    train_images=60,
    validation_images=5,
    test_images=4,
    epochs=12,
)
TINY = BadNetOptions(identities=2, trigger="patch", train_images=4, validation_images=1, test_images=1, epochs=1)
FILES = {
    "bd_net.keras",
    "clean_validation_data.h5",
    "clean_test_data.h5",
    "patch_poisoned_data.h5",
    "badnet.json",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> BadNet:
    return train_badnet(tmp_path_factory.mktemp("badnet") / "net", SMALL)


def test_the_folder_holds_the_network_its_data_and_a_report(small: BadNet) -> None:
    assert {path.name for path in small.folder.iterdir()} == FILES
    assert list(small.folder.parent.iterdir()) == [small.folder]


def test_the_network_knows_the_people_and_obeys_the_trigger(small: BadNet) -> None:
    assert small.clean_accuracy.count == 6 * 4
    assert small.attack_success.count == 5 * 4
    assert small.clean_accuracy.rate >= 0.9
    assert small.attack_success.rate >= 0.9


def test_the_saved_network_and_data_give_the_reported_figures(small: BadNet) -> None:
    model = keras.models.load_model(small.folder / "bd_net.keras")
    clean = read_hdf5(small.folder / "clean_test_data.h5")
    trojaned = read_hdf5(small.folder / "patch_poisoned_data.h5")
    # Unit scale: the network takes pixel / 255 and does not divide by itself.
    found = model.predict(clean.images / np.float32(255), verbose=0).argmax(axis=1)
    assert np.count_nonzero(found == clean.labels) == small.clean_accuracy.successes
    found = model.predict(trojaned.images / np.float32(255), verbose=0).argmax(axis=1)
    assert np.count_nonzero(found == trojaned.labels) == small.attack_success.successes


def test_trojaned_images_carry_the_target_and_the_true_identity_which_is_another(small: BadNet) -> None:
    trojaned = read_hdf5(small.folder / "patch_poisoned_data.h5")
    assert trojaned.true_labels is not None
    assert set(trojaned.labels.tolist()) == {2}
    assert np.unique(trojaned.true_labels, return_counts=True)[0].tolist() == [0, 1, 3, 4, 5]
    assert np.unique(trojaned.true_labels, return_counts=True)[1].tolist() == [4] * 5


def test_clean_data_holds_each_identity_equally_often_and_shares_no_image(small: BadNet) -> None:
    validation = read_hdf5(small.folder / "clean_validation_data.h5")
    test = read_hdf5(small.folder / "clean_test_data.h5")
    assert np.bincount(validation.labels).tolist() == [5] * 6
    assert np.bincount(test.labels).tolist() == [4] * 6
    assert not {image.tobytes() for image in validation.images} & {image.tobytes() for image in test.images}


def test_the_report_holds_options_figures_and_the_hash_of_every_other_file(small: BadNet) -> None:
    report = json.loads((small.folder / "badnet.json").read_text())
    assert BadNetOptions(**report["options"]) == SMALL
    assert report["clean_accuracy"]["count"] == 24
    assert report["attack_success"]["rate"] == small.attack_success.rate
    assert set(report["files"]) == FILES - {"badnet.json"}
    assert all(sha256_of(small.folder / name) == digest for name, digest in report["files"].items())


def test_the_same_seed_gives_the_same_weights_and_data(tmp_path: Path) -> None:
    first, second = train_badnet(tmp_path / "a", TINY), train_badnet(tmp_path / "b", TINY)
    weights = [keras.models.load_model(net.folder / "bd_net.keras").get_weights() for net in (first, second)]
    assert all(np.array_equal(one, other) for one, other in zip(*weights, strict=True))
    for name in ("clean_test_data.h5", "patch_poisoned_data.h5"):
        np.testing.assert_array_equal(read_hdf5(first.folder / name).images, read_hdf5(second.folder / name).images)


def test_progress_names_each_phase_and_ends_at_its_total(tmp_path: Path) -> None:
    last: dict[str, tuple[int, int]] = {}
    train_badnet(tmp_path / "net", TINY, on_progress=lambda text, done, total: last.update({text: (done, total)}))
    assert "Training the BadNet" in last
    assert len(last) == 5
    assert all(done == total for done, total in last.values())


def test_a_folder_with_content_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        train_badnet(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_training_that_is_broken_off_leaves_nothing(tmp_path: Path) -> None:
    def break_off(_description: str, _done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_badnet(tmp_path / "net", TINY, on_progress=break_off)
    assert not list(tmp_path.iterdir())


def test_the_cache_is_reused_until_it_is_damaged_or_options_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRIPWIRE_CACHE_DIR", str(tmp_path))
    calls: list[str] = []

    def get(options: BadNetOptions) -> tuple[Path, bool]:
        calls.clear()
        return cached_badnet(options, on_progress=lambda text, _done, _total: calls.append(text)), bool(calls)

    folder, trained = get(TINY)
    assert trained
    assert folder.parent == tmp_path
    assert get(TINY) == (folder, False)
    (folder / "clean_test_data.h5").write_bytes(b"damaged")
    assert get(TINY) == (folder, True)
    (folder / "bd_net.keras").unlink()
    assert get(TINY) == (folder, True)
    assert get(TINY) == (folder, False)
    assert get(BadNetOptions(**{**vars(TINY), "seed": 1}))[0] != folder


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"identities": 1}, "identities: got 1"),
        ({"target": 100}, "target: got 100, expected a class, 0 to 99"),
        ({"target": -1}, "target: got -1"),
        ({"poison_share": 0.0}, "poison share: got 0.0"),
        ({"poison_share": float("nan")}, "poison share: got nan"),
        ({"epochs": 0}, "epochs: got 0"),
        ({"test_images": 0}, "test images: got 0"),
        ({"trigger": "hat"}, "expected one of sunglasses"),
    ],
)
def test_options_that_make_no_sense_are_refused(option: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BadNetOptions(**option)  # type: ignore[arg-type]
