"""
The kinds of steps in a workflow document.

Texts for a model, a server or a person are templates (Jinja). Conditions, lists and values are expressions (CEL).
The types here validate the shape; `app.workflows.language.check` checks the names and types in expressions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from app.kernel.units.durations import Duration
from app.workflows.expressions.result_type import ResultType
from app.workflows.language.agent import AgentFields
from app.workflows.language.compression import CompressFields
from app.workflows.language.ensemble import EnsembleFields
from app.workflows.language.generate_fields import GenerateFields
from app.workflows.language.http_fields import HttpFields
from app.workflows.language.python_fields import PythonFields
from app.workflows.language.recall import EmbedPassagesFields, RecallFields
from app.workflows.language.refine import RefineFields
from app.workflows.language.remembering import RememberFields
from app.workflows.language.step_work import (
    ID,
    NAME,
    NEED,
    DocumentPart,
    Expression,
    Fallback,
    PositiveDuration,
    Retry,
    StepWork,
    Template,
)
from app.workflows.language.summarize import SummarizeFields
from app.workflows.language.verification import VerifyFields

#: The branch of a wait that timed out.
TIMED_OUT = "timed_out"
#: The branches of an approval.
APPROVED, REJECTED = "approved", "rejected"


class EmbedFields(StepWork):
    """Computes embeddings: vectors of length 1. Its output is one vector for a text, a list of vectors for a list."""

    kind: Literal["embed"]
    model: str | None = Field(default=None, min_length=1)
    fallback: Fallback | None = None
    #: An expression that returns a text or a list of texts.
    texts: Expression
    #: Selects the prefix that the model was trained with for queries or for documents.
    task: Literal["query", "document"] = "document"
    #: Truncates each vector to this many numbers (Matryoshka) and normalises it to length 1 again.
    dimensions: int | None = Field(default=None, ge=1)
    #: What happens to a text that is longer than the model's context: it is split into windows whose vectors are
    #: averaged, it is truncated, or it is rejected.
    long: Literal["chunk", "truncate", "refuse"] = "chunk"

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        yield "texts", self.texts, "any"


class OpenAIFields(StepWork):
    """
    Does a request in the form of OpenAI's API with a model. Its output is the answer in that form.

    The request has `messages` (a chat completion), `prompt` (a completion) or `input` (embeddings).
    """

    kind: Literal["openai"]
    model: str | None = Field(default=None, min_length=1)
    fallback: Fallback | None = None
    #: An expression that returns the request. Its fields `model` and `stream` have no effect here.
    request: Expression

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        yield "request", self.request, "any"


class TransformFields(StepWork):
    """Computes a value from inputs and earlier outputs."""

    kind: Literal["transform"]
    cel: Expression | None = None
    jmespath: Expression | None = None

    @model_validator(mode="after")
    def _has_one_language(self) -> TransformFields:
        if (self.cel is None) == (self.jmespath is None):
            raise ValueError("a transform step needs either 'cel' or 'jmespath'")
        return self

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        if self.cel is not None:
            yield "cel", self.cel, "any"
        if self.jmespath is not None:
            yield "jmespath", self.jmespath, "any"


class CallFields(StepWork):
    """Calls another workflow. Its output is the output of the called run."""

    kind: Literal["workflow"]
    workflow: str = Field(pattern=NAME, max_length=100)
    #: A version of the workflow. By default the newest at the start of the step.
    version: int | None = Field(default=None, ge=0)
    #: Name to an expression.
    inputs: Mapping[str, Expression] = {}

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        yield from ((f"inputs.{name}", value, "any") for name, value in self.inputs.items())


class NoopFields(StepWork):
    """Does nothing, but is recorded like any other step. Its output is null."""

    kind: Literal["noop"]


MapBody = Annotated[
    GenerateFields
    | EmbedFields
    | OpenAIFields
    | CompressFields
    | SummarizeFields
    | RecallFields
    | RefineFields
    | EnsembleFields
    | VerifyFields
    | RememberFields
    | TransformFields
    | PythonFields
    | HttpFields
    | CallFields
    | NoopFields,
    Field(discriminator="kind"),
]


class StepPart(DocumentPart):
    """The fields of a step in the graph."""

    id: str = Field(pattern=ID, description="lower-case letters, digits and underscores, a letter first")
    #: The steps, or branches of steps (`route.refund`), that this step waits for.
    needs: tuple[Annotated[str, Field(pattern=NEED)], ...] = ()
    #: Whether all needs must be met, one is enough, or all must have ended in any state.
    join: Literal["all", "any", "all_done"] = "all"
    #: A condition. The step is skipped when it is false.
    when: Expression | None = None
    #: The time limit for the whole step with its retries and delays, from when it was first ready.
    total_timeout: PositiveDuration | None = None
    #: Whether the run can succeed although this step fails.
    allow_failure: bool = False


class GenerateStep(StepPart, GenerateFields):
    """A generate step."""


class EmbedStep(StepPart, EmbedFields):
    """An embed step."""


class OpenAIStep(StepPart, OpenAIFields):
    """An openai step."""


class CompressStep(StepPart, CompressFields):
    """A compress step."""


class SummarizeStep(StepPart, SummarizeFields):
    """A summarize step."""


class RecallStep(StepPart, RecallFields):
    """A recall step."""


class EmbedPassagesStep(StepPart, EmbedPassagesFields):
    """An embed_passages step."""


class RefineStep(StepPart, RefineFields):
    """A refine step."""


class EnsembleStep(StepPart, EnsembleFields):
    """An ensemble step."""


class VerifyStep(StepPart, VerifyFields):
    """A verify step."""


class RememberStep(StepPart, RememberFields):
    """A remember step."""


class TransformStep(StepPart, TransformFields):
    """A transform step."""


class PythonStep(StepPart, PythonFields):
    """A python step."""


class HttpStep(StepPart, HttpFields):
    """An http step."""


class CallStep(StepPart, CallFields):
    """A workflow step."""


class AgentStep(StepPart, AgentFields):
    """An agent step."""


class NoopStep(StepPart, NoopFields):
    """A noop step."""


class JoinStep(StepPart, StepWork):
    """Waits for the steps that it needs. Its output is their outputs by id, or the text of its template."""

    kind: Literal["join"]
    template: Template | None = None

    def templates(self) -> Iterator[tuple[str, str]]:
        if self.template is not None:
            yield "template", self.template


class SwitchStep(StepPart, StepWork):
    """Takes the branch of the first true case. Its output is the name of the branch, or null without a branch."""

    kind: Literal["switch"]
    #: Branch to condition. The branch of the first true condition is taken.
    cases: Mapping[Annotated[str, Field(pattern=ID)], Expression] = Field(min_length=1)
    #: The branch that is taken when no case is true.
    default: Annotated[str, Field(pattern=ID)] | None = None

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        yield from ((f"cases.{name}", value, "bool") for name, value in self.cases.items())

    @property
    def branches(self) -> tuple[str, ...]:
        """The names of all branches of the step."""
        return tuple(dict.fromkeys([*self.cases, *([self.default] if self.default else [])]))


class MapStep(StepPart, StepWork):
    """Runs a step for each item of a list. Its output is the list of their outputs, in the order of the items."""

    kind: Literal["map"]
    #: An expression that returns the list.
    over: Expression
    #: The step for each item. Its templates and expressions can also use `item` and `index`.
    step: MapBody
    #: Maximum number of items in progress at a time.
    max_parallel: int = Field(default=32, ge=1, le=1000)
    #: `fail`: the first item that fails permanently cancels the others, and the map fails. `collect`: all items run,
    #: and the output of a failed item is null.
    on_error: Literal["fail", "collect"] = "fail"

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        yield "over", self.over, "list"


class Approval(DocumentPart):
    """The approval of a person."""

    #: The text for the person who decides.
    message: Template


class WaitStep(StepPart, StepWork):
    """Waits: for some time, until an instant, for an event, or for a person's approval."""

    kind: Literal["wait"]
    #: A wait is not retried by default.
    retry: Retry = Retry(max_attempts=1)
    for_: Duration | None = Field(default=None, alias="for")
    #: An expression that returns an instant: a timestamp, or a string such as `2026-11-21T09:00:00Z`.
    until: Expression | None = None
    #: The name of an event. The output of the step is the payload of the event.
    event: str | None = Field(default=None, pattern=ID)
    #: The JSON Schema of the event's payload.
    schema_: Mapping[str, Any] | None = Field(default=None, alias="schema")
    approval: Approval | None = None
    #: The time limit for an event or an approval.
    expires: PositiveDuration | None = None
    #: What happens after the time limit: the step fails, or takes its branch `timed_out`.
    on_timeout: Literal["fail", "continue"] = "fail"

    @model_validator(mode="after")
    def _has_one_condition(self) -> WaitStep:
        if sum(one is not None for one in (self.for_, self.until, self.event, self.approval)) != 1:
            raise ValueError("a wait step needs exactly one of 'for', 'until', 'event' and 'approval'")
        if self.event is None and self.schema_ is not None:
            raise ValueError("'schema' can be used with 'event' only")
        if self.signal is None and (self.expires is not None or self.on_timeout != "fail"):
            raise ValueError("'expires' and 'on_timeout' can be used with 'event' or 'approval' only")
        if self.on_timeout != "fail" and self.expires is None:
            raise ValueError("'on_timeout' needs 'expires': without it, the step never times out")
        return self

    @property
    def signal(self) -> str | None:
        """The name of the event that completes the step; for an approval this is the id of the step."""
        return self.id if self.approval is not None else self.event

    @property
    def payload(self) -> Mapping[str, Any]:
        """The JSON Schema of the payload of that event."""
        return APPROVAL_PAYLOAD if self.approval is not None else self.schema_ or {}

    @property
    def branches(self) -> tuple[str, ...]:
        """The names of all branches of the step."""
        answered = (APPROVED, REJECTED) if self.approval is not None else ()
        return (*answered, *([TIMED_OUT] if self.on_timeout == "continue" else []))

    def branch_of(self, payload: Any) -> str | None:
        """Return the branch that the step takes for a payload; None when it has no branches to choose from."""
        if self.approval is None:
            return None
        return APPROVED if payload["approved"] else REJECTED

    def templates(self) -> Iterator[tuple[str, str]]:
        if self.approval is not None:
            yield "approval.message", self.approval.message

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        if self.until is not None:
            yield "until", self.until, "time"


#: The JSON Schema of an approval's payload.
APPROVAL_PAYLOAD: Mapping[str, Any] = {
    "type": "object",
    "required": ["approved"],
    "properties": {
        "approved": {"type": "boolean"},
        "by": {"type": "string", "maxLength": 200},
        "comment": {"type": "string", "maxLength": 10_000},
    },
    "additionalProperties": False,
}

AnyStep = (
    GenerateStep
    | EmbedStep
    | OpenAIStep
    | CompressStep
    | SummarizeStep
    | RecallStep
    | EmbedPassagesStep
    | RefineStep
    | EnsembleStep
    | VerifyStep
    | RememberStep
    | TransformStep
    | PythonStep
    | HttpStep
    | CallStep
    | AgentStep
    | NoopStep
    | JoinStep
    | SwitchStep
    | MapStep
    | WaitStep
)
DiscriminatedStep = Annotated[AnyStep, Field(discriminator="kind")]
#: The kinds of steps, in the order in which messages list them.
KINDS = (
    *("generate", "embed", "openai", "agent", "compress", "summarize", "remember", "recall", "embed_passages"),
    *("refine", "ensemble", "verify", "transform", "python", "http", "workflow"),
    *("map", "switch", "wait", "join", "noop"),
)
#: The kinds of work that use a model.
MODEL_KINDS = (GenerateFields, EmbedFields, OpenAIFields, AgentFields, SummarizeFields, EmbedPassagesFields)
ModelWork = GenerateFields | EmbedFields | OpenAIFields | AgentFields | SummarizeFields | EmbedPassagesFields
#: The kinds of work that call a workflow whose steps use models.
DRAFT_KINDS = (RefineFields, EnsembleFields)
#: The kinds of steps whose work is done by items. The models of their work are those of the items.
FANNED_KINDS = (MapStep, AgentStep)


def work_of(step: AnyStep) -> AnyStep | MapBody:
    """Return the work of a step; for a map, that of each item."""
    return step.step if isinstance(step, MapStep) else step


def branches_of(step: AnyStep) -> tuple[str, ...]:
    """Return the branches of a step that other steps can need."""
    return step.branches if isinstance(step, SwitchStep | WaitStep) else ()
