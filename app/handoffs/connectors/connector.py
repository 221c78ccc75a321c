"""
The protocol of connectors: how messages come in, and how they go out.

A source turns a request into messages, after it has authenticated it. A target says which steps of a workflow deliver a
message; the run of that workflow has the retries, the time limits and the history.
To add a connector: write a module with a subclass of `SourceFields` or `TargetFields`, and add it to `AnySource` or
`AnyTarget` in `app.handoffs.definition`.

Nothing here reads a clock, a secret or a socket: the caller passes what is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.kernel.errors import InvalidInput, Problem
from app.workflows.expressions.templates import Scope
from app.workflows.language import source

#: The names that expressions over a message may use.
MESSAGE_SCOPE = Scope(inputs=(), steps=(), extra=("message",), roots=())
#: Those that expressions over a delivered message may use.
DELIVERED_SCOPE = Scope(inputs=(), steps=(), extra=("message", "payload", "key", "output"), roots=())
#: Most characters of the key of a message, and of the name of its sender.
MAX_KEY, MAX_SENDER = 500, 200

SecretName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
ExpressionText = Annotated[str, StringConstraints(min_length=1, max_length=20_000)]
#: Returns the value of a secret by its name. Raises StepFailure for one that does not exist.
RevealSecret = Callable[[str], str]


class NotGenuine(Exception):
    """A request is not from whom it must be, with the reason."""


class HandoffPart(BaseModel):
    """A mapping of the document. Unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class ReceivedRequest:
    """A request to a source, as it came."""

    #: By names in lower case.
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class InboundFile:
    """A file that came with a message. It is stored with it, and `message.attachments` gets its id."""

    name: str
    type: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class InboundMessage:
    """A message that came in."""

    #: The same for each delivery of the same message.
    key: str
    #: Who sent it, as far as the protocol says; scores are kept for each.
    sender: str
    message: dict[str, Any] = field(repr=False)
    #: Why nothing is done with it; empty when it is handed on.
    skipped: str = ""
    files: tuple[InboundFile, ...] = ()
    #: Ids of messages of the same thread, as the protocol has them, its own first.
    related: tuple[str, ...] = ()
    #: The sender wants no replies any more, or allows them again.
    consent: Literal["", "out", "in"] = ""


@dataclass(frozen=True, slots=True)
class AddressQuestion:
    """The question whether an address belongs to who has a token."""

    mode: str
    token: str = field(repr=False)
    #: What the answer repeats.
    challenge: str


class SourceFields(HandoffPart):
    """What all sources have."""

    kind: str
    #: Most bytes of a request.
    max_bytes: int = Field(default=262_144, ge=1, le=4 * 1_048_576)

    def receive(self, request: ReceivedRequest, reveal: RevealSecret, now: datetime) -> list[InboundMessage]:
        """Authenticate a request and return its messages. Raises NotGenuine, InvalidInput."""
        raise NotImplementedError

    def challenge(self, question: AddressQuestion, reveal: RevealSecret) -> str:
        """Answer the question whether the address is the owner's, which some senders ask. Raises NotGenuine."""
        del question, reveal
        raise NotGenuine("this source has no verification by GET")

    def expressions(self) -> Mapping[str, str]:
        """Return the CEL expressions over `message`, by their fields."""
        return {}


@dataclass(frozen=True, slots=True)
class DeliveryPlan:
    """How a message is delivered: steps of a workflow over `inputs.payload` and `inputs.key`."""

    steps: list[dict[str, Any]]
    #: Expressions of the run's outputs: `response`, what the target answered; `read`, what it has now.
    outputs: dict[str, str]


class TargetFields(HandoffPart):
    """What all targets have."""

    kind: str

    def plan(self, retry: Mapping[str, Any], fields: tuple[str, ...]) -> DeliveryPlan | None:
        """
        Return the steps that deliver a payload; None when the run is that of a stored workflow.

        `fields` are the names of the payload that are known.
        """
        raise NotImplementedError

    def problems(self, payload: Mapping[str, Any]) -> list[Problem]:
        """Return why a payload cannot be sent, beyond what its schema says."""
        del payload
        return []

    def recipient(self, payload: Mapping[str, Any]) -> str | None:
        """Return who gets a payload, in the form of senders; None where a person cannot refuse it."""
        del payload
        return None


class HasWorkflow(Protocol):
    """A target that is a stored workflow."""

    workflow: str
    version: int | None


def json_message(request: ReceivedRequest) -> dict[str, Any]:
    """Return the JSON object of a request, under the bounds of all documents. Raises InvalidInput."""
    try:
        found = source.read(request.body.decode(), "json").data
    except UnicodeDecodeError:
        raise InvalidInput([Problem("", "the body is not UTF-8", "JSON in UTF-8")], "message") from None
    except InvalidInput as error:
        raise InvalidInput(error.problems, "message") from None
    if not isinstance(found, dict):
        raise InvalidInput([Problem("", "the body is not a JSON object", "a JSON object")], "message")
    return found
