"""The export report: its numbers, by hand; its page, as a parser reads it; and what hostile names cannot do."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.integrate import trapezoid

from detector.calibration import ThresholdRule, calibrate, normal_threshold
from detector.scores import Evidence, score_bits
from detector.statistics import Proportion
from exporter.report import Examples, Layer, Part, ReportData, Scores, Step, write_report
from exporter.report.document import document
from exporter.report.figures import _decade
from exporter.report.notices import notices, percent

OVERLAYS = 10
FIGURES = {"repair", "histogram", "roc", "thresholds", "overlays"}
PROVENANCE = {
    "created": "2026-01-01T00:00:00+00:00",
    "inputs": {"model": {"file": "bd_net.keras", "sha256": "a" * 64}},
    "options": {"scale": "unit", "threshold_bits": None, "repair": {"method": "magnitude"}},
    "versions": {"python": "3.11.2", "keras": "3.15.1"},
}
VOID = {"meta", "img", "br", "link", "hr", "input"}


def report_data(seed: int = 0, **changes: Any) -> ReportData:
    """Return a plausible report: a BadNet of 100 faces that the repair healed."""
    generator = np.random.default_rng(seed)

    def entropies(count: int, mean: float, spread: float) -> Any:
        image = generator.gamma((mean / spread) ** 2, spread**2 / mean, (count, 1))
        return (image * generator.gamma(4.0, 0.25, (count, OVERLAYS))).astype(np.float32)

    def examples(count: int, entropy: float) -> Examples:
        labels = generator.integers(1, 100, count)
        images = generator.integers(0, 256, (count, 55, 47, 3), dtype=np.uint8)
        return Examples(images, np.full(count, entropy), np.full(count, entropy < 1), labels, labels, labels)

    calibration_entropies = entropies(598, 2.2, 0.7)
    held_out, trojaned = entropies(448, 2.2, 0.7), entropies(990, 0.25, 0.3)
    steps = [Step("as received", 0.998, 0.997, 0.002, 0.0)]
    steps += [Step(f"round {n}", 0.995 - 0.001 * n, 0.9 / n, 0.9 - 0.8 / n, 0.02 * n * n) for n in range(1, 6)]
    steps += [Step(f"final epoch {n}", 0.998, 0.01 / n, 0.95, 0.5) for n in range(1, 13)]
    data = ReportData(
        model_name="bd_net.keras",
        layers=(
            Layer("input", "InputLayer", (55, 47, 3), 0, None),
            Layer("conv_1", "Conv2D", (52, 44, 20), 980, 0.513),
            Layer("pool_1", "MaxPooling2D", (26, 22, 20), 0, None),
            Layer("output", "Dense", (100,), 16_100, None),
        ),
        steps=tuple(steps),
        kept="final epoch 12",
        stopped="attack success fell under 1%",
        before=Scores(Proportion(449, 450), Proportion(987, 990), Proportion(2, 990)),
        after=Scores(Proportion(448, 450), Proportion(2, 990), Proportion(951, 990)),
        attack_success_goal=0.01,
        calibration=calibrate(Evidence(calibration_entropies.mean(axis=1)), 0.05),
        alpha=0.5,
        overlays=generator.integers(0, 256, (OVERLAYS, 55, 47, 3), dtype=np.uint8),
        calibration_entropies_bits=calibration_entropies,
        held_out_entropies_bits=held_out,
        trojaned_entropies_bits=trojaned,
        held_out=Evidence(held_out.mean(axis=1)),
        trojaned=None,
        clean_examples=examples(2, 2.3),
        trojaned_examples=examples(2, 0.1),
        parts=(Part("overlays", OVERLAYS, "0" * 64), Part("calibration", 598, "1" * 64)),
        commands=(("stripwire", "export", "my net.keras", "--clean", "clean.h5"), ("stripwire", "serve", "repository")),
    )
    data = dataclasses.replace(data, **changes)
    means = data.trojaned_entropies_bits
    trojaned = None if means is None else Evidence(means.mean(axis=1))
    return dataclasses.replace(data, held_out=Evidence(data.held_out_entropies_bits.mean(axis=1)), trojaned=trojaned)


NO_ATTACK: dict[str, Any] = dict.fromkeys(("trojaned_entropies_bits", "trojaned", "trojaned_examples"))


def without_attack(**changes: Any) -> ReportData:
    """Return a report of an export that had no attack samples."""
    data = report_data()
    clean_only = Scores(Proportion(449, 450), None, None)
    steps = tuple(dataclasses.replace(step, attack_success=None, recovered_accuracy=None) for step in data.steps)
    return dataclasses.replace(data, steps=steps, before=clean_only, after=clean_only, **(NO_ATTACK | changes))


def with_consensus(**changes: Any) -> ReportData:
    """Return a report of an export in which the repaired network has a say."""
    data, generator = report_data(), np.random.default_rng(1)
    rule = ThresholdRule(detector="consensus")
    plain_bits = 10 ** generator.normal(-3, 1, 598)
    calibration = rule.calibrate(data.calibration_entropies_bits, plain_bits, generator.gamma(0.2, 0.5, 598))

    def evidence(entropies: Any, magnitude: float, nlls: Any) -> Evidence:
        return Evidence(score_bits(entropies, "consensus"), 10 ** generator.normal(magnitude, 1, len(nlls)), nlls)

    known: dict[str, Any] = {
        "held_out": evidence(data.held_out_entropies_bits, -3, generator.gamma(0.2, 0.5, 448)),
        "trojaned": evidence(data.trojaned_entropies_bits, -6, generator.gamma(20.0, 0.4, 990)),
    }
    return dataclasses.replace(data, calibration=calibration, **(known | changes))


def numbers_of(data: ReportData) -> dict[str, Any]:
    return document(data, "3", PROVENANCE)


class Page(HTMLParser):
    """What a parser finds in a page: tags that are open or closed, attributes, identifiers, and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\u00a0", " ")

    def values(self, name: str) -> list[str]:
        return [value for _, found, value in self.attributes if found == name]


def written(folder: Path, data: ReportData, version: str = "3", **changes: Any) -> tuple[Page, dict[str, Any]]:
    write_report(folder, data, version, PROVENANCE | changes)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    numbers = json.loads((folder / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    return Page((folder / "report.html").read_text(encoding="utf-8")), numbers


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Rate(Strict):
    rate: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)
    successes: int
    count: int


class Network(Strict):
    clean_accuracy: Rate
    attack_success: Rate | None
    recovered_accuracy: Rate | None


class RepairNumbers(Strict):
    tried: bool
    changed: bool
    kept: str
    stopped: str
    goal: float
    steps: list[dict[str, str | float | None]]


class Guard(Strict):
    detector: str
    threshold_bits: float
    threshold_plain_bits: float | None
    threshold_nll: float | None
    method: str
    target_frr: float | None
    frr_low: float
    frr_high: float
    images: int
    note: str
    alpha: float
    overlays: int
    frr: Rate
    far: Rate | None
    auroc: float | None
    auroc_low: float | None
    auroc_high: float | None


class Alone(Strict):
    frr: Rate
    far: Rate | None
    auroc: float | None
    auroc_low: float | None
    auroc_high: float | None


class Opinion(Strict):
    bits: list[float | None]
    plain_bits: list[float | None]
    nlls: list[float | None] | None


class Opinions(Strict):
    held_out: Opinion
    trojaned: Opinion | None


class Histogram(Strict):
    edges_bits: list[float]
    calibration: list[int]
    held_out: list[int]
    trojaned: list[int] | None


class Curve(Strict):
    frr: list[float]
    detection_rate: list[float]


class Roc(Strict):
    by_entropy: Curve
    guard: Curve | None


class Thresholds(Strict):
    threshold_bits: list[float]
    frr: list[float]
    frr_low: list[float]
    frr_high: list[float]
    far: list[float] | None


class Overlays(Strict):
    count: list[int]
    share: float
    clean_low_bits: list[float | None]
    trojaned_high_bits: list[float | None] | None
    auroc: list[float] | None


class Numbers(Strict):
    """The keys of `report.json`, format 2."""

    format: int = Field(ge=2, le=2)
    model: str
    version: str
    notices: list[dict[str, str]]
    networks: dict[str, Network]
    repair: RepairNumbers
    layers: list[dict[str, Any]]
    guard: Guard
    by_entropy: Alone
    opinions: Opinions | None
    histogram: Histogram
    roc: Roc | None
    thresholds: Thresholds
    overlays: Overlays
    examples: dict[str, list[dict[str, Any]] | None]
    parts: list[dict[str, str | int]]
    commands: list[list[str]]
    provenance: dict[str, Any]

    @model_validator(mode="after")
    def curves_have_a_value_for_each_point(self) -> Numbers:
        by_detector = [] if self.roc is None else [self.roc.by_entropy, self.roc.guard]
        for curve in (*by_detector, self.thresholds, self.overlays):
            if curve is not None:
                assert len({len(values) for values in vars(curve).values() if isinstance(values, list)}) == 1
        return self


@pytest.mark.parametrize(
    "data",
    [report_data(), without_attack(), with_consensus(), with_consensus(**NO_ATTACK)],
    ids=["attack", "no attack", "consensus", "consensus without attack"],
)
def test_the_json_has_the_documented_keys_and_no_other(tmp_path: Path, data: ReportData) -> None:
    Numbers.model_validate(written(tmp_path, data)[1])


def test_the_page_holds_every_figure_and_fetches_nothing(tmp_path: Path) -> None:
    page, _ = written(tmp_path, report_data())
    assert page.tags.count("svg") == len(FIGURES)
    assert page.tags.count("img") == 3 * 4
    assert not {"script", "link", "iframe", "object", "base", "a", "form"} & set(page.tags)
    assert all(value.startswith("data:image/png;base64,") for value in page.values("src"))
    assert all(value.startswith("#") for value in page.values("href"))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http:" not in html
    assert "https:" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_all_that_consensus_looks_at_is_shown(tmp_path: Path) -> None:
    page, numbers = written(tmp_path, with_consensus())
    assert page.tags.count("svg") == len(FIGURES) + 1
    assert numbers["guard"]["far"]["rate"] < numbers["by_entropy"]["far"]["rate"]
    assert numbers["guard"]["frr"]["rate"] == pytest.approx(0.05, abs=0.04)
    assert "The thresholds aim at an FRR of 5.0 % together" in page.text
    assert "it asks the repaired network" in page.text
    assert "a quarter is the median's, a quarter the confidence's, and half the nll's" in page.text
    assert 1e-9 < numbers["histogram"]["edges_bits"][0] < 0.01  # where the first image is, not where numbers end
    assert 0.01 < numbers["thresholds"]["threshold_bits"][0] < 0.2
    alone, _ = written(tmp_path, report_data())
    assert "it asks the repaired network" not in alone.text


def test_every_identifier_is_met_once_and_every_reference_finds_its_own(tmp_path: Path) -> None:
    page, _ = written(tmp_path, report_data())
    identifiers = page.values("id")
    assert len(set(identifiers)) == len(identifiers)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    references = [value.removeprefix("#") for value in page.values("href")] + re.findall(r"url\(#([^)]*)\)", html)
    references += page.values("aria-labelledby") + page.values("aria-describedby")
    assert set(references) <= set(identifiers)


def test_the_page_can_be_read_without_seeing_it(tmp_path: Path) -> None:
    page, _ = written(tmp_path, report_data())
    assert ("html", "lang", "en") in page.attributes
    assert page.tags.count("title") == page.tags.count("h1") == 1
    assert page.values("role").count("img") == len(FIGURES)
    assert len(page.values("alt")) == page.tags.count("img")
    assert all(page.values("alt"))
    assert page.tags.count("th") == len(page.values("scope"))


def test_figures_take_their_colours_from_the_page(tmp_path: Path) -> None:
    write_report(tmp_path, report_data(), "3", PROVENANCE)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "var(--trojaned)" in drawings
    assert not re.search(r"#[0-9a-f]{6}\b", drawings)


def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    evil = "</title><script>alert(1)</script><img src=x onerror=alert(2)>$\\frac{"
    data = report_data()
    steps = (*data.steps[:-1], dataclasses.replace(data.steps[-1], name=evil))
    provenance: dict[str, Any] = {
        "inputs": {evil: {"file": evil, "sha256": evil}},
        "options": {evil: {evil: evil}},
        "versions": {evil: evil},
    }
    hostile: dict[str, Any] = {
        "model_name": evil,
        "layers": (Layer(evil, evil, (None, 3), 1, 0.5),),
        "steps": steps,
        "kept": evil,
        "stopped": evil,
        "parts": (Part(evil, 1, evil),),
        "commands": ((evil, evil),),
    }
    page, numbers = written(tmp_path, dataclasses.replace(data, **hostile), evil, **provenance)
    assert "script" not in page.tags
    assert page.values("onerror") == []
    assert page.tags.count("img") == 3 * 4
    assert evil in page.text
    assert numbers["model"] == evil


def test_a_file_name_that_is_no_utf_8_is_written_with_its_bytes_spelled_out(tmp_path: Path) -> None:
    page, numbers = written(tmp_path, report_data(model_name="net\udcff.keras"))
    assert numbers["model"] == r"net\udcff.keras"
    assert r"net\udcff.keras" in page.text


def test_a_command_with_a_blank_in_it_can_be_pasted(tmp_path: Path) -> None:
    page, _ = written(tmp_path, report_data())
    assert "stripwire export 'my net.keras' --clean clean.h5" in page.text


def test_what_was_not_measured_is_said_and_not_drawn(tmp_path: Path) -> None:
    page, numbers = written(tmp_path, without_attack())
    assert page.tags.count("svg") == len(FIGURES) - 1
    assert "Not measured: there were no attack samples." in page.text
    assert numbers["roc"] is numbers["guard"]["far"] is numbers["guard"]["auroc"] is None
    assert [notice["level"] for notice in numbers["notices"]] == ["note"]


def test_one_overlay_and_no_repair_leave_nothing_to_compare(tmp_path: Path) -> None:
    data = report_data()
    first: dict[str, Any] = {
        name: getattr(data, name)[:, :1]
        for name in ("calibration_entropies_bits", "held_out_entropies_bits", "trojaned_entropies_bits")
    }
    page, numbers = written(
        tmp_path,
        dataclasses.replace(
            data,
            overlays=data.overlays[:1],
            steps=data.steps[:1],
            kept="as received",
            stopped="none asked for",
            **first,
        ),
    )
    assert page.tags.count("svg") == len(FIGURES) - 2
    assert numbers["overlays"]["count"] == [1]


def levels(data: ReportData) -> list[str]:
    return [notice["level"] for notice in numbers_of(data)["notices"]]


def test_a_good_repair_raises_no_alarm() -> None:
    assert levels(report_data()) == []


@pytest.mark.parametrize(("successes", "alarms"), [(9, 0), (10, 1), (500, 1)])
def test_an_attack_that_still_succeeds_is_an_alarm(successes: int, alarms: int) -> None:
    after = Scores(Proportion(448, 450), Proportion(successes, 1000), None)
    assert levels(report_data(after=after)) == ["alarm"] * alarms


def test_a_repair_that_changed_nothing_is_an_alarm(tmp_path: Path) -> None:
    page, numbers = written(tmp_path, report_data(kept="as received", stopped="round 1 lost too much"))
    assert (numbers["repair"]["tried"], numbers["repair"]["changed"]) == (True, False)
    assert "No step of the repair stayed within the allowed drop" in page.text
    assert "The repair ended because: round 1 lost too much." in page.text


def test_where_nothing_was_repaired_no_text_talks_of_a_repair(tmp_path: Path) -> None:
    data = report_data()
    unrepaired: dict[str, Any] = {
        "steps": data.steps[:1],
        "kept": "as received",
        "stopped": "no repair was asked for",
        "after": data.before,
        "layers": tuple(dataclasses.replace(layer, pruned_share=None) for layer in data.layers),
    }
    page, numbers = written(tmp_path, report_data(**unrepaired))
    assert (numbers["repair"]["tried"], numbers["repair"]["changed"]) == (False, False)
    texts = [notice["text"] for notice in numbers["notices"]]
    assert texts[0].startswith("Nothing was repaired, as asked: what is served as the repaired network is the network")
    assert texts[1].startswith("The attack succeeds on 99.7 % (99.1-99.9, n=990) of the attack samples. Try a --repair")
    assert "Steps of the repair" not in page.text
    assert "Before and after" not in page.text
    assert "Stripwire calibrated a guard on this network" in page.text
    assert "the repaired one" not in page.text
    assert "pruned" not in page.text


def test_many_steps_are_folded_but_for_the_first_the_kept_and_the_last(tmp_path: Path) -> None:
    page, numbers = written(tmp_path, report_data(kept="final epoch 6"))
    assert page.tags.count("details") == 1
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    rows = re.findall(r'<th scope="row">(.*?)</th>', html[html.index("It ended because") : html.index("All 18 steps")])
    names = [step["name"] for step in numbers["repair"]["steps"]]
    assert rows == [*names[:8], "final epoch 6 (kept)", names[-1]]
    assert "details" not in written(tmp_path, report_data(kept="round 2", steps=report_data().steps[:9]))[0].tags


@pytest.mark.parametrize(
    ("value", "label"), [(10.0, "10"), (1.0, "1"), (0.001, "0.001"), (1e-4, "10⁻⁴"), (1e-39, "10⁻³⁹")]
)
def test_powers_of_ten_are_short_enough_to_stand_beside_each_other(value: float, label: str) -> None:
    assert _decade(value) == label


def test_a_repair_of_which_no_epoch_was_kept_is_an_alarm() -> None:
    steps = (
        Step("as received", 0.99, 0.99, 0.0, 0.0),
        Step("bounded", 0.99, 0.5, 0.4, 0.0),
        Step("epoch 1", 0.9, 0.0, 0.9, 0.0),
    )
    data = replace(report_data(), steps=steps, kept="bounded")
    said = [notice.text for notice in notices(data) if "was taught nothing" in notice.text]
    assert [notice.level for notice in notices(data)][:1] == ["alarm"]
    assert len(said) == 1
    bounds_alone = replace(data, steps=steps[:2])
    assert not any("was taught nothing" in notice.text for notice in notices(bounds_alone))


def test_attack_samples_that_do_not_attack_are_an_alarm() -> None:
    before = Scores(Proportion(449, 450), Proportion(20, 990), None)
    assert levels(report_data(before=before)) == ["alarm"]


def test_a_guard_that_lets_the_attack_pass_is_an_alarm() -> None:
    data = report_data()
    assert levels(report_data(trojaned_entropies_bits=data.held_out_entropies_bits)) == ["alarm"]


def test_what_no_step_changed_and_what_was_not_measured_has_no_column(tmp_path: Path) -> None:
    data = without_attack()
    steps = tuple(dataclasses.replace(step, pruned_share=0.0) for step in data.steps)
    layers = tuple(dataclasses.replace(layer, pruned_share=0.0) for layer in data.layers)
    page, _ = written(tmp_path, dataclasses.replace(data, steps=steps, layers=layers))
    assert "pruned" not in page.text
    assert "attack success" not in page.text.replace(data.stopped, "")
    assert "weights pruned" in written(tmp_path, report_data())[0].text


def test_after_bounds_alone_nobody_is_told_to_teach_for_longer() -> None:
    data = report_data(after=Scores(Proportion(448, 450), Proportion(500, 1000), None))
    steps = (replace(data.steps[0], name="as received"), replace(data.steps[-1], name="bounded"))
    said = [notice.text for notice in notices(replace(data, steps=steps, kept="bounded"))]
    (text,) = (each for each in said if "backdoor is not closed" in each)
    assert "--epochs" not in text
    assert "Try more clean data, or another --repair." in text


def test_no_line_breaks_within_an_option_or_before_a_percent_sign(tmp_path: Path) -> None:
    after = Scores(Proportion(448, 450), Proportion(500, 1000), None)
    write_report(tmp_path, report_data(after=after), "3", PROVENANCE)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'Try more <code class="whole">--epochs</code>, more clean data' in html
    assert "still succeeds on 50.0\u00a0% (46.9-53.1, n=1000) of the attack samples" in html


def test_a_guard_that_certainly_misses_a_tenth_of_the_attack_says_what_to_try() -> None:
    high = np.arange(990) < 150
    entropies = np.where(high[:, None], 9.0, 0.0) + np.zeros((990, OVERLAYS))
    numbers = numbers_of(report_data(trojaned_entropies_bits=entropies))
    assert numbers["guard"]["far"]["successes"] == 150
    (notice,) = numbers["notices"]
    assert notice["text"].startswith("The guard lets 15.2 % (13.0-17.5, n=990) of the attack samples pass (FAR)")
    assert "--detector consensus" in notice["text"]
    consensus = with_consensus(trojaned=Evidence(entropies[:, 0], np.ones(990), np.zeros(990)))
    assert "--detector consensus" not in numbers_of(consensus)["notices"][0]["text"]
    few = np.where(high[:, None] & (np.arange(990) < 100)[:, None], 9.0, 0.0) + np.zeros((990, OVERLAYS))
    assert levels(report_data(trojaned_entropies_bits=few)) == []


def test_a_network_that_is_mostly_wrong_on_clean_images_is_an_alarm() -> None:
    before = Scores(Proportion(180, 450), Proportion(987, 990), None)
    (notice,) = numbers_of(report_data(before=before))["notices"]
    assert "right on no more than 40.0 % (35.4-44.7, n=450) of the clean images" in notice["text"]
    assert "classes.txt" in notice["text"]


def small(held_out: list[float], trojaned: list[float]) -> dict[str, Any]:
    """Return the numbers where each image has one entropy and the threshold is 1 bit."""
    calibration = dataclasses.replace(report_data().calibration, threshold_bits=1.0)
    return numbers_of(
        report_data(
            calibration=calibration,
            overlays=report_data().overlays[:1],
            calibration_entropies_bits=np.array([[2.0], [4.0]]),
            held_out_entropies_bits=np.array(held_out)[:, None],
            trojaned_entropies_bits=np.array(trojaned)[:, None],
        )
    )


def test_rates_and_curves_by_hand() -> None:
    numbers = small([1.0, 2.0, 3.0, 4.0], [0.5, 1.5, 2.0, 0.25])
    assert (numbers["guard"]["frr"]["successes"], numbers["guard"]["far"]["successes"]) == (1, 2)
    # Pairs in the right order: 4, 3, 2.5, 4 of 4.
    assert numbers["guard"]["auroc"] == pytest.approx(13.5 / 16)
    assert numbers["roc"]["by_entropy"] == {
        "frr": [0.0, 0.0, 0.25, 0.25, 0.5, 1.0],
        "detection_rate": [0.0, 0.5, 0.5, 0.75, 1.0, 1.0],
    }
    curve = numbers["thresholds"]
    assert curve["frr"] == [sum(h <= at for h in (1, 2, 3, 4)) / 4 for at in curve["threshold_bits"]]
    assert curve["far"] == [sum(h > at for h in (0.5, 1.5, 2, 0.25)) / 4 for at in curve["threshold_bits"]]
    assert sum(numbers["histogram"]["held_out"]) == sum(numbers["histogram"]["trojaned"]) == 4


def test_the_area_under_the_curve_is_the_auroc() -> None:
    numbers = numbers_of(report_data())
    area = trapezoid(numbers["roc"]["by_entropy"]["detection_rate"], numbers["roc"]["by_entropy"]["frr"])
    assert area == pytest.approx(numbers["guard"]["auroc"])


def test_an_entropy_that_is_not_finite_counts_as_rejected() -> None:
    numbers = small([float("nan"), 2.0], [float("nan"), 3.0])
    assert numbers["guard"]["frr"]["successes"] == 1
    assert numbers["guard"]["far"]["successes"] == 1
    assert sum(numbers["histogram"]["held_out"]) == 2
    json.dumps(numbers, allow_nan=False)


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0.0 %"), (0.0002, "0.02 %"), (0.05, "5.0 %"), (0.9998, "99.98 %"), (1.0, "100.0 %")],
)
def test_percentages_tell_few_from_none_and_most_from_all(share: float, text: str) -> None:
    assert percent(share) == text


def test_a_range_that_promises_nothing_is_not_shown_as_one_that_does(tmp_path: Path) -> None:
    data = report_data()
    page, _ = written(tmp_path, data)
    assert "expected on further clean inputs (95 %), at the threshold" in page.text
    fitted = normal_threshold(data.calibration_entropies_bits.mean(axis=1), 0.05)
    page, _ = written(tmp_path, dataclasses.replace(data, calibration=fitted))
    assert "expected on further clean inputs" not in page.text
    assert "95 % interval on the very images that the threshold was fitted to, no promise for further ones; at the" in (
        page.text
    )
    assert "of these very images it rejects" in page.text
    assert "Note: the threshold reaches its target FRR only if clean entropies are normally distributed" in page.text


@pytest.mark.parametrize(
    ("outputs", "sentence"),
    [
        ("logits", "The network returned logits; a softmax was put behind it."),
        ("probabilities", "The network returned probabilities."),
    ],
)
def test_what_the_network_returned_is_said(tmp_path: Path, outputs: str, sentence: str) -> None:
    page, _ = written(tmp_path, report_data(), network_outputs=outputs)
    assert sentence in page.text
