"""
Traces: spans of OpenTelemetry, from a request through its steps to the engine, and on to other servers.

Off by default: without `tracing.endpoint` nothing is imported, and a span is one look at a global variable.
The context comes from the header `traceparent` (W3C Trace Context), and goes out as the same header. Between processes
it is in the row of the run, or in a direct request: never in a message, which may be lost or forged.
No span has a prompt, a text or a secret. An exporter that does not answer delays nothing: its spans are dropped.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from app import __version__
from app.kernel import log
from app.kernel.errors import InvalidSettings, Problem
from app.kernel.settings import Settings

_log = log.get(__name__)

TraceSpanKind = Literal["internal", "server", "client", "producer", "consumer"]
#: A valid `traceparent` of version 00.
_PARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)
#: Values of attributes.
Attributes = Mapping[str, str | int | float | bool | list[str]]


class ActiveSpan:
    """A span that has begun; when nothing is traced, it does nothing."""

    def __init__(self, span: Any = None) -> None:
        self._span = span

    def rename(self, name: str) -> None:
        """Give the span its final name."""
        if self._span is not None:
            self._span.update_name(name)

    def set(self, attributes: Mapping[str, Any]) -> None:
        """Add attributes; those that are None are left out."""
        if self._span is not None:
            self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})

    def failed(self, reason: str, message: str = "") -> None:
        """Mark it as failed."""
        if self._span is not None:
            self._span.set_attribute("error.type", reason)
            self._span.set_status(_api("trace").StatusCode.ERROR, message[:300])

    def end(self) -> None:
        """End it. Only for spans of `begin`."""
        if self._span is not None:
            self._span.end()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make it the parent of what begins in the block. It goes on after the block."""
        if self._span is None:
            yield
            return
        with _api("trace").use_span(self._span, end_on_exit=False, record_exception=False):
            yield


_OFF = ActiveSpan()
#: The tracer; None while nothing is traced.
_tracer: Any = None


def is_on() -> bool:
    """Whether spans are recorded."""
    return _tracer is not None


def start(settings: Settings, service: str) -> None:
    """
    Send the spans of this process to the receiver of the settings, if there is one.

    Raises InvalidSettings when OpenTelemetry is not installed.
    """
    if not settings.tracing.endpoint or is_on():
        return
    try:
        exporting = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        export = importlib.import_module("opentelemetry.sdk.trace.export")
    except ImportError as error:
        problem = Problem("tracing.endpoint", f"OpenTelemetry is missing: {error}", 'pip install "arriero[otel]"')
        raise InvalidSettings([problem]) from None
    endpoint = f"{settings.tracing.endpoint.rstrip('/')}/v1/traces"
    exporter = exporting.OTLPSpanExporter(endpoint=endpoint, timeout=5)
    install(export.BatchSpanProcessor(exporter), service, settings.tracing.sample_ratio)
    _log.info("tracing_started", endpoint=endpoint, service=service)


def install(processor: Any, service: str, sample_ratio: float = 1.0) -> None:
    """Give all spans from now on to a processor of OpenTelemetry's SDK."""
    global _tracer
    sdk, sampling = (importlib.import_module(f"opentelemetry.sdk.trace{part}") for part in ("", ".sampling"))
    resources = importlib.import_module("opentelemetry.sdk.resources")
    resource = resources.Resource.create(
        {"service.namespace": "arriero", "service.name": f"arriero-{service}", "service.version": __version__}
    )
    sampler = sampling.ParentBased(sampling.TraceIdRatioBased(sample_ratio))
    provider = sdk.TracerProvider(resource=resource, sampler=sampler, shutdown_on_exit=True)
    provider.add_span_processor(processor)
    _tracer = provider.get_tracer("arriero", __version__)


def stop() -> None:
    """Record no more spans in this process."""
    global _tracer
    _tracer = None


@contextmanager
def span(
    name: str, *, kind: TraceSpanKind = "internal", parent: str | None = None, attributes: Attributes | None = None
) -> Iterator[ActiveSpan]:
    """
    Record a span around the block. Its parent is the given `traceparent`, or else the span around it.

    An exception ends it as failed, with the exception's type only: its text may quote what a user wrote.
    """
    if _tracer is None:
        yield _OFF
        return
    begun = begin(name, kind=kind, parent=parent, attributes=attributes)
    try:
        with begun.active():
            yield begun
    except BaseException as error:
        begun.failed(type(error).__name__)
        raise
    finally:
        begun.end()


def begin(
    name: str, *, kind: TraceSpanKind = "internal", parent: str | None = None, attributes: Attributes | None = None
) -> ActiveSpan:
    """Begin a span that `end` ends, on any thread."""
    if _tracer is None:
        return _OFF
    context = None
    if is_valid(parent):
        context = _propagator().extract({"traceparent": parent})
    kinds = _api("trace").SpanKind
    started = _tracer.start_span(
        name, context, kind=getattr(kinds, kind.upper()), attributes=dict(attributes or {}), record_exception=False
    )
    return ActiveSpan(started)


def current() -> str | None:
    """Return the `traceparent` of the span around the caller; None outside of one."""
    return headers().get("traceparent")


def headers() -> dict[str, str]:
    """Return the headers with which a request to another server continues the trace; none outside of one."""
    if _tracer is None:
        return {}
    carrier: dict[str, str] = {}
    _propagator().inject(carrier)
    return carrier


def is_valid(parent: str | None) -> bool:
    """Whether this is a `traceparent`."""
    return parent is not None and _PARENT.fullmatch(parent) is not None


def _api(name: str) -> Any:
    return importlib.import_module(f"opentelemetry.{name}")


def _propagator() -> Any:
    return _api("trace.propagation.tracecontext").TraceContextTextMapPropagator()
