"""The caller's trace goes over the wire."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

from deploy.embedded.server import EmbeddedTriton
from samples.hdf5 import read_hdf5
from tests.client.conftest import Connect
from tests.client.double import Server, images_of


@pytest.fixture
def double() -> Iterator[Server]:
    server = Server(max_batch_size=1)
    running = server.start()
    yield server
    running.stop(grace=None).wait()


def test_every_request_carries_the_current_span(connect: Connect, double: Server) -> None:
    tracer = TracerProvider().get_tracer("test")
    with connect(double.url) as client:
        for _ in range(2):
            with tracer.start_as_current_span("a caller's") as span:
                client.classify(images_of([1, 2, 3]))
            ours = span.get_span_context()
            parents = {inference.headers["traceparent"] for inference in double.inferences}
            assert parents == {f"00-{ours.trace_id:032x}-{ours.span_id:016x}-{ours.trace_flags:02x}"}
            assert len(double.inferences) == 3
            double.inferences.clear()


def test_the_state_of_a_trace_that_came_from_elsewhere_goes_on(connect: Connect, double: Server) -> None:
    came = SpanContext(
        0xABC, 0xDEF, is_remote=True, trace_flags=TraceFlags(0), trace_state=TraceState([("vendor", "x1")])
    )
    with connect(double.url, token="secret") as client, trace.use_span(NonRecordingSpan(came)):  # noqa: S106
        client.classify(images_of([1]))
    headers = double.inferences[0].headers
    assert headers["traceparent"] == f"00-{0xABC:032x}-{0xDEF:016x}-00"
    assert headers["tracestate"] == "vendor=x1"
    assert headers["authorization"] == "Bearer secret"


def test_outside_a_span_nothing_is_added(connect: Connect, double: Server) -> None:
    token = context.attach(baggage.set_baggage("user", "me"))
    with connect(double.url) as client:
        client.classify(images_of([1]))
    context.detach(token)
    assert not {"traceparent", "tracestate", "baggage"} & double.inferences[0].headers.keys()


def test_the_real_server_takes_it(connect: Connect, server: EmbeddedTriton, badnet: Path) -> None:
    image = read_hdf5(badnet / "clean_test_data.h5").images[0]
    tracer = TracerProvider().get_tracer("test")
    with connect(server.grpc_address) as client, tracer.start_as_current_span("a caller's"):
        assert len(client.classify(image)) == 1


def test_without_opentelemetry_nothing_is_added() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None; import client.api; from client.tracing import trace_headers; "
        "print(trace_headers())"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "{}\n"
