"""
Spans of work: a step, and within it what its model does, by the semantic conventions for generative AI.

https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from app.inference.model_metrics.metric import Operation
from app.kernel import tracing
from app.kernel.tracing import ActiveSpan
from app.workflows.runs.claims import Claim
from app.workflows.state_machine.outcomes import Failure, Outcome, Success
from workers.telemetry import operations

#: By operation, its name in the conventions.
_NAMES = {
    Operation.REASONING: "chat",
    Operation.EMBEDDING: "embeddings",
    Operation.RERANKING: "rerank",
    Operation.COMPRESSION: "compress",
}
#: Fields of a request, and of a `generate` step, with their attributes.
_FIELDS = {"max_tokens": "gen_ai.request.max_tokens", "seed": "gen_ai.request.seed"}


def step(claim: Claim) -> AbstractContextManager[ActiveSpan]:
    """Record the span of an attempt, in the trace of its run."""
    about: dict[str, Any] = {
        "arriero.run.id": str(claim.run_id),
        "arriero.workflow": claim.workflow,
        "arriero.step.key": claim.key,
        "arriero.step.attempt": claim.attempt,
        "arriero.namespace": claim.namespace,
    }
    name = f"step {claim.workflow}/{claim.key.partition('[')[0]}"
    return tracing.span(name, kind="consumer", parent=claim.trace_parent, attributes=about)


@contextmanager
def model(claim: Claim) -> Iterator[ActiveSpan]:
    """Record the span of what a model does for a step; nothing for a step without a model."""
    kind = operations.kind_of(claim)
    if not tracing.is_on() or kind is None or claim.model is None:
        yield ActiveSpan()
        return
    with tracing.span(f"{_NAMES[kind]} {claim.model}", kind="client", attributes=_about(kind, claim.model)) as span:
        span.set({attribute: getattr(claim.work, field, None) for field, attribute in _FIELDS.items()})
        yield span


def request(body: Any, name: str, run_id: str, parent: str | None) -> ActiveSpan:
    """Begin the span of a direct request."""
    if not tracing.is_on():
        return ActiveSpan()
    kind = operations.kind_of_request(body, None)
    about = {**_about(kind, name), "arriero.run.id": run_id}
    span = tracing.begin(f"{_NAMES[kind]} {name}", kind="client", parent=parent, attributes=about)
    if isinstance(body, dict):
        numbers = {attribute: body.get(field) for field, attribute in _FIELDS.items()}
        span.set({name: value for name, value in numbers.items() if isinstance(value, int)})
    return span


def note(span: ActiveSpan, outcome: Outcome | None) -> None:
    """Add to a span how it ended, and what it used."""
    if isinstance(outcome, Failure):
        span.failed(str(outcome.reason))
    if not isinstance(outcome, Success | Failure):
        return
    usage = outcome.usage
    first = usage.first_token
    span.set(
        {
            "gen_ai.usage.input_tokens": usage.tokens_in or None,
            "gen_ai.usage.output_tokens": usage.tokens_out or None,
            "gen_ai.usage.cache_read.input_tokens": usage.tokens_cached or None,
            "gen_ai.response.finish_reasons": [usage.finish_reason] if usage.finish_reason else None,
            "arriero.time_to_first_token": None if first is None else first.total_seconds(),
        }
    )


def _about(kind: Operation, name: str) -> dict[str, Any]:
    return {
        "gen_ai.operation.name": _NAMES[kind],
        "gen_ai.provider.name": "arriero",
        "gen_ai.request.model": name,
        "gen_ai.response.model": name,
    }
