"""
Operations of models: which kind of operation a step or a direct request was, and how it ended, as a sample.

Nothing here counts or stores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.inference.model_metrics.metric import MetricKey, Operation, OperationOutcome, OperationSample
from app.kernel.errors import FailureReason
from app.workflows.language.agent import AgentTurn
from app.workflows.language.compression import CompressFields
from app.workflows.language.generate_fields import GenerateFields
from app.workflows.language.recall import EmbedPassagesFields
from app.workflows.language.steps import EmbedFields, OpenAIFields
from app.workflows.language.summarize import SummarizeFields
from app.workflows.runs.claims import Claim
from app.workflows.state_machine.outcomes import Failure, Outcome, Success

_KINDS: Mapping[type[Any], Operation] = {
    GenerateFields: Operation.REASONING,
    SummarizeFields: Operation.REASONING,
    AgentTurn: Operation.REASONING,
    EmbedFields: Operation.EMBEDDING,
    EmbedPassagesFields: Operation.EMBEDDING,
    CompressFields: Operation.COMPRESSION,
}


def of_step(claim: Claim, outcome: Outcome, seconds: float) -> OperationSample | None:
    """Return the sample of an attempt; None when no model did anything, or it is done again or elsewhere."""
    work = claim.work
    if not isinstance(outcome, Success | Failure):
        return None
    if isinstance(work, OpenAIFields):
        inputs = claim.data.get("inputs")
        body = inputs.get("request") if isinstance(inputs, Mapping) else None
        return of_request(body, claim.namespace, claim.model, outcome, seconds)
    kind = kind_of(claim)
    model = work.model if isinstance(work, CompressFields) else claim.model
    return None if kind is None else _sample(claim.namespace, model, kind, outcome, seconds)


def of_request(
    body: Any, namespace: str, model: str | None, outcome: Success | Failure, seconds: float
) -> OperationSample | None:
    """Return the sample of a request of OpenAI's form, as `of_step` does."""
    output = outcome.output if isinstance(outcome, Success) else None
    return _sample(namespace, model, kind_of_request(body, output), outcome, seconds)


def kind_of(claim: Claim) -> Operation | None:
    """Return what the model of a step does; None for a step in which none does anything."""
    work = claim.work
    if isinstance(work, OpenAIFields):
        inputs = claim.data.get("inputs")
        return kind_of_request(inputs.get("request") if isinstance(inputs, Mapping) else None, None)
    return next((kind for base, kind in _KINDS.items() if isinstance(work, base)), None)


def kind_of_request(body: Any, output: Any) -> Operation:
    """Return what a model does for a request of OpenAI's form, by its answer if that is known."""
    if isinstance(output, Mapping):
        if "results" in output:
            return Operation.RERANKING
        return Operation.EMBEDDING if output.get("object") == "list" else Operation.REASONING
    if isinstance(body, Mapping) and "documents" in body:
        return Operation.RERANKING
    return Operation.EMBEDDING if isinstance(body, Mapping) and "input" in body else Operation.REASONING


def _sample(
    namespace: str, model: str | None, kind: Operation, outcome: Success | Failure, seconds: float
) -> OperationSample | None:
    if model is None:
        return None
    usage, ended = outcome.usage, OperationOutcome.SUCCEEDED
    if isinstance(outcome, Failure):
        if outcome.reason is FailureReason.WORKER_STOPPED:
            return None
        is_cancelled = outcome.reason is FailureReason.CANCELLED
        ended = OperationOutcome.CANCELLED if is_cancelled else OperationOutcome.FAILED
    tokens_in, tokens_out = usage.tokens_in, usage.tokens_out
    if kind is Operation.COMPRESSION and isinstance(outcome, Success) and isinstance(outcome.output, Mapping):
        tokens = outcome.output["tokens"]
        tokens_in, tokens_out = int(tokens["before"]), int(tokens["after"])
    first = None if usage.first_token is None else usage.first_token.total_seconds()
    return OperationSample(
        MetricKey(namespace, model, kind), ended, seconds, first, tokens_in, tokens_out, usage.tokens_cached
    )
