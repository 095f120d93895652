"""The caller's trace, passed on to the server, where OpenTelemetry is installed."""

from __future__ import annotations

import re

try:
    from opentelemetry import propagate, trace
except ImportError:

    def trace_headers() -> dict[str, str]:
        """Return nothing: there is no trace to pass on."""
        return {}

else:

    def trace_headers() -> dict[str, str]:
        """Return what the configured propagators send of the current span, such as `traceparent`, if there is one."""
        if not trace.get_current_span().get_span_context().is_valid:
            return {}
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        # gRPC would refuse the whole request for anything else.
        return {name.lower(): value for name, value in carrier.items() if re.fullmatch(r"[ -~]*", value)}
