"""OpenTelemetry traces: a span for each request, and in it one for tokenization and one for each run of a member.

Where spans go, and how many are sampled, is set by OpenTelemetry's environment variables (OTEL_EXPORTER_OTLP_ENDPOINT,
OTEL_TRACES_SAMPLER, ...).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from time import monotonic_ns, time_ns
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.util.http import parse_excluded_urls
from starlette.types import ASGIApp

from .batcher import RequestRun

_NOT_TRACED = "/health$,/metrics$,/v2/health/"


class Tracing:
    """Records the spans of a server."""

    def __init__(self, processor: SpanProcessor | None = None) -> None:
        """`processor`: where spans go, instead of by OTLP to what the environment variables name."""
        resource = Resource.create({"service.name": "cascade-rt"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("cascade_rt")

    def around(self, app: ASGIApp) -> ASGIApp:
        """Return an application that makes each request a span, of the caller's trace if it names one."""
        return OpenTelemetryMiddleware(
            app,
            excluded_urls=parse_excluded_urls(_NOT_TRACED),  # older middleware takes no text
            tracer_provider=self._provider,
            server_request_hook=_name_trace,
            exclude_spans=["receive", "send"],
        )

    def record(
        self, model: str, members: Sequence[str], tokenized: tuple[float, float], runs: Iterable[RequestRun]
    ) -> None:
        """Add spans to the current request. `tokenized`: start and end by `time.monotonic`."""
        if not trace.get_current_span().is_recording():
            return
        self._add("tokenize", *tokenized, {"cascade.model": model})
        for run in runs:
            about = {
                "cascade.model": model,
                "cascade.member": members[run.stage],
                "cascade.texts": run.texts,
                "cascade.batch_texts": run.batch_texts,
                "cascade.wait_ms": 1000 * (run.started - run.queued),
            }
            self._add(f"member {members[run.stage]}", run.started, run.started + run.seconds, about)

    def _add(self, name: str, start: float, end: float, attributes: dict[str, Any]) -> None:
        epoch = time_ns() - monotonic_ns()
        span = self._tracer.start_span(name, start_time=epoch + round(1e9 * start), attributes=attributes)
        span.end(epoch + round(1e9 * end))

    def close(self) -> None:
        """Send what was not sent yet."""
        self._provider.shutdown()


def _name_trace(span: trace.Span, scope: dict[str, Any]) -> None:
    """Keep the trace's id for the log."""
    if span.is_recording():
        scope["trace_id"] = trace.format_trace_id(span.get_span_context().trace_id)
