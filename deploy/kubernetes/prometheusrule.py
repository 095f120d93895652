"""Writes deploy/prometheus/rules.yaml as a PrometheusRule, for the Prometheus operator: `make prometheusrule`.

It is committed, so that `kubectl apply -k` is all that a cluster needs.
"""

from __future__ import annotations

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


def main() -> None:
    """Write the manifest."""
    FILE.write_text(prometheus_rule(RULES.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
