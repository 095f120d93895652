from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from client.api import ModelMetadata, OnProgress, Verdicts
from client.evaluation import Evaluation, evaluate, proportion
from detector.errors import DataError, InputError
from detector.statistics import Proportion, auroc, auroc_interval
from samples.types import Samples

CLASSES = 3
# One row per image: original's label, repaired label, trojaned, entropy. The first pixel of an image is its row.
CLEAN = [(0, 0, False, 2.0), (1, 1, False, 1.5), (2, 1, False, 3.0), (2, 2, True, 0.5), (0, 1, True, 0.4)]
CLEAN_LABELS = [0, 1, 2, 2, 0]
TROJANED = [(2, 2, True, 0.1), (2, 0, True, 0.3), (2, 1, False, 0.5), (0, 2, False, 1.0)]
ATTACKERS_CLASS = [2, 2, 2, 2]
TRUE_LABELS = [0, 0, 1, 0]


@dataclass
class FakeClient:
    """Answers from a table; blocks trojaned images unless it is a shadow."""

    is_shadow: bool = False

    def metadata(self) -> ModelMetadata:
        return ModelMetadata("guarded", ("1",), (1, 1, 1), CLASSES, 64)

    def classify(
        self, images: NDArray[np.uint8], *, probabilities: bool = False, on_progress: OnProgress | None = None
    ) -> Verdicts:
        rows = [(CLEAN + TROJANED)[row] for row in images[:, 0, 0, 0]]
        if on_progress:
            on_progress(len(rows), len(rows))
        return Verdicts(
            labels=np.array([CLASSES if row[2] and not self.is_shadow else row[1] for row in rows], np.int32),
            trojaned=np.array([row[2] for row in rows]),
            entropy_bits=np.array([row[3] for row in rows], np.float32),
            p_values=np.nan_to_num(np.array([row[3] / 10 for row in rows], np.float32)),
            perturbations=np.full(len(rows), 10, np.int32),
            probabilities=np.eye(CLASSES, dtype=np.float32)[[row[1] for row in rows]] if probabilities else None,
            classes=CLASSES,
            request_ids=tuple(f"request.{row}" for row in range(len(rows))),
        )

    def original_probabilities(
        self, images: NDArray[np.uint8], *, on_progress: OnProgress | None = None
    ) -> NDArray[np.float32]:
        if on_progress:
            on_progress(len(images), len(images))
        return np.eye(CLASSES, dtype=np.float32)[[(CLEAN + TROJANED)[row][0] for row in images[:, 0, 0, 0]]]


def samples_of(rows: range, labels: list[int], true_labels: list[int] | None = None) -> Samples:
    images = np.array(rows, np.uint8).reshape(-1, 1, 1, 1)
    return Samples(images, np.array(labels), None if true_labels is None else np.array(true_labels))


def clean_samples() -> Samples:
    return samples_of(range(5), CLEAN_LABELS)


def trojaned_samples() -> Samples:
    return samples_of(range(5, 9), ATTACKERS_CLASS, TRUE_LABELS)


def fraction(measured: Proportion | None) -> tuple[int, int]:
    assert measured is not None
    return measured.successes, measured.count


@pytest.fixture(params=["blocking server", "shadowing server"])
def evaluation(request: pytest.FixtureRequest) -> Evaluation:
    return evaluate(FakeClient(is_shadow=request.param == "shadowing server"), clean_samples(), trojaned_samples())


def test_the_original_network_is_scored_on_plain_predictions(evaluation: Evaluation) -> None:
    assert fraction(evaluation.original.clean_accuracy) == (5, 5)
    assert fraction(evaluation.original.attack_success) == (3, 4)
    assert fraction(evaluation.original.recovered_accuracy) == (1, 4)


def test_the_repaired_network_is_scored_whatever_the_verdict(evaluation: Evaluation) -> None:
    assert fraction(evaluation.repaired.clean_accuracy) == (3, 5)
    assert fraction(evaluation.repaired.attack_success) == (2, 4)
    assert fraction(evaluation.repaired.recovered_accuracy) == (2, 4)


def test_false_rejections_are_clean_and_false_acceptances_trojaned(evaluation: Evaluation) -> None:
    assert fraction(evaluation.guarded.false_rejection) == (2, 5)
    assert fraction(evaluation.guarded.false_acceptance) == (2, 4)


def test_the_guarded_network_is_scored_on_what_it_accepts_and_on_everything(evaluation: Evaluation) -> None:
    guarded = evaluation.guarded
    assert fraction(guarded.clean_accuracy_of_accepted) == (2, 3)
    assert fraction(guarded.clean_accuracy_end_to_end) == (2, 5)
    assert fraction(guarded.attack_success_of_accepted) == (1, 2)
    assert fraction(guarded.attack_success_end_to_end) == (1, 4)
    assert fraction(guarded.recovered_accuracy_of_accepted) == (1, 2)
    assert fraction(guarded.recovered_accuracy_end_to_end) == (1, 4)


def test_entropies_are_kept_and_low_ones_count_as_suspicious(evaluation: Evaluation) -> None:
    np.testing.assert_allclose(evaluation.clean_entropies_bits, [2.0, 1.5, 3.0, 0.5, 0.4], rtol=1e-6)
    assert evaluation.trojaned_entropies_bits is not None
    np.testing.assert_allclose(evaluation.trojaned_entropies_bits, [0.1, 0.3, 0.5, 1.0], rtol=1e-6)
    # Of 20 pairs the trojaned one is lower in 5 + 5 + 3 + 3, and equal in 1.
    assert evaluation.auroc == pytest.approx(16.5 / 20)


def test_an_image_without_a_finite_entropy_is_the_most_suspicious(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "TROJANED", [(2, 2, True, float("nan"))])
    evaluation = evaluate(FakeClient(), clean_samples(), samples_of(range(5, 6), [2]))
    assert evaluation.auroc == 1.0


def test_without_trojaned_samples_only_the_clean_side_is_measured() -> None:
    evaluation = evaluate(FakeClient(), clean_samples())
    assert fraction(evaluation.guarded.false_rejection) == (2, 5)
    assert evaluation.guarded.false_acceptance is None
    assert evaluation.original.attack_success is None
    assert evaluation.auroc is None
    assert evaluation.trojaned_entropies_bits is None


def test_without_true_labels_nothing_is_called_recovered() -> None:
    evaluation = evaluate(FakeClient(), clean_samples(), samples_of(range(5, 9), ATTACKERS_CLASS))
    assert evaluation.original.recovered_accuracy is None
    assert evaluation.guarded.recovered_accuracy_end_to_end is None
    assert evaluation.guarded.attack_success_end_to_end is not None


def test_progress_counts_every_image_once_per_network() -> None:
    seen: list[tuple[int, int]] = []
    evaluate(FakeClient(), clean_samples(), trojaned_samples(), lambda done, total: seen.append((done, total)))
    assert seen == [(5, 18), (10, 18), (14, 18), (18, 18)]


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_labels_out_of_the_models_range_are_refused(label: int) -> None:
    with pytest.raises(DataError, match=r"clean samples: got labels .* but the model has 3 classes: 0 to 2"):
        evaluate(FakeClient(), samples_of(range(2), [0, label]))
    with pytest.raises(DataError, match="trojaned samples: got true_labels"):
        evaluate(FakeClient(), clean_samples(), samples_of(range(5, 6), [0], [label]))


def test_empty_or_unequal_samples_are_refused() -> None:
    with pytest.raises(DataError, match="clean samples"):
        evaluate(FakeClient(), samples_of(range(0), []))
    with pytest.raises(DataError, match="trojaned samples"):
        evaluate(FakeClient(), clean_samples(), samples_of(range(5, 9), [0]))


def test_the_json_holds_every_figure_and_survives_a_round_trip(evaluation: Evaluation) -> None:
    written: dict[str, Any] = evaluation.to_json(entropies=True)
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert written["guarded"]["false_acceptance"]["rate"] == 0.5
    assert written["original"]["attack_success"]["successes"] == 3
    assert written["auroc"] == evaluation.auroc
    assert len(written["clean_entropies_bits"]) == 5
    assert "clean_entropies_bits" not in evaluation.to_json()


def test_the_json_says_null_where_nothing_was_measured() -> None:
    written = evaluate(FakeClient(), clean_samples()).to_json(entropies=True)
    assert written["repaired"]["attack_success"] is None
    assert written["trojaned_entropies_bits"] is None


# Closed forms for none and all; the rest by bisection of the binomial tails in 60-digit decimals.
@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        (0, 10, 0.0, 1 - 0.025**0.1),
        (10, 10, 0.025**0.1, 1.0),
        (1, 10, 0.002528579, 0.445016117),
        (5, 10, 0.187086028, 0.812913972),
        (32, 1000, 0.021988850, 0.044875903),
    ],
)
def test_intervals_are_exact(successes: int, count: int, low: float, high: float) -> None:
    measured = proportion(np.arange(count) < successes)
    assert measured.low == pytest.approx(low, abs=1e-8)
    assert measured.high == pytest.approx(high, abs=1e-8)


def test_a_proportion_reads_with_its_interval_and_its_count() -> None:
    assert str(proportion(np.arange(1000) < 32)) == "3.2 % (2.2-4.5, n=1000)"


scores = st.lists(st.integers(-3, 3).map(float) | st.just(float("inf")), min_size=1, max_size=12)


@given(scores, scores)
def test_auroc_is_the_share_of_pairs_in_the_right_order(clean: list[float], trojaned: list[float]) -> None:
    pairs = [(t > c) + 0.5 * (t == c) for t in trojaned for c in clean]
    assert auroc(clean, trojaned) == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize("shift", [0.5, 1.5, 2.5])
def test_the_interval_of_an_auroc_holds_the_true_one_as_often_as_it_says(shift: float) -> None:
    generator = np.random.default_rng(int(10 * shift))
    true, tries, held = stats.norm.cdf(shift / np.sqrt(2)), 400, 0
    for _ in range(tries):
        clean, trojaned = generator.normal(0, 1, 60), generator.normal(shift, 1, 40)
        low, high = auroc_interval(auroc(clean, trojaned), len(clean), len(trojaned))
        held += low <= true <= high
    assert stats.binomtest(held, tries, 0.95).pvalue > 0.001 or held / tries > 0.95


@given(st.integers(1, 500), st.integers(1, 500), st.data())
def test_the_interval_of_an_auroc_is_where_its_error_says(clean: int, trojaned: int, data: st.DataObject) -> None:
    area = data.draw(st.integers(0, 2 * clean * trojaned)) / (2 * clean * trojaned)
    low, high = auroc_interval(area, clean, trojaned)
    assert 0 <= low <= area <= high <= 1
    assert low < high
    assert (low == 0, high == 1) == (area == 0, area == 1)
    mirrored = auroc_interval(1 - area, clean, trojaned)
    np.testing.assert_allclose(mirrored, (1 - high, 1 - low), atol=1e-9)
    for end in (low, high):
        if 0 < end < 1:
            # Hanley and McNeil's own form of the variance, with Newcombe's size of both sides.
            q1, q2 = end / (2 - end), 2 * end**2 / (1 + end)
            others = (clean + trojaned) / 2 - 1
            variance = (end * (1 - end) + others * ((q1 - end**2) + (q2 - end**2))) / (clean * trojaned)
            assert abs(area - end) == pytest.approx(1.959964 * np.sqrt(variance), abs=1e-6)


@pytest.mark.parametrize(("area", "clean", "trojaned"), [(1.1, 5, 5), (float("nan"), 5, 5), (0.5, 0, 5), (0.5, 5, 0)])
def test_an_interval_wants_an_area_and_images(area: float, clean: int, trojaned: int) -> None:
    with pytest.raises(InputError, match="auroc interval: got"):
        auroc_interval(area, clean, trojaned)


@pytest.mark.parametrize(("clean", "trojaned"), [([], [1.0]), ([1.0], []), ([float("nan")], [1.0]), ([[1.0]], [1.0])])
def test_auroc_wants_scores_on_both_sides(clean: Any, trojaned: Any) -> None:
    with pytest.raises(InputError, match="auroc: got"):
        auroc(clean, trojaned)
