"""Puts the monitor together and runs it until it is told to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from prometheus_client import CollectorRegistry

from client.api import GuardedClient
from client.control import control_headers
from client.monitor.access import Access
from client.monitor.app import MonitorApp
from client.monitor.certificates import CertificateCollector
from client.monitor.control import ControlCheck, ControlToken
from client.monitor.drift import DriftCollector
from client.monitor.health import Health, Watch
from client.monitor.logs import log
from client.monitor.metrics import FeedbackCollector, MonitorMetrics
from client.monitor.quarantine import QuarantineCollector, QuarantineView
from client.monitor.record import FeedbackRecord
from client.monitor.sender import CanarySender
from client.monitor.settings import MonitorSettings
from detector.errors import InputError, ServerError
from samples.canaries import read_canaries

_DRAIN_SECONDS = 10


def run_monitor(settings: MonitorSettings, find_control_token: Callable[[], str | None] = lambda: None) -> None:
    """Run a monitor until SIGTERM or SIGINT; then finish what was begun, and return.

    Args:
        settings: of the monitor.
        find_control_token: returns the server's control token where the settings have none; asked whenever a model is
            to be loaded, since a server that was started anew may have another one.

    Raises:
        InputError: canary file, record, address or an option cannot be used; nothing was started then.
        ServerError: it failed by itself.
    """
    canaries = read_canaries(settings.canaries)

    def connect() -> GuardedClient:
        # Without retries: a canary tells what a single request meets.
        return _client(settings, settings.timeout_seconds, retries=0)

    control_token = ControlToken(_secret(settings.control_token), find_control_token)

    def connect_control() -> GuardedClient:
        return _client(settings, settings.reload_timeout_seconds, retries=4, control_token=control_token.now())

    def try_control() -> GuardedClient | None:
        token = control_token.now()
        return None if token is None else _client(settings, settings.timeout_seconds, retries=0, control_token=token)

    connect().close()  # says what is wrong with its options
    registry = CollectorRegistry()
    metrics = MonitorMetrics(registry, canaries)
    interval = 60.0 / settings.canaries_per_minute
    with (
        contextlib.closing(CanarySender(canaries, connect, metrics)) as sender,
        contextlib.closing(_listening(settings)) as listener,
        FeedbackRecord(settings.record) as record,
    ):
        registry.register(FeedbackCollector(record))
        if settings.metrics_url is not None:
            registry.register(DriftCollector(settings.metrics_url))
        if (tls := settings.tls_options) is not None:
            registry.register(CertificateCollector(settings.url, tls))
        control = ControlCheck(try_control)
        registry.register(control)
        view = None if settings.quarantine is None else QuarantineView(settings.quarantine, record)
        if view is not None:
            registry.register(QuarantineCollector(view))
        health = Health(
            sender,
            connect,
            connect_control,
            metrics,
            stale_after_seconds=interval + 3 * settings.timeout_seconds,
            dead_after_seconds=settings.dead_after_seconds,
            answered=control.try_now_and_then,
            is_stopping=control_token.is_gone,
        )
        access = Access(_secret(settings.feedback_token), metrics)
        app = MonitorApp(health, record, access, registry, view)
        config = uvicorn.Config(
            app.asgi,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=_DRAIN_SECONDS,
        )
        host, port = listener.getsockname()[:2]
        log(
            logging.INFO,
            "listening",
            url=f"http://{f'[{host}]' if ':' in host else host}:{port}",
            server=settings.url,
            canaries=len(canaries),
            trojaned_canaries=int(canaries.trojaned.sum()),
            feedback_in_record=sum(record.counts().values()),
            takes_feedback=settings.feedback_token is not None,
            quarantine=settings.quarantine,
        )
        if not canaries.trojaned.any():
            log(logging.WARNING, "no canary is trojaned: nobody sees the FAR, or a guard that accepts everything")
        if settings.quarantine is not None and not os.access(settings.quarantine, os.R_OK | os.X_OK):
            log(
                logging.WARNING,
                "there is no quarantine to show (yet): is the server told this folder, and may the monitor read it?",
                quarantine=settings.quarantine,
            )
        server = uvicorn.Server(config)
        failures = []

        def failed() -> None:
            # A monitor that sends no canaries is of no use, and must not have the server started anew for it.
            failures.append("the monitor failed, see its log")
            server.should_exit = True

        with _ended_by_signals(server), Watch(health, interval, failed):
            server.run(sockets=[listener])
    log(logging.INFO, "stopped")
    if failures:
        raise ServerError(failures[0])


def _client(
    settings: MonitorSettings, timeout_seconds: float, *, retries: int, control_token: str | None = None
) -> GuardedClient:
    return GuardedClient(
        settings.url,
        timeout_seconds=timeout_seconds,
        retries=retries,
        tls=settings.tls_options,
        token=_secret(settings.token),
        headers=control_headers(control_token),
    )


def _secret(value: object) -> str | None:
    read = getattr(value, "get_secret_value", None)
    return None if read is None else str(read())


def _listening(settings: MonitorSettings) -> socket.socket:
    host, port = settings.address
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise InputError(
            f"listen: {settings.listen} cannot be used ({error.strerror or error}), expected an address of this "
            "machine and a free port, 0 for any"
        ) from error
    # Its connections inherit it. Without it the end of each answer waits 40 ms until the caller has confirmed its
    # beginning, and asyncio sets it only on sockets that were made with the number of TCP.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


@contextlib.contextmanager
def _ended_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """Have SIGTERM and SIGINT end the server, and the process go on: also a signal that comes before uvicorn listens.

    It raises the signal that ended it once more when it has ended, which by default would kill the process.
    """

    def end(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
