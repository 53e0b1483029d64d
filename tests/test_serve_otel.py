"""`leangen serve --otel` and a collector: spans in the client's trace, and metrics."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import serving
import tiny_bundles

pytest.importorskip(
    "opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel with its exporter"
)

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector(monkeypatch):
    """What came by path, from programs that send to where the environment says."""
    came = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            came.setdefault(self.path, []).append(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield came
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_request_is_a_span_in_the_trace_of_its_client(collector, tmp_path, home):
    model = f"tiny-text={tiny_bundles.language(tmp_path).path}"
    asked = {"model": "tiny-text", "prompt": "hello", "max_tokens": 3, "ignore_eos": True}
    with serving.process([model], home, "--otel", "--context", "64") as (address, child):
        for headers in ({"traceparent": f"00-{TRACE}-{PARENT}-01"}, {}):
            reply = httpx.post(f"{address}/v1/completions", json=asked, headers=headers)
            assert reply.status_code == 200
        child.terminate()
        assert child.wait(timeout=20) == 0
    sent = [ExportTraceServiceRequest.FromString(body) for body in collector["/v1/traces"]]
    resources = [resource for request in sent for resource in request.resource_spans]
    named = {a.key: a.value.string_value for a in resources[0].resource.attributes}
    assert named["service.name"] == "leangen"
    spans = [span for one in resources for scope in one.scope_spans for span in scope.spans]
    assert "hello" not in str(spans)  # no prompt leaves the server
    by_id = {span.span_id: span for span in spans}

    def line(span):
        """The span, and those above it."""
        above = by_id.get(span.parent_span_id)
        return [span, *(line(above) if above else [])]

    generated = [span for span in spans if span.name.startswith("text_completion")]
    first, second = sorted(generated, key=lambda span: span.start_time_unix_nano)
    assert first.trace_id.hex() == TRACE
    assert line(first)[-1].parent_span_id.hex() == PARENT
    assert second.trace_id.hex() != TRACE and not line(second)[-1].parent_span_id
    told = {attribute.key: attribute.value for attribute in first.attributes}
    assert told["gen_ai.usage.output_tokens"].int_value == 3
    assert told["leangen.energy.gross_j"].double_value > 0
    sent = [ExportMetricsServiceRequest.FromString(body) for body in collector["/v1/metrics"]]
    scopes = [
        scope for request in sent for one in request.resource_metrics for scope in one.scope_metrics
    ]
    assert "leangen.energy" in {metric.name for scope in scopes for metric in scope.metrics}
