"""Traces from the client through the API, the step or the pool to the engine, with OpenTelemetry's own SDK."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import text

from app.inference.direct import DirectRequest
from app.kernel import tracing
from app.workflows.runs.service import Runs
from tests.api.openai.conftest import MODEL, StartPool
from tests.live.conftest import until
from workers import steps
from workers.tool_loop import http_requests

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
CHAT = {"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": "a secret of the user"}]}
STEP = {
    "workflow": "ask",
    "steps": [
        {"id": "a", "kind": "generate", "model": MODEL, "prompt": "a secret of the user", "max_tokens": 5},
        {"id": "b", "kind": "transform", "cel": "1", "needs": ["a"]},
    ],
}


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    found = InMemorySpanExporter()
    tracing.install(SimpleSpanProcessor(found), "test")
    yield found
    tracing.stop()


def spans(exporter: InMemorySpanExporter) -> dict[str, Any]:
    return {span.name: span for span in exporter.get_finished_spans()}


def parent_of(span: Any) -> str:
    return f"{span.parent.span_id:016x}"


def id_of(span: Any) -> str:
    return f"{span.context.span_id:016x}"


def test_a_call_is_one_trace_from_the_client_to_the_engine(
    api: str, start_pool: StartPool, exporter: InMemorySpanExporter
) -> None:
    start_pool()
    with httpx2.Client(base_url=api, trust_env=False, timeout=60) as client:
        assert client.post("/v1/chat/completions", json=CHAT, headers={"traceparent": PARENT}).is_success
        assert client.get("/healthz").is_success
    until(lambda: len(spans(exporter)) >= 2)
    found = spans(exporter)

    server, model = found["POST /v1/chat/completions"], found[f"chat {MODEL}"]
    assert {f"{span.context.trace_id:032x}" for span in found.values()} == {TRACE}
    assert parent_of(server) == SPAN
    assert parent_of(model) == id_of(server)
    assert server.attributes["http.response.status_code"] == 200
    about = model.attributes
    assert (about["gen_ai.operation.name"], about["gen_ai.request.model"], about["gen_ai.request.max_tokens"]) == (
        *("chat", MODEL),
        5,
    )
    assert (about["gen_ai.usage.output_tokens"], about["gen_ai.response.finish_reasons"]) == (5, ("stop",))
    assert not [name for name in found if "healthz" in name]
    assert "secret" not in "".join(span.to_json() for span in found.values())


def test_the_steps_of_a_run_belong_to_the_trace_of_its_submission(
    api: str, start_pool: StartPool, runs: Runs, exporter: InMemorySpanExporter
) -> None:
    """The context is in the row of the run: a message that is lost or sent again loses nothing."""
    pool = start_pool()
    with httpx2.Client(base_url=api, trust_env=False, timeout=60) as client:
        answer = client.post("/v1/runs", json={"definition": STEP}, headers={"traceparent": PARENT})
        run_id = answer.raise_for_status().json()["id"]
        for key in ("a", "b"):
            _run(pool, runs, run_id, key)
    found = spans(exporter)

    submit, step = found["submit ask"], found["step ask/a"]
    assert {f"{found[name].context.trace_id:032x}" for name in ("submit ask", "step ask/a", "step ask/b")} == {TRACE}
    assert parent_of(submit) == id_of(found["POST /v1/runs"])
    assert parent_of(step) == parent_of(found["step ask/b"]) == id_of(submit)
    assert parent_of(found[f"chat {MODEL}"]) == id_of(step)
    assert step.attributes["arriero.run.id"] == run_id
    assert "secret" not in "".join(span.to_json() for span in found.values())


def _run(pool: Any, runs: Runs, run_id: str, key: str) -> None:
    with runs.database.work() as work:
        row = work.row(
            text("SELECT id, attempt FROM step WHERE run_id = :run AND key = :key"), {"run": run_id, "key": key}
        )
    assert row is not None
    steps.run_step(pool.runtime, row.id, row.attempt)


def test_calls_of_steps_to_servers_carry_the_trace(exporter: InMemorySpanExporter) -> None:
    with tracing.span("around"):
        found = http_requests._trace({"Accept": "a/b"})
        assert found["traceparent"].split("-")[2] == id_of(_current())
        assert http_requests._trace({"TraceParent": PARENT}) == {}
    assert http_requests._trace({}) == {}


def _current() -> Any:
    return trace.get_current_span()._readable_span()  # type: ignore[attr-defined] # of the SDK's span


@pytest.mark.parametrize(
    "parent", ["", "x", "00-" + "0" * 32 + f"-{SPAN}-01", PARENT + "-more", "ff" + PARENT[2:], PARENT.upper(), "é" * 99]
)
def test_a_wrong_context_begins_a_trace_of_its_own(parent: str, exporter: InMemorySpanExporter) -> None:
    with tracing.span("a", parent=parent):
        pass
    (span,) = exporter.get_finished_spans()

    assert span.parent is None
    request = DirectRequest.new("m", {}, "interactive", {}, 0)
    message = request.encoded()[:-1].encode() + b',"trace":' + repr(parent).replace("'", '"').encode() + b"}"
    assert DirectRequest.decoded(message).trace_parent is None


def test_a_failure_is_noted_without_its_text(exporter: InMemorySpanExporter) -> None:
    with pytest.raises(ValueError, match="secret"), tracing.span("a"):
        raise ValueError("a secret of the user")
    (span,) = exporter.get_finished_spans()

    assert span.attributes is not None
    assert span.attributes["error.type"] == "ValueError"
    assert "secret" not in span.to_json()


def test_off_nothing_is_imported_recorded_or_sent() -> None:
    code = (
        "import sys\n"
        "from app.kernel import settings, tracing\n"
        "import app.api.main, workers.steps, workers.pool.direct\n"
        "tracing.start(settings.load().settings, 'api')\n"
        "with tracing.span('a') as span: span.set({'x': 1}); span.failed('y')\n"
        "tracing.begin('b').end()\n"
        "assert not tracing.is_on() and tracing.headers() == {} and tracing.current() is None\n"
        "assert not {'opentelemetry.sdk.trace.export', 'opentelemetry.exporter'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
