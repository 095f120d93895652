"""Whether the monitor may load models, found out on a real server before one is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.api import GuardedClient
from client.control import control_headers
from client.monitor.control import ControlCheck, ControlToken
from deploy.embedded.server import EmbeddedTriton
from detector.errors import InputError, SetupError
from tests.client.monitor.conftest import monitoring, parsed
from tests.conftest import wait_for

FAST = ("--canaries-per-minute", "600")
WRONG = "the-wrong-token-altogether"


class Checked:
    """The check of a server, with a clock that stands still unless it is moved."""

    def __init__(self, url: str, token: str | None) -> None:
        self.now = 100.0
        self.url = url
        self.token = token
        self.tries = 0
        self._check = ControlCheck(self.connect, lambda: self.now)

    def connect(self) -> GuardedClient | None:
        self.tries += 1
        if self.token is None:
            return None
        return GuardedClient(self.url, headers=control_headers(self.token), retries=0, timeout_seconds=20)

    def told(self, after: float = 1.0) -> list[float]:
        """Return what is told after a canary that was answered so many seconds later."""
        self.now += after
        self._check.try_now_and_then()
        return [sample.value for family in self._check.collect() for sample in family.samples]


def test_a_token_that_is_taken_is_told_and_tried_once_an_hour(ensemble: EmbeddedTriton) -> None:
    checked = Checked(ensemble.grpc_address, ensemble.control_token)
    assert [checked.told(), checked.told(3598), checked.tries] == [[1.0], [1.0], 1]
    assert [checked.told(2), checked.tries] == [[1.0], 2]


def test_a_token_that_is_refused_is_told_with_what_to_do_until_it_is_taken(
    ensemble: EmbeddedTriton, caplog: pytest.LogCaptureFixture
) -> None:
    checked = Checked(ensemble.grpc_address, WRONG)
    assert [checked.told(), checked.told(3598), checked.tries] == [[0.0], [0.0], 1]
    (refused,) = [record for record in caplog.records if record.name == "stripwire.monitor"]
    assert refused.levelname == "WARNING"
    assert refused.message == "a model that breaks could not be loaded again: the server refuses the control token"
    assert "give the one that the server was started with" in vars(refused)["fields"]["why"]
    checked.token = ensemble.control_token
    assert checked.told(2) == [1.0]
    assert WRONG not in caplog.text


def test_without_a_token_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert Checked("127.0.0.1:1", None).told() == []
    assert caplog.records == []


def test_where_nobody_can_say_nothing_is_told_but_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert Checked("127.0.0.1:1", WRONG).told() == []

    def unreadable() -> GuardedClient:
        raise SetupError("the control token cannot be read")

    check = ControlCheck(unreadable)
    check.try_now_and_then()
    assert list(check.collect()) == []
    assert [record.message for record in caplog.records] == ["the control token could not be tried"] * 2


def test_the_command_tries_the_token_that_it_finds_after_the_first_verdict(
    ensemble: EmbeddedTriton, canary_file: Path
) -> None:
    with monitoring(canary_file, ensemble.grpc_address, *FAST) as monitor:
        wait_for(lambda: "stripwire_model_control" in monitor.http.get("/metrics").text)
        assert monitor.metric("stripwire_model_control") == 1
        assert monitor.stop() == 0
        assert monitor.events() == ["listening", "canaries get verdicts", "stopped"]


def test_the_command_warns_of_a_wrong_token_and_goes_on(ensemble: EmbeddedTriton, canary_file: Path) -> None:
    with monitoring(canary_file, ensemble.grpc_address, *FAST, "--control-token", WRONG) as monitor:
        wait_for(lambda: "stripwire_model_control" in monitor.http.get("/metrics").text)
        assert monitor.metric("stripwire_model_control") == 0
        wait_for(lambda: monitor.metric("stripwire_canary_seconds_count") >= 3)
        assert monitor.http.get("/readyz").status_code == 200
        assert monitor.stop() == 0
        assert len(monitor.events()) == 4
        assert "refuses the control token" in monitor.events()[2]
        assert WRONG not in monitor.log.read_text()


def test_before_a_verdict_no_token_is_tried(canary_file: Path) -> None:
    with monitoring(canary_file, "127.0.0.1:1", *FAST, "--control-token", WRONG) as monitor:
        wait_for(lambda: monitor.metric("stripwire_canary_errors_total", kind="unavailable") >= 3)
        assert ("stripwire_model_control", ()) not in parsed(monitor.http.get("/metrics").text)
        assert "the control token could not be tried" not in monitor.events()


def test_a_token_that_a_server_takes_away_is_gone_and_one_that_was_given_never_is() -> None:
    left: list[str | None] = [None, "a", "b", None, "c"]
    token = ControlToken(None, lambda: left[0])
    assert not token.is_gone()  # there was none yet
    seen = []
    while len(left) > 1:
        left.pop(0)
        seen.append((token.now(), token.is_gone()))
    assert seen == [("a", False), ("b", False), (None, True), ("c", False)]

    def unreadable() -> str:
        raise InputError("it cannot be read")

    token._find = unreadable
    assert not token.is_gone()
    assert not ControlToken("given", lambda: None).is_gone()
