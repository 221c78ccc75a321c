"""Results of operations. Fields that a newer server adds are kept as extra attributes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from arriero_client.errors import ClientError

T = TypeVar("T")

#: States of runs that do not change any more, unless somebody retries the run.
FINAL = frozenset({"succeeded", "failed", "cancelled"})


class _Document(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class Step(_Document):
    """A step of a run."""

    id: str
    key: str
    kind: str
    state: str
    model: str | None = None
    attempt: int = 0
    output: Any = None
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    waited_s: float | None = None
    took_s: float | None = None


class RunSummary(_Document):
    """A run in a list."""

    id: str
    workflow: str
    state: str
    version: int | None = None
    priority: str = ""
    labels: dict[str, str] = {}
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def is_final(self) -> bool:
        """Whether it has ended."""
        return self.state in FINAL


class Run(RunSummary):
    """A run with its steps. A value that is too long for the answer is `{"$payload": …}`; `payload` returns it."""

    inputs: dict[str, Any] = {}
    output: Any = None
    error: dict[str, Any] | None = None
    took_s: float | None = None
    steps: list[Step] = []

    def step(self, key: str) -> Step:
        """Return a step by its id in the workflow. Raises KeyError."""
        for one in self.steps:
            if one.key == key:
                return one
        raise KeyError(key)


class RunPage(_Document):
    """A page of runs, the newest first."""

    runs: list[RunSummary]
    next_cursor: str | None = None


class RunState(_Document):
    """The state of a run after a request."""

    id: str
    state: str


class Event(_Document):
    """An entry of the history of a run."""

    id: int
    at: datetime
    event: str
    step: str | None = None
    attempt: int | None = None
    cause: dict[str, Any] | None = None


class SentEvent(_Document):
    """An event that a run has accepted."""

    id: str
    answered: str | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """An event of the token stream of a step."""

    #: `<attempt>-<n>`.
    id: str
    #: `begun`, `text`, `done` or `failed`.
    kind: str
    #: A piece of text, the output of the step, or why it failed.
    value: Any

    @property
    def text(self) -> str:
        """The piece of text; empty for all other kinds."""
        return self.value if self.kind == "text" and isinstance(self.value, str) else ""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a call."""

    tokens_in: int = 0
    tokens_out: int = 0
    #: Tokens of the prompt that were not computed again.
    tokens_cached: int = 0


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call of the model."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ChatResult:
    """An answer of a model."""

    text: str
    model: str
    #: `stop`, `length` or `tool_calls`.
    finish_reason: str
    usage: Usage
    #: Seconds from the request to the end of the answer, and to its first text where it was streamed.
    latency_s: float
    first_text_s: float | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    #: The id of the run that the call is.
    run_id: str | None = None


@dataclass(frozen=True, slots=True)
class ChatPart:
    """A part of a streamed answer: a piece of text, or at the end the whole answer."""

    text: str
    result: ChatResult | None = None
    #: The id of the run that the call is: `tokens` reads its text again, `cancel` stops it.
    run_id: str | None = None


@dataclass(frozen=True, slots=True)
class Reasoned(Generic[T]):
    """An answer in the form of a schema."""

    value: T
    answer: ChatResult


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors in the order of the texts."""

    vectors: list[list[float]]
    model: str
    tokens_in: int
    latency_s: float
    run_id: str | None = None


@dataclass(frozen=True, slots=True)
class EmbeddedBatch:
    """Vectors in the order of the texts. A text whose request failed has None, and its error in `failures`."""

    vectors: list[list[float] | None]
    #: By index of the text.
    failures: Mapping[int, ClientError]
    tokens_in: int
    latency_s: float


@dataclass(frozen=True, slots=True)
class Compression:
    """A text or messages with fewer tokens."""

    #: What was given as a text.
    text: str | None
    #: What was given as messages.
    messages: list[dict[str, Any]] | None
    tokens_before: int
    tokens_after: int
    #: The result has at most the tokens of the target; if not, `reason` says why.
    target_met: bool
    reason: str | None
    #: All that the server reports: docs/memory.md.
    report: Mapping[str, Any]
    latency_s: float
    run_id: str | None = None


class Model(_Document):
    """A model that the server serves."""

    id: str
    state: str = ""
    problem: str | None = None
    use_cases: list[str] = []
    context: int | None = None
    slots: int | None = None
    bytes: int | None = None


class File(_Document):
    """A file of the server."""

    id: str
    bytes: int = 0
    filename: str = ""
    purpose: str = ""
    created_at: int = 0


class BatchCounts(_Document):
    """Lines of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(_Document):
    """A batch of requests."""

    id: str
    endpoint: str
    status: str
    input_file_id: str
    output_file_id: str | None = None
    error_file_id: str | None = None
    request_counts: BatchCounts | None = None

    @property
    def is_final(self) -> bool:
        """Whether it has ended."""
        return self.status in ("completed", "failed", "expired", "cancelled")


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a server offers."""

    version: str
    paths: frozenset[str]
    #: Groups of operations, as the server's OpenAPI document names them.
    tags: frozenset[str]


@dataclass(frozen=True, slots=True)
class Check:
    """Whether a part of the server works."""

    ok: bool
    #: Seconds of one small request; None when none was sent.
    latency_s: float | None = None
    model: str | None = None
    error: ClientError | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the parts of a server work."""

    checks: Mapping[str, Check] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether all that were checked work."""
        return all(check.ok for check in self.checks.values())


class Block(_Document):
    """A memory block."""

    id: str
    label: str
    value: str
    description: str = ""
    limit: int
    read_only: bool = False
    #: The number of its newest version, which an edit names.
    version: int
    archived_at: datetime | None = None
    attached: list[dict[str, str]] = []


class BlockVersion(_Document):
    """A version of a block."""

    version: int
    value: str
    description: str = ""
    limit: int
    #: `kind`, `name`, `run_id`, `step`.
    author: dict[str, Any] = {}
    operation: str = ""
    created_at: datetime


class BlockDiff(_Document):
    """What changed between two versions of a block."""

    from_version: int
    to_version: int
    changed: list[str] = []
    #: The change of the value as a unified diff.
    diff: str = ""


class ContextDocument(_Document):
    """A document of the personal context."""

    id: str
    user: str | None = None
    kind: str
    name: str
    title: str = ""
    format: str = ""
    #: It is in each prompt.
    always: bool = False
    version: int
    #: None in lists.
    content: str | None = None


class ContextPart(_Document):
    """A part of a document, for a prompt."""

    document_id: str
    kind: str
    name: str
    heading: str
    text: str
    #: None for a document that is in each prompt.
    score: float | None = None
