"""Settings: from flags and the environment, checked at the edge, with no secret in a message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from client.monitor.settings import MonitorSettings, read_settings
from detector.errors import InputError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MonitorSettings.model_fields:
        monkeypatch.delenv(f"STRIPWIRE_{name.upper()}", raising=False)


def test_what_is_given_wins_over_the_environment_and_that_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRIPWIRE_CANARIES", "from-environment.npz")
    monkeypatch.setenv("STRIPWIRE_CANARIES_PER_MINUTE", "30")
    monkeypatch.setenv("STRIPWIRE_URL", "elsewhere:8001")
    settings = read_settings(url="here:8001", record=None)
    assert settings.canaries == Path("from-environment.npz")
    assert settings.canaries_per_minute == 30.0
    assert settings.url == "here:8001"
    assert settings.record == Path("stripwire-feedback.sqlite")


def test_what_kubernetes_tells_of_a_service_of_our_name_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STRIPWIRE_PORT", "STRIPWIRE_SERVICE_PORT", "STRIPWIRE_MONITOR_PORT"):
        monkeypatch.setenv(name, "tcp://10.0.0.1:8001")
    assert read_settings(canaries="c.npz").address == ("127.0.0.1", 8003)


def test_an_empty_variable_is_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRIPWIRE_FEEDBACK_TOKEN", "")
    assert read_settings(canaries="c.npz").feedback_token is None


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({}, r"canaries: got nothing, expected a value \(--canaries or STRIPWIRE_CANARIES\)"),
        ({"canaries_per_minute": 0}, "canaries per minute: got 0, expected greater than 0"),
        ({"canaries_per_minute": float("nan")}, "canaries per minute: got nan, expected"),
        ({"timeout_seconds": -1}, r"timeout seconds: got -1, .*\(--timeout or STRIPWIRE_TIMEOUT_SECONDS\)"),
        ({"listen": "8003"}, "listen: got '8003', expected host:port such as"),
        ({"listen": "a:70000"}, "listen: got 'a:70000'"),
        ({"listen": "[::g]:1"}, r"listen: got '\[::g\]:1'"),
        ({"metrics_url": "http://localhost:metrics/metrics"}, "metrics url: got 'http://localhost:metrics/metrics'"),
        ({"metrics_url": "http://[::1/metrics"}, r"metrics url: .*\(--metrics-url or STRIPWIRE_METRICS_URL\)"),
        ({"unknown": 1}, "unknown: got 1"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_with_its_remedy(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read_settings(**({"canaries": "c.npz"} | given if given else {}))


@pytest.mark.parametrize("token", ["short", "with a blank in the middle", "zw\xf6lf-und-ein-paar-mehr"])
def test_a_feedback_token_that_is_too_weak_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(InputError, match="feedback token: expected at least 16 printable") as caught:
        read_settings(canaries="c.npz", feedback_token=token)
    assert token not in str(caught.value)


@pytest.mark.parametrize("token", ["short", "with,comma-and-more-of-it", "with blanks and more of it"])
def test_a_control_token_that_no_server_can_have_is_refused_and_not_shown(token: str) -> None:
    remedy = r"\(--control-token or STRIPWIRE_CONTROL_TOKEN\)"
    with pytest.raises(InputError, match=rf"control token: expected at least 16 letters, .* {remedy}") as caught:
        read_settings(canaries="c.npz", control_token=token)
    assert token not in str(caught.value)


def test_secrets_are_not_printed() -> None:
    settings = read_settings(canaries="c.npz", token="t0ken-of-the-server", feedback_token="t0ken-of-the-feedback")  # noqa: S106
    assert "t0ken" not in repr(settings)


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(InputError, match=r"(?s)listen: .*\n.*dead after seconds: "):
        read_settings(canaries="c.npz", listen="", dead_after_seconds=0)


@pytest.mark.parametrize(
    ("listen", "address"),
    [("0.0.0.0:1", ("0.0.0.0", 1)), ("[::1]:0", ("::1", 0)), ("name.local:80", ("name.local", 80))],  # noqa: S104
)
def test_addresses_are_read_as_people_write_them(listen: str, address: tuple[str, int]) -> None:
    assert read_settings(canaries="c.npz", listen=listen).address == address


def test_tls_is_on_with_any_file_of_it(tmp_path: Path) -> None:
    assert read_settings(canaries="c.npz").tls_options is None
    assert read_settings(canaries="c.npz", tls=True).tls_options is not None
    with pytest.raises(InputError, match="root certificates"):
        assert read_settings(canaries="c.npz", tls_ca=tmp_path / "absent.pem").tls_options
