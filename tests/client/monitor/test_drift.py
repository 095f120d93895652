"""Drift is the greatest gap between live entropies and those of calibration, as the server's own metrics tell them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from client.api import GuardedClient
from client.monitor.drift import DriftCollector, Snapshot
from deploy.embedded.server import EmbeddedTriton
from tests.client.monitor.conftest import SHAPE, TextPage
from tests.conftest import wait_for

BOUNDS = (0.5, 1.0, 2.0)


class Page:
    """A page of metrics, served over HTTP, that can be set."""

    def __init__(self, served: TextPage) -> None:
        self.served = served

    def show(self, live: list[float], shares: list[float], canary: int = 0) -> None:
        """Show how many live inputs are at or under each bound, the last of which is infinity, and what is clean."""
        lines = ["# TYPE stripwire_entropy_bits_bucket counter"]
        for traffic, counts in (("live", live), ("canary", [canary] * 4)):
            for bound, count in zip((*BOUNDS, "+Inf"), counts, strict=True):
                lines.append(f'stripwire_entropy_bits_bucket{{traffic="{traffic}",le="{bound}"}} {count}')
        lines.append("# TYPE stripwire_calibration_entropy_share gauge")
        for bound, share in zip(BOUNDS, shares, strict=True):
            lines.append(f'stripwire_calibration_entropy_share{{le="{bound}"}} {share}')
        self.served.text = "\n".join(lines) + "\n"


@pytest.fixture
def page(page_of_text: TextPage) -> Page:
    return Page(page_of_text)


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def asked(collector: DriftCollector) -> dict[str, float]:
    return {family.name: family.samples[0].value for family in collector.collect()}


def test_the_distance_is_that_of_kolmogorov_and_smirnov() -> None:
    generator = np.random.default_rng(0)
    clean, live = generator.gamma(2.0, 0.5, 400), generator.gamma(2.0, 0.7, 300)
    bounds = np.sort(clean)  # at every step of the one, and none of the other
    shares = {float(bound): float(np.mean(clean <= bound)) for bound in bounds}
    counts = {float(bound): float(np.sum(live <= bound)) for bound in bounds} | {np.inf: 300.0}
    distance, inputs = Snapshot(counts, shares).distance(Snapshot({}, shares))
    assert inputs == 300
    assert distance == pytest.approx(stats.ks_2samp(clean, live).statistic, abs=1 / 300)


def test_only_live_inputs_of_the_last_hour_count(page: Page) -> None:
    clock, shares = Clock(), [0.1, 0.5, 0.9]
    collector = DriftCollector(page.served.url, clock=clock)
    page.show([500, 500, 500, 500], shares, canary=7)
    assert asked(collector) == {"stripwire_entropy_drift_inputs": 0}
    clock.seconds += 60
    page.show([505, 525, 545, 550], shares, canary=9000)
    assert asked(collector) == {"stripwire_entropy_drift_inputs": 50}  # too few to say
    clock.seconds += 60
    page.show([510, 550, 590, 600], shares)
    assert asked(collector) == {"stripwire_entropy_drift": pytest.approx(0.0), "stripwire_entropy_drift_inputs": 100}
    clock.seconds += 3600
    page.show([610, 650, 690, 700], shares)
    assert asked(collector)["stripwire_entropy_drift"] == pytest.approx(0.9)
    clock.seconds += 3600
    page.show([620, 690, 780, 800], shares)
    assert asked(collector)["stripwire_entropy_drift"] == pytest.approx(0.1)


def test_a_server_or_a_version_that_is_new_begins_anew(page: Page) -> None:
    clock = Clock()
    collector = DriftCollector(page.served.url, clock=clock)
    for live, shares, inputs in (
        ([100, 100, 100, 1000], [0.1, 0.5, 0.9], 0),
        ([300, 300, 300, 1500], [0.1, 0.5, 0.9], 500),
        ([10, 10, 10, 20], [0.1, 0.5, 0.9], 0),  # it was started anew
        ([10, 10, 10, 220], [0.1, 0.5, 0.9], 200),
        ([10, 10, 10, 230], [0.2, 0.5, 0.9], 0),  # it was calibrated anew
        ([10, 10, 10, 240], [float("nan"), 0.5, 0.9], 0),
    ):
        clock.seconds += 60
        page.show(list(live), list(shares))
        assert asked(collector)["stripwire_entropy_drift_inputs"] == inputs


@pytest.mark.parametrize(("text", "status"), [("", 503), ("no metrics {", 200)])
def test_without_an_answer_nothing_is_told(page: Page, text: str, status: int) -> None:
    page.served.text, page.served.status = text, status
    assert asked(DriftCollector(page.served.url)) == {}


def test_nobody_there_is_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    collector = DriftCollector("http://127.0.0.1:1/metrics")
    for _ in range(3):
        assert asked(collector) == {}
    assert [record.message for record in caplog.records if record.name == "stripwire.monitor"] == [
        "the server's metrics tell no drift"  # once, not at every scrape
    ]


def test_a_page_without_a_guard_and_another_calibration_are_told(page: Page, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    collector = DriftCollector(page.served.url, clock=clock)
    page.served.text = "# nothing of ours\n"
    asked(collector)
    for shares in ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9], [0.2, 0.5, 0.9]):
        clock.seconds += 60
        page.show([0, 0, 0, 0], list(shares))
        asked(collector)
    assert [record.message for record in caplog.records if record.name == "stripwire.monitor"] == [
        "the server's metrics tell no drift",
        "another calibration is served than before: start the monitor with its canaries",
    ]


def test_no_proxy_is_asked(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    page.show([0, 0, 0, 0], [0.1, 0.5, 0.9])
    assert asked(DriftCollector(page.served.url)) == {"stripwire_entropy_drift_inputs": 0}


def test_a_real_server_is_understood(ensemble: EmbeddedTriton) -> None:
    clock = Clock()
    collector = DriftCollector(f"http://{ensemble.metrics_address}/metrics", clock=clock)
    assert asked(collector) == {"stripwire_entropy_drift_inputs": 0}
    clock.seconds += 60
    with GuardedClient(ensemble.grpc_address) as client:
        client.classify(np.random.default_rng(0).integers(0, 256, (150, *SHAPE), dtype=np.uint8))
    wait_for(lambda: asked(collector).get("stripwire_entropy_drift_inputs") == 150)
    assert 0 < asked(collector)["stripwire_entropy_drift"] <= 1
