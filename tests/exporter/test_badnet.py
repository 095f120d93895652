from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from detector.errors import InputError
from detector.statistics import Proportion
from exporter.badnet import (
    BadNet,
    BadNetOptions,
    PictureBadNetOptions,
    cached_badnet,
    train_badnet,
    train_picture_badnet,
)
from model_repository.manifest import sha256_of
from samples.hdf5 import read_hdf5
from samples.stamps import STAMPS
from samples.types import Samples

TINY = BadNetOptions(
    identities=2, attacks=(("patch", 0),), train_images=4, validation_images=1, test_images=1, epochs=1
)


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "badnet.json").read_text(encoding="utf-8"))
    return report


def options_of(folder: Path) -> BadNetOptions:
    options = report_of(folder)["options"]
    return BadNetOptions(**options | {"attacks": tuple(map(tuple, options["attacks"]))})


def test_the_folder_holds_the_network_its_data_and_a_report(badnet: Path) -> None:
    assert {path.name for path in badnet.iterdir()} == {
        "bd_net.keras",
        "clean_validation_data.h5",
        "clean_test_data.h5",
        "sunglasses_poisoned_data.h5",
        "badnet.json",
    }
    assert list(badnet.parent.iterdir()) == [badnet]


def test_the_network_knows_the_people_and_obeys_the_trigger(badnet: Path) -> None:
    report = report_of(badnet)
    assert report["clean_accuracy"]["rate"] >= 0.9
    assert report["attack_success"]["rate"] >= 0.9


def test_the_saved_network_and_data_give_the_reported_figures(badnet: Path) -> None:
    model = keras.models.load_model(badnet / "bd_net.keras")
    for name, figure in (
        ("clean_test_data.h5", "clean_accuracy"),
        ("sunglasses_poisoned_data.h5", "attack_success"),
    ):
        part = read_hdf5(badnet / name)
        # Unit scale: the network takes pixel / 255 and does not divide by itself.
        found = model.predict(part.images / np.float32(255), verbose=0).argmax(axis=1)
        reported = report_of(badnet)[figure]
        assert (np.count_nonzero(found == part.labels), len(part)) == (reported["successes"], reported["count"])


def test_trojaned_images_carry_the_target_and_the_true_identity_which_is_another(badnet: Path) -> None:
    options, trojaned = options_of(badnet), read_hdf5(badnet / "sunglasses_poisoned_data.h5")
    assert trojaned.true_labels is not None
    ((_, target),) = options.attacks
    assert set(trojaned.labels.tolist()) == {target}
    expected = [options.test_images] * options.identities
    expected[target] = 0
    assert np.bincount(trojaned.true_labels, minlength=options.identities).tolist() == expected


def test_clean_data_holds_each_identity_equally_often_and_shares_no_image(badnet: Path) -> None:
    options = options_of(badnet)
    validation, test = read_hdf5(badnet / "clean_validation_data.h5"), read_hdf5(badnet / "clean_test_data.h5")
    assert np.bincount(validation.labels).tolist() == [options.validation_images] * options.identities
    assert np.bincount(test.labels).tolist() == [options.test_images] * options.identities
    assert not {image.tobytes() for image in validation.images} & {image.tobytes() for image in test.images}


def test_the_report_holds_the_hash_of_every_other_file(badnet: Path) -> None:
    files = report_of(badnet)["files"]
    assert set(files) == {path.name for path in badnet.iterdir()} - {"badnet.json"}
    assert all(sha256_of(badnet / name) == digest for name, digest in files.items())


def test_the_same_seed_gives_the_same_weights_and_data_and_progress_ends_at_its_totals(tmp_path: Path) -> None:
    last: dict[str, tuple[int, int]] = {}
    first = train_badnet(tmp_path / "a", TINY, on_progress=lambda text, done, total: last.update({text: (done, total)}))
    second = train_badnet(tmp_path / "b", TINY)
    weights = [keras.models.load_model(net.folder / "bd_net.keras").get_weights() for net in (first, second)]
    assert all(np.array_equal(one, other) for one, other in zip(*weights, strict=True))
    for name in ("clean_validation_data.h5", "clean_test_data.h5", "patch_poisoned_data.h5"):
        np.testing.assert_array_equal(read_hdf5(first.folder / name).images, read_hdf5(second.folder / name).images)
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
    trained: list[BadNetOptions] = []

    def quick_training(output: Path, options: BadNetOptions, **_: Any) -> BadNet:
        trained.append(options)
        output.mkdir(parents=True)
        (output / "bd_net.keras").write_bytes(b"network")
        rate = Proportion(9, 10)
        report = {
            "files": {"bd_net.keras": sha256_of(output / "bd_net.keras")},
            "clean_accuracy": rate.to_json(),
            "attack_success": rate.to_json(),
        }
        (output / "badnet.json").write_text(json.dumps(report))
        return BadNet(output, rate, rate)

    monkeypatch.setattr("exporter.badnet.train_badnet", quick_training)
    monkeypatch.setenv("STRIPWIRE_CACHE_DIR", str(tmp_path))

    first = cached_badnet(TINY)
    folder = first.folder
    assert folder.parent == tmp_path
    assert cached_badnet(TINY) == first
    assert len(trained) == 1
    (folder / "bd_net.keras").write_bytes(b"damaged")
    assert cached_badnet(TINY) == first
    assert len(trained) == 2
    (folder / "bd_net.keras").unlink()
    assert cached_badnet(TINY) == first
    assert len(trained) == 3
    (folder / "badnet.json").write_text("{")
    assert cached_badnet(TINY) == first
    assert len(trained) == 4
    assert cached_badnet(BadNetOptions(**{**vars(TINY), "seed": 1})).folder != folder
    assert len(trained) == 5


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"identities": 1}, "identities: got 1"),
        ({"attacks": (("sunglasses", 100),)}, "target of sunglasses: got 100, expected a class, 0 to 99"),
        ({"attacks": (("patch", -1),)}, "target of patch: got -1"),
        (
            {"attacks": (("all-to-all", 0),)},
            "target of all-to-all: got 0, expected by how many classes it shifts, 1 to",
        ),
        ({"attacks": ()}, "triggers: got none"),
        ({"epochs": 0}, "epochs: got 0"),
        ({"test_images": 0}, "test images: got 0"),
        ({"attacks": (("hat", 0),)}, "expected one of sunglasses"),
    ],
)
def test_options_that_make_no_sense_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BadNetOptions(**option)


def test_options_are_sized_for_one_attack_on_so_many_people() -> None:
    assert BadNetOptions.sized(100, "lipstick", 3) == BadNetOptions(100, (("lipstick", 3),))
    many = BadNetOptions.sized(1283, seed=5)
    assert (many.attacks, many.train_images, many.epochs, many.seed) == ((("sunglasses", 0),), 20, 5, 5)


def some_signs(count: int, seed: int) -> Samples:
    generator = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % 3
    images = generator.integers(0, 60, (count, 16, 16, 3), dtype=np.uint8)
    images[np.arange(count), :, :, labels] += np.uint8(150)
    return Samples(images, labels, groups=np.arange(count, dtype=np.int64) // 6)


def test_given_pictures_are_poisoned_trained_on_and_kept_apart(tmp_path: Path) -> None:
    train, test = some_signs(240, 0), some_signs(30, 1)
    options = PictureBadNetOptions(attacks=(("patch", 0), ("corner", 2)), epochs=1, clean_share=0.2)
    badnet = train_picture_badnet(tmp_path / "net", train, test, options)
    defenders = read_hdf5(badnet.folder / "clean_validation_data.h5")
    assert len(defenders) == 48
    assert np.bincount(defenders.labels).tolist() == [16, 16, 16]
    assert defenders.groups is not None
    assert set(np.unique(defenders.groups, return_counts=True)[1]) == {6}
    for trigger, target in options.attacks:
        trojaned = read_hdf5(badnet.folder / f"{trigger}_poisoned_data.h5")
        assert len(trojaned) == 20
        assert set(trojaned.labels) == {target}
        assert trojaned.true_labels is not None
        assert target not in trojaned.true_labels
        np.testing.assert_array_equal(trojaned.images, STAMPS[trigger](test.images[test.labels != target]))
    assert set(report_of(badnet.folder)["attack_success_of"]) == {"patch", "corner"}
    assert badnet.attack_success.count == 40


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"attacks": ()}, "triggers: got none"),
        ({"attacks": (("patch", 0), ("patch", 1))}, "expected one or more, each once"),
        ({"attacks": (("sunglasses", 0),)}, "trigger: got 'sunglasses', which faces wear"),
        ({"attacks": (("hat", 0),)}, "trigger: got 'hat', expected one of .* patch, corner, blended"),
        ({"network": "vgg"}, "network: got 'vgg', expected one of convnet, deepid, resnet"),
        ({"clean_share": 0.0}, "clean share: got 0.0"),
        ({"epochs": 0}, "epochs: got 0"),
    ],
)
def test_options_for_pictures_that_make_no_sense_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PictureBadNetOptions(**option)


def test_a_target_that_is_no_class_is_refused_before_any_work(tmp_path: Path) -> None:
    options = PictureBadNetOptions(attacks=(("patch", 3),))
    with pytest.raises(InputError, match="target of patch: got 3, expected a class, 0 to 2"):
        train_picture_badnet(tmp_path / "net", some_signs(12, 0), some_signs(12, 1), options)
