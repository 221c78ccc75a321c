"""
What one model did of one kind: operations by outcome, their latencies and tokens.

An operation is one attempt of a step, or one direct request. Those that were requeued, because their worker stopped or
a more urgent one came, are not counted: they are done again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from app.inference.model_metrics.latency import Latencies


class Operation(StrEnum):
    """What a model did."""

    #: It wrote text: answers, turns of agents, summaries.
    REASONING = "reasoning"
    #: It made vectors of texts.
    EMBEDDING = "embedding"
    #: It scored documents for a query.
    RERANKING = "reranking"
    #: A text was made shorter, counted by its tokenizer.
    COMPRESSION = "compression"


class OperationOutcome(StrEnum):
    """How an operation ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class MetricKey(NamedTuple):
    """Whose figures they are."""

    namespace: str
    model: str
    operation: Operation


@dataclass(frozen=True, slots=True)
class OperationSample:
    """One operation that has ended."""

    key: MetricKey
    outcome: OperationOutcome
    #: From its beginning in the worker to its end; times in seconds.
    seconds: float
    first_token: float | None = None
    #: Tokens read and written; for a compression those before and after it.
    tokens_in: int = 0
    tokens_out: int = 0
    #: Of the tokens read, those that an earlier prompt had computed.
    tokens_cached: int = 0


@dataclass(slots=True)
class ModelMetric:
    """The sum of operations."""

    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_cached: int = 0
    #: Seconds in which text was written: from the first token to the end.
    writing_seconds: float = 0.0
    #: Of the operations that succeeded: from the beginning to the end, and to the first token.
    latency: Latencies = field(default_factory=Latencies)
    first_token: Latencies = field(default_factory=Latencies)

    def add(self, sample: OperationSample) -> None:
        """Count an operation. Only one that succeeded has a latency: failures are fast, or last until a timeout."""
        match sample.outcome:
            case OperationOutcome.SUCCEEDED:
                self.succeeded += 1
                self.latency.add(sample.seconds)
            case OperationOutcome.FAILED:
                self.failed += 1
            case OperationOutcome.CANCELLED:
                self.cancelled += 1
        self.tokens_in += sample.tokens_in
        self.tokens_out += sample.tokens_out
        self.tokens_cached += sample.tokens_cached
        if sample.first_token is not None:
            self.first_token.add(sample.first_token)
            self.writing_seconds += max(0.0, sample.seconds - sample.first_token)

    def merge(self, other: ModelMetric) -> None:
        """Add the operations of another sum."""
        for name in ("succeeded", "failed", "cancelled", "tokens_in", "tokens_out", "tokens_cached", "writing_seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.latency.merge(other.latency)
        self.first_token.merge(other.first_token)

    @property
    def operations(self) -> int:
        """All operations."""
        return self.succeeded + self.failed + self.cancelled

    @property
    def success_rate(self) -> float | None:
        """The part of those that were not cancelled that succeeded; None without any."""
        ended = self.succeeded + self.failed
        return self.succeeded / ended if ended else None

    def tokens_per_second(self, operation: Operation) -> float | None:
        """Return the speed of one operation: of its writing, or else of its reading; None when it is not known."""
        if operation is Operation.REASONING:
            return self.tokens_out / self.writing_seconds if self.writing_seconds > 0 else None
        return self.tokens_in / self.latency.total if self.latency.total > 0 else None

    def tokens_saved(self, operation: Operation) -> int:
        """Return the tokens that compressions left out, or that an earlier prompt had computed."""
        return self.tokens_in - self.tokens_out if operation is Operation.COMPRESSION else self.tokens_cached

    def ratio(self, operation: Operation) -> float | None:
        """Return the tokens before for each one after; None for what is no compression."""
        is_known = operation is Operation.COMPRESSION and self.tokens_out > 0
        return self.tokens_in / self.tokens_out if is_known else None
