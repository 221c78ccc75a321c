"""
The kinds of steps, as a workflow writes them.

Texts that a model or a server reads are templates (Jinja); conditions, lists and values are expressions (CEL).
The shape is held here; whether names exist and expressions fit is seen in `app.workflows.language.check`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from app.kernel.errors import FailureReason
from app.kernel.units.durations import Duration

#: Ids are names in templates (`steps.draft.output`), so they are written like names.
ID = r"^[a-z][a-z0-9_]{0,62}$"
#: Names of workflows, as they stand in URLs.
NAME = r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$"
#: A need: a step, or the branch of a step.
NEED = r"^[a-z][a-z0-9_]{0,62}(\.[a-z][a-z0-9_]{0,62})?$"
#: Names of headers.
HEADER = r"^[A-Za-z0-9-]{1,64}$"
#: The branch of a wait that nobody answered in time.
TIMED_OUT = "timed_out"
#: The branches of an approval.
APPROVED, REJECTED = "approved", "rejected"

#: What an expression must give.
ResultType = Literal["bool", "string", "list", "any", "time"]
Template = Annotated[str, Field(min_length=1, max_length=400_000)]
Expression = Annotated[str, Field(min_length=1, max_length=20_000)]


def _some(value: timedelta) -> timedelta:
    if not value:
        raise ValueError("no time at all is too little here: write more than 0")
    return value


#: A duration in which something can be done.
Span = Annotated[Duration, AfterValidator(_some)]


class DocumentPart(BaseModel):
    """A mapping of the document. Fields that it does not know are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Retry(DocumentPart):
    """What follows a failed attempt."""

    #: Attempts that may fail before the step does. A worker's death is counted elsewhere.
    max_attempts: int = Field(default=3, ge=1, le=100)
    #: The first delay; each further one is `factor` times the last, up to `cap`.
    delay: Duration = Field(default="1s", validate_default=True)
    factor: float = Field(default=2.0, ge=1, le=100)
    cap: Duration = Field(default="1m", validate_default=True)
    #: Reasons after which another attempt is made; without it, all but those of `non_retryable`.
    on: tuple[FailureReason, ...] | None = None
    #: Reasons after which no other attempt is made. What `on` names is retried, unless it is written here too.
    non_retryable: tuple[FailureReason, ...] = (
        FailureReason.TEMPLATE_ERROR,
        FailureReason.CONTEXT_EXCEEDED,
        FailureReason.INVALID_REQUEST,
        FailureReason.HTTP_4XX,
        FailureReason.HTTP_REFUSED,
        FailureReason.REJECTED,
    )
    #: Another attempt is made only where this holds; it sees `error.reason`, `error.message` and `error.attempt`.
    when: Expression | None = None

    def retries(self, reason: FailureReason) -> bool:
        """Whether another attempt may follow a failure of this reason."""
        if self.on is None or "non_retryable" in self.model_fields_set:
            return reason not in self.non_retryable and (self.on is None or reason in self.on)
        return reason in self.on


class Fallback(DocumentPart):
    """Other models for a step, in their order, and when the next is taken."""

    models: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1, max_length=16)
    #: Reasons after which the next model is asked at once. After the last, the retry rule decides.
    on: tuple[FailureReason, ...] = (
        FailureReason.INVALID_OUTPUT,
        FailureReason.CONTEXT_EXCEEDED,
        FailureReason.ENGINE_ERROR,
        FailureReason.TIMEOUT,
    )


class SamplingFields(DocumentPart):
    """How the next token is chosen; what is not given is left to the model's defaults."""

    temperature: float | None = Field(default=None, ge=0, le=5)
    top_k: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    typical_p: float | None = Field(default=None, gt=0, le=1)
    repeat_penalty: float | None = Field(default=None, gt=0, le=5)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=0, lt=2**32)


class MessageTemplate(DocumentPart):
    """One message to the model; the content is a template."""

    role: Literal["system", "user", "assistant"]
    content: Template


class OutputFields(DocumentPart):
    """What the text of the model must be."""

    #: A JSON Schema. A grammar forces the text into it, and the result is checked against it again.
    schema_: Mapping[str, Any] = Field(alias="schema")


class StepWork(DocumentPart):
    """What every kind of step has that a map can do for each item too."""

    retry: Retry = Retry()
    #: For one attempt, from its claim.
    timeout: Span = Field(default="10m", validate_default=True)

    def templates(self) -> Iterator[tuple[str, str]]:
        """Each template, with its place in the step."""
        return iter(())

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        """Each expression with its place in the step, and what it must give."""
        return iter(())


class GenerateFields(StepWork):
    """Asks a model. Its output is the text, or the JSON value where a schema is given."""

    kind: Literal["generate"]
    model: str | None = Field(default=None, min_length=1)
    fallback: Fallback | None = None
    system: Template | None = None
    prompt: Template | None = None
    messages: tuple[MessageTemplate, ...] = ()
    #: False gives the prompt to the model as it is, without its chat template: for base models, and for completion.
    chat: bool = True
    sampling: SamplingFields = SamplingFields()
    max_tokens: int = Field(default=256, ge=1, le=1_000_000)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), max_length=16)
    output: OutputFields | None = None

    @model_validator(mode="after")
    def _asks_once(self) -> GenerateFields:
        if bool(self.messages) == (self.prompt is not None):
            raise ValueError("a generate step has either 'prompt' (with 'system', if wanted) or 'messages'")
        if self.messages and self.system is not None:
            raise ValueError("'system' goes with 'prompt'; among 'messages', write a message of the role system")
        if not self.chat and (self.messages or self.system is not None):
            raise ValueError("without the chat template ('chat: false') there is a 'prompt' and nothing else")
        return self

    def templates(self) -> Iterator[tuple[str, str]]:
        if self.prompt is not None:
            yield "prompt", self.prompt
        if self.system is not None:
            yield "system", self.system
        yield from ((f"messages[{i}].content", message.content) for i, message in enumerate(self.messages))


class EmbedFields(StepWork):
    """Turns texts into vectors of length 1. Its output is one vector for a text, a list of vectors for a list."""

    kind: Literal["embed"]
    model: str | None = Field(default=None, min_length=1)
    fallback: Fallback | None = None
    #: Gives a text, or a list of texts.
    texts: Expression
    #: Queries and documents get the prefix that the model was trained with.
    task: Literal["query", "document"] = "document"
    #: Keep this many numbers of each vector (Matryoshka), and make its length 1 again.
    dimensions: int | None = Field(default=None, ge=1)
    #: A text longer than the model's context is cut into windows whose vectors are averaged, cut short, or refused.
    long: Literal["chunk", "truncate", "refuse"] = "chunk"

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        yield "texts", self.texts, "any"


class TransformFields(StepWork):
    """Computes a value from inputs and earlier outputs."""

    kind: Literal["transform"]
    cel: Expression | None = None
    jmespath: Expression | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> TransformFields:
        if (self.cel is None) == (self.jmespath is None):
            raise ValueError("a transform step has either 'cel' or 'jmespath'")
        return self

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        if self.cel is not None:
            yield "cel", self.cel, "any"
        if self.jmespath is not None:
            yield "jmespath", self.jmespath, "any"


class HttpFields(StepWork):
    """Calls a server. Its output is `status`, `headers` and `body`, the value of a JSON answer or its text."""

    kind: Literal["http"]
    url: Template
    method: Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"] | None = None
    headers: Mapping[str, Template] = {}
    query: Mapping[str, Template] = {}
    #: A JSON body; each text in it is a template.
    json_: JsonValue = Field(default=None, alias="json")
    #: A body that is a text.
    body: Template | None = None
    #: Statuses that are a success; without it, 200 to 299.
    expect: tuple[Annotated[int, Field(ge=100, le=599)], ...] = ()
    #: Bytes of an answer that are read at the most.
    max_bytes: int = Field(default=1_048_576, ge=1, le=64 * 1_048_576)
    follow_redirects: bool = False
    #: The header that carries a key that is the same for all attempts of this step.
    idempotency_header: str = Field(default="Idempotency-Key", pattern=HEADER)
    timeout: Span = Field(default="30s", validate_default=True)

    @model_validator(mode="after")
    def _one_body(self) -> HttpFields:
        if "json_" in self.model_fields_set and self.body is not None:
            raise ValueError("an http step has either 'json' or 'body'")
        return self

    @property
    def has_json(self) -> bool:
        """Whether a JSON body was written; it may be null."""
        return "json_" in self.model_fields_set

    def templates(self) -> Iterator[tuple[str, str]]:
        yield "url", self.url
        yield from ((f"headers.{name}", value) for name, value in self.headers.items())
        yield from ((f"query.{name}", value) for name, value in self.query.items())
        yield from _texts(self.json_, "json")
        if self.body is not None:
            yield "body", self.body


class CallFields(StepWork):
    """Runs another workflow. Its output is the output of that run."""

    kind: Literal["workflow"]
    workflow: str = Field(pattern=NAME, max_length=100)
    #: A stored version; the newest, as the step begins, without it.
    version: int | None = Field(default=None, ge=0)
    #: Name to an expression.
    inputs: Mapping[str, Expression] = {}

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        yield from ((f"inputs.{name}", value, "any") for name, value in self.inputs.items())


class NoopFields(StepWork):
    """Does nothing, durably. Its output is null."""

    kind: Literal["noop"]


MapBody = Annotated[
    GenerateFields | EmbedFields | TransformFields | HttpFields | CallFields | NoopFields, Field(discriminator="kind")
]


class StepPart(DocumentPart):
    """What a step has by its place in the graph."""

    id: str = Field(pattern=ID, description="lower-case letters, digits and underscores, a letter first")
    #: Steps, or branches of steps (`route.refund`).
    needs: tuple[Annotated[str, Field(pattern=NEED)], ...] = ()
    #: Whether all needs must be met, one is enough, or all must only have ended.
    join: Literal["all", "any", "all_done"] = "all"
    #: The step is skipped where this does not hold.
    when: Expression | None = None
    #: For the whole step, its retries and their delays, from when it could first begin.
    total_timeout: Span | None = None
    #: Its failure does not make the run fail.
    allow_failure: bool = False


class GenerateStep(StepPart, GenerateFields):
    """A generate step."""


class EmbedStep(StepPart, EmbedFields):
    """An embed step."""


class TransformStep(StepPart, TransformFields):
    """A transform step."""


class HttpStep(StepPart, HttpFields):
    """An http step."""


class CallStep(StepPart, CallFields):
    """A workflow step."""


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
    """Takes the branch of the first case that holds. Its output is the branch's name, or null where none is taken."""

    kind: Literal["switch"]
    #: Branch to condition; the first that holds is taken.
    cases: Mapping[Annotated[str, Field(pattern=ID)], Expression] = Field(min_length=1)
    #: The branch that is taken where no case holds.
    default: Annotated[str, Field(pattern=ID)] | None = None

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        yield from ((f"cases.{name}", value, "bool") for name, value in self.cases.items())

    @property
    def branches(self) -> tuple[str, ...]:
        """Every branch that can be taken."""
        return tuple(dict.fromkeys([*self.cases, *([self.default] if self.default else [])]))


class MapStep(StepPart, StepWork):
    """Does a step for each item of a list. Its output is the list of their outputs, in the order of the items."""

    kind: Literal["map"]
    #: Gives the list.
    over: Expression
    #: What is done for each; its templates and expressions see `item` and `index` too.
    step: MapBody
    #: Items that are done at a time.
    max_parallel: int = Field(default=32, ge=1, le=1000)
    #: `fail`: the first item that fails for good stops the others, and the map fails. `collect`: all are done, and the
    #: output of one that failed is null.
    on_error: Literal["fail", "collect"] = "fail"

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        yield "over", self.over, "list"


class Approval(DocumentPart):
    """A decision by a person."""

    #: What the person reads.
    message: Template


class WaitStep(StepPart, StepWork):
    """Waits: for some time, until an instant, for an event, or for a person's approval."""

    kind: Literal["wait"]
    #: Once by itself: what was waited for in vain is not waited for again.
    retry: Retry = Retry(max_attempts=1)
    for_: Duration | None = Field(default=None, alias="for")
    #: Gives an instant as text: `2026-11-21T09:00:00Z`.
    until: Expression | None = None
    #: The name of the event. Its output is the event's payload.
    event: str | None = Field(default=None, pattern=ID)
    #: The JSON Schema of the payload.
    schema_: Mapping[str, Any] | None = Field(default=None, alias="schema")
    approval: Approval | None = None
    #: For an event or an approval: how long it is waited for.
    expires: Span | None = None
    #: What is done then: the step fails, or takes its branch `timed_out`.
    on_timeout: Literal["fail", "continue"] = "fail"

    @model_validator(mode="after")
    def _one_of_four(self) -> WaitStep:
        if sum(one is not None for one in (self.for_, self.until, self.event, self.approval)) != 1:
            raise ValueError("a wait step has one of 'for', 'until', 'event' and 'approval'")
        if self.event is None and self.schema_ is not None:
            raise ValueError("'schema' goes with 'event'")
        if self.signal is None and (self.expires is not None or self.on_timeout != "fail"):
            raise ValueError("'expires' and 'on_timeout' go with 'event' or 'approval'")
        if self.on_timeout != "fail" and self.expires is None:
            raise ValueError("'on_timeout' goes with 'expires': without it, the step waits for ever")
        return self

    @property
    def signal(self) -> str | None:
        """The name of the event that answers it; an approval is answered under the step's id."""
        return self.id if self.approval is not None else self.event

    @property
    def payload(self) -> Mapping[str, Any]:
        """The JSON Schema of what answers it."""
        return APPROVAL_PAYLOAD if self.approval is not None else self.schema_ or {}

    @property
    def branches(self) -> tuple[str, ...]:
        """Every branch that can be taken."""
        answered = (APPROVED, REJECTED) if self.approval is not None else ()
        return (*answered, *([TIMED_OUT] if self.on_timeout == "continue" else []))

    def branch_of(self, payload: Any) -> str | None:
        """The branch that an answer takes."""
        if self.approval is None:
            return None
        return APPROVED if payload["approved"] else REJECTED

    def templates(self) -> Iterator[tuple[str, str]]:
        if self.approval is not None:
            yield "approval.message", self.approval.message

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        if self.until is not None:
            yield "until", self.until, "time"


#: What a person's answer must be.
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
    | TransformStep
    | HttpStep
    | CallStep
    | NoopStep
    | JoinStep
    | SwitchStep
    | MapStep
    | WaitStep
)
DiscriminatedStep = Annotated[AnyStep, Field(discriminator="kind")]
#: The kinds, as messages list them.
KINDS = ("generate", "embed", "transform", "http", "workflow", "map", "switch", "wait", "join", "noop")
#: What asks a model.
MODEL_KINDS = (GenerateFields, EmbedFields)


def body_of(step: AnyStep) -> AnyStep | MapBody:
    """What is done when a worker has it: for an item of a map, the step of the map."""
    return step.step if isinstance(step, MapStep) else step


def branches_of(step: AnyStep) -> tuple[str, ...]:
    """The branches that others can need."""
    return step.branches if isinstance(step, SwitchStep | WaitStep) else ()


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _texts(inner, f"{where}[{i}]")
