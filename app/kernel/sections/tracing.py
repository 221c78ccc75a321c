"""The section of tracing: where spans are sent."""

from __future__ import annotations

from pydantic import Field

from app.kernel.sections.section import Section


class TracingSettings(Section):
    """Traces of OpenTelemetry, from a request through its steps to the engine. They need the extra `otel`."""

    #: The receiver of OTLP over HTTP: `http://127.0.0.1:4318`. While it is empty, nothing is traced. Its headers, such
    #: as a token, are in the environment: OTEL_EXPORTER_OTLP_HEADERS.
    endpoint: str = Field(default="", pattern=r"^(https?://[^\s?#]+)?$")
    #: The part of the traces that begin here that is recorded. What a client traces is recorded if the client says so.
    sample_ratio: float = Field(default=1.0, ge=0, le=1)
