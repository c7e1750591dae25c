"""Traces: spans of requests and members, sent by OTLP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cascade_rt.engine.execution import Execution
from cascade_rt.serving.service import Service
from cascade_rt.serving.settings import Settings
from cascade_rt.serving.tracing import Tracing

from ...toy import WORDS
from .conftest import listening
from .test_command import serving

TEXTS = [" ".join(WORDS[at : at + 6]) for at in range(10)]
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


def test_the_spans_of_a_request(bundle: Path) -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing(SimpleSpanProcessor(exporter))
    service = Service({"toy": str(bundle)}, Settings(execution=Execution(threads=1), reload_seconds=0), tracing)
    with listening(service) as address:
        answer = httpx.post(f"http://{address}/v1/classify", json={"texts": TEXTS}, headers=PARENT)
        httpx.get(f"http://{address}/health")
    spans = exporter.get_finished_spans()
    exits = [found["exit"] for found in answer.json()["predictions"]]
    members = [member.name for member in service.models.get().runtime.bundle.members]
    (request,) = [span for span in spans if span.parent is not None and span.parent.is_remote]
    assert {span.context and f"{span.context.trace_id:032x}" for span in spans} == {TRACE}
    inner = [span for span in spans if span is not request]
    assert inner[0].name == "tokenize"
    assert [span.name for span in inner[1:]] == [f"member {name}" for name in members[: max(exits) + 1]]
    assert [span.attributes and span.attributes["cascade.texts"] for span in inner[1:]] == [
        sum(exit >= member for exit in exits) for member in range(max(exits) + 1)
    ]
    for span in inner:
        assert span.parent == request.context
    assert in_order([request.start_time, *times(inner), request.end_time])


def times(spans: list[ReadableSpan]) -> Iterator[int | None]:
    for span in spans:
        yield span.start_time
        yield span.end_time


def in_order(moments: list[int | None]) -> bool:
    found = [moment for moment in moments if moment is not None]
    return len(found) == len(moments) and found == sorted(found)


def test_traces_are_sent_by_otlp(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        with serving("--model-dir", str(bundle), "--traces") as (process, address):
            httpx.post(f"{address}/v1/classify", json={"texts": TEXTS}, headers=PARENT).raise_for_status()
            process.terminate()
            assert process.wait(timeout=20) == 0
            errors = process.stderr.read() if process.stderr else ""
        collector.shutdown()
    resources = [resource for request in received for resource in request.resource_spans]
    assert {
        attribute.value.string_value
        for resource in resources
        for attribute in resource.resource.attributes
        if attribute.key == "service.name"
    } == {"cascade-rt"}
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    assert "tokenize" in {span.name for span in spans}
    (row,) = [row for row in map(json.loads, errors.splitlines()[2:]) if row["path"] == "/v1/classify"]
    assert row["trace_id"] == TRACE
