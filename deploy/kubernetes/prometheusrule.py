"""Writes deploy/prometheus/rules.yaml as a PrometheusRule, for the Prometheus operator: `make prometheusrule`.

It is committed, so that `kubectl apply -k` is all that a cluster needs. The runbooks are paths in the repository;
`make prometheusrule RUNBOOKS=https://git.example/stripwire/blob/main/` makes links of them.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from pathlib import Path

RULES = Path(__file__).parents[1] / "prometheus" / "rules.yaml"
FILE = Path(__file__).parent / "base" / "prometheusrule.yaml"

_HEAD = """\
# Made from deploy/prometheus/rules.yaml by `make prometheusrule`: change that.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: stripwire
spec:
"""


def prometheus_rule(rules: str) -> str:
    """Return the manifest of rules in Prometheus' own format."""
    return _HEAD + textwrap.indent(rules, "  ")


def with_links(rules: str, runbooks: str) -> str:
    """Return the rules with a URL of each runbook.

    Args:
        rules: whose `runbook_url` are paths in the repository.
        runbooks: URL under which the repository's files can be read.
    """
    return re.sub(r"(?m)^( *runbook_url: )", lambda key: f"{key[1]}{runbooks.rstrip('/')}/", rules)


def main() -> None:
    """Write the manifest, or the rules for a Prometheus without the operator."""
    parser = argparse.ArgumentParser(description="Writes the rules as a PrometheusRule.")
    parser.add_argument("--runbooks", type=_url, help="URL of the repository's files, to link the runbooks")
    parser.add_argument(
        "--plain", type=Path, metavar="FILE", help="write the rules of a plain Prometheus there instead"
    )
    options = parser.parse_args()
    rules = RULES.read_text(encoding="utf-8")
    if options.runbooks is not None:
        rules = with_links(rules, options.runbooks)
    if options.plain is not None:
        options.plain.write_text(rules, encoding="utf-8")
    else:
        FILE.write_text(prometheus_rule(rules), encoding="utf-8")


def _url(text: str) -> str:
    if not re.fullmatch(r"https?://[!-~]+", text) or re.search(r"[#?'\"]", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected one such as https://git.example/stripwire/blob/main/")
    return text


if __name__ == "__main__":
    main()
