"""Health by inference, on the real server: broken models are named and healed, and nothing else is touched."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from client.api import GuardedClient
from client.control import ModelControl, control_headers
from client.monitor.health import Health, Watch
from client.monitor.metrics import ERROR_KINDS, MonitorMetrics
from client.monitor.sender import CanarySender
from deploy.embedded.server import EmbeddedTriton
from detector.serving import BEHIND
from tests.client.monitor.conftest import CLASSES, SHAPE, canaries, kill, serving, stub_of
from tests.conftest import wait_for

AWAY = "127.0.0.1:1"


class Watched:
    """The health of a server, with a clock that stands still unless it is moved."""

    def __init__(
        self, url: str, control_token: str | None = None, *, classes: int = CLASSES, timeout_seconds: float = 20.0
    ) -> None:
        self.now = 100.0
        self.url = url
        self.control_token = control_token
        self.timeout_seconds = timeout_seconds
        self.is_stopping = False
        self.registry = CollectorRegistry()
        metrics = MonitorMetrics(self.registry, canaries(classes))
        self.sender = CanarySender(canaries(classes), self.connect, metrics)
        self.health = Health(
            self.sender,
            self.connect,
            self.connect_control,
            metrics,
            stale_after_seconds=10,
            dead_after_seconds=120,
            is_stopping=lambda: self.is_stopping,
            clock=lambda: self.now,
        )

    def connect(self) -> GuardedClient:
        return GuardedClient(self.url, timeout_seconds=self.timeout_seconds, retries=0)

    def connect_control(self) -> GuardedClient:
        return GuardedClient(self.url, headers=control_headers(self.control_token), timeout_seconds=60)

    def rounds(self, count: int = 1, *, every: float = 1.0) -> None:
        for _ in range(count):
            self.now += every
            self.health.round()

    def state(self) -> tuple[bool, bool]:
        """Return whether it is ready, and whether it is live."""
        status = self.health.status()
        assert (self.value("stripwire_ready"), self.value("stripwire_live")) == (status.ready, status.live)
        return status.ready, status.live

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    def reloads(self) -> dict[tuple[str, str], int]:
        return {
            (sample.labels["model"], sample.labels["reason"]): int(sample.value)
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == "stripwire_model_reloads_total" and sample.value
        }

    def errors(self) -> dict[str, int]:
        counted = {kind: self.value("stripwire_canary_errors_total", kind=kind) for kind in ERROR_KINDS}
        return {kind: int(count) for kind, count in counted.items() if count}


@pytest.fixture
def watched(ensemble: EmbeddedTriton) -> Iterator[Watched]:
    watched = Watched(ensemble.grpc_address, ensemble.control_token)
    yield watched
    watched.sender.close()


def test_before_the_first_canary_nothing_is_ready() -> None:
    watched = Watched(AWAY)
    assert watched.state() == (False, True)
    assert watched.health.status().why == "no canary was sent yet"


def test_clean_and_trojaned_canaries_are_counted_in_turns(watched: Watched) -> None:
    watched.rounds(7)
    assert watched.state() == (True, True)
    assert watched.health.status().why == ""
    assert watched.value("stripwire_canary_total", truth="clean", verdict="rejected") == 4
    assert watched.value("stripwire_canary_total", truth="trojaned", verdict="rejected") == 3
    assert watched.value("stripwire_canary_total", truth="clean", verdict="accepted") == 0
    assert watched.value("stripwire_canary_seconds_count") == 7
    assert watched.errors() == {}


@pytest.mark.parametrize("model", BEHIND["ensemble"])
def test_each_model_whose_process_was_killed_is_named_and_healed(
    watched: Watched, ensemble: EmbeddedTriton, model: str
) -> None:
    watched.rounds()
    kill(ensemble, model)
    with GuardedClient(ensemble.grpc_address) as client:
        assert client.is_ready()  # says Triton
    watched.rounds()
    assert watched.reloads() == {(model, "died"): 1}
    assert watched.errors() == {"failed": 1}
    assert watched.state() == (True, True)
    watched.rounds(2)
    assert watched.errors() == {"failed": 1}


def test_of_a_server_that_is_stopping_no_model_is_loaded_again(watched: Watched, ensemble: EmbeddedTriton) -> None:
    watched.rounds()
    kill(ensemble, "badnet")
    watched.is_stopping = True
    watched.rounds()
    assert watched.reloads() == {}
    assert watched.state() == (False, True)  # not ready, and no reason to start it anew
    watched.is_stopping = False
    watched.rounds()
    assert watched.reloads() == {("badnet", "died"): 1}


def test_two_models_that_died_are_both_healed(watched: Watched, ensemble: EmbeddedTriton) -> None:
    kill(ensemble, "strip_verdict")
    kill(ensemble, "badnet")
    watched.rounds()
    assert watched.reloads() == {("badnet", "died"): 1, ("strip_verdict", "died"): 1}
    assert watched.state() == (True, True)


def test_a_model_that_dies_again_is_healed_again(watched: Watched, ensemble: EmbeddedTriton) -> None:
    for _ in range(2):
        kill(ensemble, "repaired")
        watched.rounds()
    assert watched.reloads() == {("repaired", "died"): 2}
    assert watched.state() == (True, True)


@pytest.mark.parametrize("model", BEHIND["ensemble"])
def test_a_model_that_somebody_unloaded_is_loaded(watched: Watched, model: str) -> None:
    with watched.connect_control() as client:
        client.ask(model, lambda triton, **options: triton.unload_model(model, **options))
    wait_for(lambda: "UNLOADING" not in states(watched))
    watched.rounds()
    assert watched.reloads() == {("guarded", "absent"): 1}  # which went with it, and brings it back
    assert watched.state() == (True, True)


def states(watched: Watched) -> list[str]:
    with watched.connect_control() as client:
        return list(ModelControl(client).states().values())


def test_where_control_is_not_allowed_liveness_fails_and_names_the_model(
    watched: Watched, ensemble: EmbeddedTriton
) -> None:
    watched.control_token = "the-wrong-token-altogether"  # noqa: S105
    watched.rounds()
    kill(ensemble, "strip_entropy")
    watched.rounds()
    assert watched.state() == (False, False)
    assert "model strip_entropy is broken, and it could not be loaded again" in watched.health.status().why
    assert watched.reloads() == {}
    watched.control_token = ensemble.control_token
    watched.rounds(29)
    assert watched.state() == (False, False)  # nothing is tried for a while after what did not help
    watched.rounds(2)
    assert watched.reloads() == {("strip_entropy", "died"): 1}
    assert watched.state() == (True, True)


def test_a_server_that_is_started_anew_has_its_time(watched: Watched, ensemble: EmbeddedTriton) -> None:
    watched.control_token = "the-wrong-token-altogether"  # noqa: S105
    watched.rounds()
    kill(ensemble, "repaired")
    watched.rounds()
    assert watched.state() == (False, False)
    watched.url = AWAY
    watched.rounds()
    assert watched.state() == (False, True)
    watched.rounds(2, every=61)
    assert watched.state() == (False, False)
    watched.url, watched.control_token = ensemble.grpc_address, ensemble.control_token
    watched.rounds()
    assert watched.reloads() == {("repaired", "died"): 1}
    assert watched.state() == (True, True)


def test_a_reload_keeps_the_versions_that_run(exported: Path, tmp_path: Path) -> None:
    from exporter.repository import activate

    with serving(exported, tmp_path, "1") as server:
        activate(tmp_path / "repository", "2")  # which the server was not told
        kill(server, "strip_verdict")
        watched = Watched(server.grpc_address, server.control_token)
        watched.rounds()
        assert watched.state() == (True, True)
        with watched.connect() as client:
            assert client.metadata().versions == ("1",)
        watched.sender.close()


def test_in_the_fused_layout_both_models_are_healed_too_and_what_does_not_help_fails_liveness(
    exported: Path, tmp_path: Path
) -> None:
    with serving(exported, tmp_path, "2") as server:
        watched = Watched(server.grpc_address, server.control_token)
        for model in BEHIND["fused"]:
            kill(server, model)
            watched.rounds()
            assert watched.state() == (True, True)
        assert watched.reloads() == {("fused", "died"): 1, ("strip_verdict", "died"): 1}

        calibration = tmp_path / "repository" / "strip_verdict" / "2" / "calibration.json"
        kept = calibration.read_text()
        calibration.write_text("{}")
        kill(server, "strip_verdict")
        watched.rounds()
        assert watched.state() == (False, False)
        assert "model strip_verdict is broken" in watched.health.status().why
        calibration.write_text(kept)
        watched.rounds(32)
        assert watched.state() == (True, True)
        watched.sender.close()


def test_a_model_whose_process_was_stopped_is_healed_too(watched: Watched, ensemble: EmbeddedTriton) -> None:
    stub = stub_of(ensemble, "strip_entropy")
    stub.send_signal(signal.SIGSTOP)  # within a second, Triton takes it for dead
    try:
        watched.rounds()
        assert watched.reloads() == {("strip_entropy", "died"): 1}
        assert watched.state() == (True, True)
    finally:
        stub.kill()  # Triton has forgotten it


def test_a_server_that_is_too_slow_is_left_alone_but_not_for_ever(watched: Watched) -> None:
    watched.rounds()
    watched.sender.close()
    watched.timeout_seconds = 0.0005
    watched.rounds()
    assert watched.state() == (False, True)
    watched.now += 121
    assert watched.state() == (False, False)
    assert set(watched.errors()) <= {"deadline", "unavailable"}  # there was no time for a connection, or an answer
    assert watched.reloads() == {}  # which would only make it slower
    watched.timeout_seconds = 20.0
    watched.rounds()
    assert watched.state() == (True, True)


FLOOD = """
import sys, threading
import numpy as np, tritonclient.grpc as triton
client = triton.InferenceServerClient(sys.argv[1])
images = np.zeros((64, *map(int, sys.argv[2:])), np.uint8)
given = triton.InferInput("image", images.shape, "UINT8").set_data_from_numpy(images)
room = threading.Semaphore(300)  # so many wait at once
while True:
    room.acquire()
    client.async_infer("guarded", [given], callback=lambda result, error: room.release())
"""


def test_a_server_that_has_more_to_do_than_it_can_stays_where_it_is(watched: Watched) -> None:
    watched.rounds()
    watched.sender.close()
    watched.timeout_seconds = 0.5
    flood = subprocess.Popen([sys.executable, "-c", FLOOD, watched.url, *map(str, SHAPE)])
    try:
        while "overloaded" not in watched.errors():
            watched.rounds(every=0.0)
        for _ in range(5):
            watched.rounds(every=60)
            assert watched.state() == (True, True), watched.health.status()
    finally:
        flood.kill()
        flood.wait()
    assert watched.reloads() == {}
    watched.timeout_seconds = 20.0
    while watched.health.status().why:  # until what waits has been answered
        watched.rounds(every=0.0)


def test_a_server_that_was_never_there_may_be_starting() -> None:
    watched = Watched(AWAY)
    watched.rounds(5, every=60)
    assert watched.errors() == {"unavailable": 5}
    assert watched.state() == (False, True)
    assert "the server is unavailable" in watched.health.status().why


def test_a_server_that_went_away_for_minutes_fails_liveness_and_comes_back(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from client.monitor.logs import configure_logs

    configure_logs()
    with serving(exported, tmp_path, "1") as server:
        watched = Watched(server.grpc_address)
        watched.rounds()
        assert watched.state() == (True, True)
    watched.rounds(2)
    assert watched.state() == (False, True)
    watched.rounds(3, every=60)
    assert watched.state() == (False, False)
    with EmbeddedTriton(tmp_path / "repository") as server:
        watched.url = server.grpc_address
        watched.rounds()
        assert watched.state() == (True, True)
        watched.sender.close()
    told = capsys.readouterr().err.splitlines()
    assert [line.count('"kind": "unavailable"') for line in told] == [0, 1, 1, 1, 1, 0]  # at most one a minute


def test_canaries_for_another_class_count_are_told_and_break_nothing(ensemble: EmbeddedTriton) -> None:
    watched = Watched(ensemble.grpc_address, ensemble.control_token, classes=CLASSES + 1)
    watched.rounds(3, every=60)
    assert watched.errors() == {"mismatch": 3}
    assert watched.state() == (False, True)
    assert "got a file for 6 classes, but the server has 5" in watched.health.status().why
    assert watched.reloads() == {}
    watched.sender.close()


def test_a_verdict_that_is_old_makes_nothing_ready(watched: Watched) -> None:
    watched.rounds()
    watched.now += 11
    assert watched.state() == (False, True)
    assert watched.health.status().why == "the last verdict came 11 seconds ago"
    watched.rounds()
    assert watched.state() == (True, True)


class _FailingSender(CanarySender):
    def send(self) -> None:  # type: ignore[override]
        raise RuntimeError("a mistake of ours")


def test_a_monitor_that_fails_itself_says_so_and_does_not_blame_the_server() -> None:
    watched = Watched(AWAY)
    watched.health._sender = _FailingSender(canaries(), watched.connect, watched.health._metrics)
    failed = threading.Event()
    with Watch(watched.health, 0.01, failed.set):
        assert failed.wait(30)
    assert watched.health.status().live


def test_canaries_go_out_at_the_rate_that_is_set(watched: Watched) -> None:
    with Watch(watched.health, 0.3, pytest.fail):
        wait_for(lambda: (watched.value("stripwire_canary_seconds_count") or 0) >= 5)
    sent = watched.value("stripwire_canary_seconds_count")
    assert sent is not None
    assert 5 <= sent <= 7


def test_canaries_of_one_kind_alone_are_sent_over_and_over(ensemble: EmbeddedTriton) -> None:
    from samples.canaries import Canaries

    registry = CollectorRegistry()
    clean = Canaries(np.zeros((2, *SHAPE), np.uint8), np.zeros(2, np.bool_), CLASSES)
    sender = CanarySender(clean, lambda: GuardedClient(ensemble.grpc_address), MonitorMetrics(registry, clean))
    assert [sender.send().kind for _ in range(5)] == [None] * 5
    assert registry.get_sample_value("stripwire_canary_total", {"truth": "clean", "verdict": "rejected"}) == 5
    assert registry.get_sample_value("stripwire_canary_images", {"truth": "trojaned"}) == 0
    sender.close()
