"""
Operations of models: which kind of operation a step or a direct request was, and how it ended, as a sample.

Nothing here counts or stores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.inference.model_metrics.metric import MetricKey, Operation, OperationOutcome, Sample
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


def of_step(claim: Claim, outcome: Outcome, seconds: float) -> Sample | None:
    """Return the sample of an attempt; None when no model did anything, or it is done again or elsewhere."""
    work = claim.work
    if not isinstance(outcome, Success | Failure):
        return None
    if isinstance(work, OpenAIFields):
        inputs = claim.data.get("inputs")
        body = inputs.get("request") if isinstance(inputs, Mapping) else None
        return of_request(body, claim.namespace, claim.model, outcome, seconds)
    kind = next((kind for base, kind in _KINDS.items() if isinstance(work, base)), None)
    model = work.model if isinstance(work, CompressFields) else claim.model
    return None if kind is None else _sample(claim.namespace, model, kind, outcome, seconds)


def of_request(
    body: Any, namespace: str, model: str | None, outcome: Success | Failure, seconds: float
) -> Sample | None:
    """Return the sample of a request of OpenAI's form, as `of_step` does."""
    kind = Operation.REASONING
    output = outcome.output if isinstance(outcome, Success) else None
    if isinstance(output, Mapping):
        kind = Operation.EMBEDDING if output.get("object") == "list" else kind
        kind = Operation.RERANKING if "results" in output else kind
    elif isinstance(body, Mapping):
        kind = Operation.EMBEDDING if "input" in body else kind
        kind = Operation.RERANKING if "documents" in body else kind
    return _sample(namespace, model, kind, outcome, seconds)


def _sample(
    namespace: str, model: str | None, kind: Operation, outcome: Success | Failure, seconds: float
) -> Sample | None:
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
    return Sample(MetricKey(namespace, model, kind), ended, seconds, first, tokens_in, tokens_out, usage.tokens_cached)
