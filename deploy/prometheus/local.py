"""A Prometheus on this machine, from Debian's package `prometheus`, to try the rules and the dashboard on."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from deploy.embedded.launch import bound_to_us
from detector.errors import ServerError, ServerStartError, SetupError

RULES = Path(__file__).with_name("rules.yaml")

_START_SECONDS = 60.0
_CONFIGURATION = """
global: {{scrape_interval: {interval}, evaluation_interval: {interval}}}
rule_files: [{rules}]
scrape_configs:
"""
_JOB = """
  - job_name: {name}
    static_configs: [{{targets: ['{address}']}}]
"""

Result = list[dict[str, Any]]


def find_program(name: str = "prometheus") -> str:
    """Return the path of a program of the package.

    Raises:
        SetupError: it is not installed.
    """
    path = shutil.which(name)
    if path is None:
        raise SetupError(f"there is no {name}, expected the one of Debian's package: apt-get install prometheus")
    return path


def hasty(rules: str) -> str:
    """Return the rules for a demonstration: an hour is 2 minutes, a day 10, and alerts fire within seconds."""
    shorter = {"5m": "1m", "10m": "2m", "1h": "2m", "1d": "10m"}
    rules = re.sub(r"\[(5m|10m|1h|1d)\]", lambda window: f"[{shorter[window[1]]}]", rules)
    return re.sub(r"(?m)^(\s+)(for|interval): \w+$", r"\1\2: 10s", rules)


class LocalPrometheus:
    """A running Prometheus, as a context manager.

    Args:
        folder: an empty folder for all that it writes.
        jobs: what it scrapes: `host:port` by name of the job.
        port: that it listens on, on this machine alone.
        interval: from one scrape to the next, as Prometheus writes times.
        rules: text of a file of rules; None for none.

    Raises:
        SetupError: it is not installed.
        ServerStartError: it did not start; with its own words.
    """

    def __init__(
        self, folder: Path, jobs: Mapping[str, str], *, port: int, interval: str = "1s", rules: str | None = None
    ) -> None:
        self._program = find_program()
        self._folder = folder
        self.url = f"http://127.0.0.1:{port}"
        text = _CONFIGURATION.format(interval=interval, rules="" if rules is None else "rules.yaml")
        text += "".join(_JOB.format(name=name, address=address) for name, address in jobs.items())
        (folder / "prometheus.yml").write_text(text, encoding="utf-8")
        if rules is not None:
            (folder / "rules.yaml").write_text(rules, encoding="utf-8")
        self._http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LocalPrometheus:
        address = f"--web.listen-address={self.url.removeprefix('http://')}"
        options = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", "--log.level=warn", address]
        log = self._folder / "prometheus.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603  our own command line, no shell
                bound_to_us(self._program, *options),
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        soon = Retrying(
            retry=retry_if_result(lambda ready: ready is False),
            wait=wait_fixed(0.1),
            stop=stop_after_delay(_START_SECONDS),
            retry_error_callback=lambda _: None,
        )
        with ExitStack() as undo:
            undo.callback(self.__exit__, None, None, None)
            if not soon(self._is_ready):
                raise ServerStartError(f"prometheus did not start:\n{log.read_text(errors='replace')}")
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=60)

    def now(self, expression: str) -> Result:
        """Return what an expression is at this moment.

        Raises:
            ServerError: it does not answer, or not that question.
        """
        return self._ask("query", query=expression)

    def over(self, expression: str, start: float, end: float, step: float) -> Result:
        """Return what an expression was from `start` to `end`, in seconds since 1970, every `step` seconds."""
        return self._ask("query_range", query=expression, start=start, end=end, step=step)

    def _ask(self, kind: str, **question: Any) -> Result:
        try:
            answer = self._http.post(f"/api/v1/{kind}", data=question).raise_for_status().json()
        except httpx.HTTPError as error:
            raise ServerError(f"prometheus at {self.url} does not answer {question['query']!r}: {error}") from error
        result: Result = answer["data"]["result"]
        return result

    def _is_ready(self) -> bool | None:
        """Say whether it answers; None where it has ended."""
        if self._process is None or self._process.poll() is not None:
            return None
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False
