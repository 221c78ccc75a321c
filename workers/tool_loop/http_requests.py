"""The request of an `http` step, or of a tool: its templates are rendered, with the secrets that they name."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from app.kernel import tracing
from app.workflows.http import calls
from app.workflows.http.calls import HttpCall
from app.workflows.language.http_fields import HttpFields


def _trace(given: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that continue the trace, unless the step has its own."""
    return {} if any(name.lower() == "traceparent" for name in given) else tracing.headers()


def texts_of(step: HttpFields) -> dict[str, Any]:
    """Return the parts of a step that are templates, or hold some."""
    return {"url": step.url, "headers": step.headers, "query": step.query, "json": step.json_, "body": step.body}


def call_of(
    step: HttpFields, data: Mapping[str, Any], secrets: Mapping[str, str], *, timeout: timedelta, key: str
) -> HttpCall:
    """Return the call of a step for its data. Raises StepFailure."""
    filled = calls.render_texts(texts_of(step), data, secrets)
    body = calls.json_body(filled["json"]) if step.has_json else None
    if step.body is not None:
        body = calls.text_body(filled["body"])
    return HttpCall(
        filled["url"],
        step.method,
        {**_trace(filled["headers"]), **filled["headers"]},
        filled["query"],
        body,
        step.expect,
        timeout,
        step.max_bytes,
        step.follow_redirects,
        key,
        step.idempotency_header,
        tuple(secrets.values()),
    )
