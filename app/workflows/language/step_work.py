"""The parts that all steps share: names, texts and expressions, retries, and the common fields of their work."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from app.kernel.errors import FailureReason
from app.kernel.units.durations import Duration
from app.workflows.expressions.result_type import ResultType

#: The pattern of step ids, which templates use as names (`steps.draft.output`).
ID = r"^[a-z][a-z0-9_]{0,62}$"
#: The pattern of workflow names, which are part of URLs.
NAME = r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$"
#: The pattern of a need: a step, or a branch of a step.
NEED = r"^[a-z][a-z0-9_]{0,62}(\.[a-z][a-z0-9_]{0,62})?$"
#: The pattern of header names.
HEADER = r"^[A-Za-z0-9-]{1,64}$"


Template = Annotated[str, Field(min_length=1, max_length=400_000)]
Expression = Annotated[str, Field(min_length=1, max_length=20_000)]


def _positive(value: timedelta) -> timedelta:
    if not value:
        raise ValueError("the duration must be greater than 0")
    return value


#: A duration above zero.
PositiveDuration = Annotated[Duration, AfterValidator(_positive)]


class DocumentPart(BaseModel):
    """A mapping of the document. Unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Retry(DocumentPart):
    """The retry policy of a step."""

    #: Failed attempts after which the step fails. The loss of a worker is not counted here.
    max_attempts: int = Field(default=3, ge=1, le=100)
    #: The first delay. Each further delay is `factor` times the previous one, up to `cap`.
    delay: Duration = Field(default="1s", validate_default=True)
    factor: float = Field(default=2.0, ge=1, le=100)
    cap: Duration = Field(default="1m", validate_default=True)
    #: Failure reasons that are retried. By default all except those of `non_retryable`.
    on: tuple[FailureReason, ...] | None = None
    #: Failure reasons that are not retried. Reasons in `on` are retried, unless this field is set and lists them too.
    non_retryable: tuple[FailureReason, ...] = (
        FailureReason.TEMPLATE_ERROR,
        FailureReason.CONTEXT_EXCEEDED,
        FailureReason.INVALID_REQUEST,
        FailureReason.HTTP_4XX,
        FailureReason.HTTP_REFUSED,
        FailureReason.REJECTED,
        FailureReason.HOOK_REFUSED,
    )
    #: A condition for another attempt, over `error.reason`, `error.message` and `error.attempt`.
    when: Expression | None = None

    def retries(self, reason: FailureReason) -> bool:
        """Return whether a failure with this reason may be retried."""
        if self.on is None or "non_retryable" in self.model_fields_set:
            return reason not in self.non_retryable and (self.on is None or reason in self.on)
        return reason in self.on


class Fallback(DocumentPart):
    """Alternative models for a step, in the order in which they are tried."""

    models: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1, max_length=16)
    #: Failure reasons after which the next model is tried at once. After the last model, the retry policy decides.
    on: tuple[FailureReason, ...] = (
        FailureReason.INVALID_OUTPUT,
        FailureReason.TRUNCATED,
        FailureReason.CONTEXT_EXCEEDED,
        FailureReason.ENGINE_ERROR,
        FailureReason.TIMEOUT,
        FailureReason.HTTP_THROTTLED,
        FailureReason.HTTP_UNREACHABLE,
    )


class StepWork(DocumentPart):
    """The fields of the work of a step, which a map can also do for each item."""

    retry: Retry = Retry()
    #: The time limit for one attempt, from its claim.
    timeout: PositiveDuration = Field(default="10m", validate_default=True)

    def templates(self) -> Iterator[tuple[str, str]]:
        """Yield the path of each template in the step, and the template."""
        return iter(())

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        """Yield the path of each expression in the step, the expression, and its required result type."""
        return iter(())

    def own_names(self) -> tuple[str, ...]:
        """Return the names that its expressions can use beside those of the run."""
        return ()
