"""A Prometheus on this machine, from Debian's package `prometheus`, to try the rules and the dashboard on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from deploy.background import find_program, running
from detector.errors import ServerError

RULES = Path(__file__).with_name("rules.yaml")
PACKAGE = "Debian's package: apt-get install prometheus"
"""Which has `prometheus` and `promtool`."""

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


def hasty(rules: str) -> str:
    """Return the rules for a demonstration: an hour is 2 minutes, a day 10, and alerts fire within seconds."""
    shorter = {"5m": "1m", "10m": "2m", "1h": "2m", "1d": "10m"}
    rules = re.sub(r"\[(5m|10m|1h|1d)\]", lambda window: f"[{shorter[window[1]]}]", rules)
    return re.sub(r"(?m)^(\s+)(for|interval): \w+$", r"\1\2: 10s", rules)


@dataclass(frozen=True)
class LocalPrometheus:
    """A running Prometheus.

    Attributes:
        url: where it listens, on this machine alone.
        http: asks it.
    """

    url: str
    http: httpx.Client

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
            answer = self.http.post(f"/api/v1/{kind}", data=question).raise_for_status().json()
        except httpx.HTTPError as error:
            raise ServerError(f"prometheus at {self.url} does not answer {question['query']!r}: {error}") from error
        result: Result = answer["data"]["result"]
        return result


@contextmanager
def local_prometheus(
    folder: Path, jobs: Mapping[str, str], *, port: int, interval: str = "1s", rules: str | None = None
) -> Iterator[LocalPrometheus]:
    """Run a Prometheus until the block ends.

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
    text = _CONFIGURATION.format(interval=interval, rules="" if rules is None else "rules.yaml")
    text += "".join(_JOB.format(name=name, address=address) for name, address in jobs.items())
    (folder / "prometheus.yml").write_text(text, encoding="utf-8")
    if rules is not None:
        (folder / "rules.yaml").write_text(rules, encoding="utf-8")
    address = f"127.0.0.1:{port}"
    command = [
        find_program("prometheus", PACKAGE),
        "--config.file=prometheus.yml",
        "--storage.tsdb.path=data",
        "--log.level=warn",
    ]
    command.append(f"--web.listen-address={address}")
    with httpx.Client(base_url=f"http://{address}", timeout=30, trust_env=False) as http:

        def is_ready() -> bool:
            try:
                return http.get("/-/ready").status_code == 200
            except httpx.TransportError:
                return False

        with running("prometheus", command, folder / "prometheus.log", is_ready, folder=folder):
            yield LocalPrometheus(f"http://{address}", http)
