"""Outcomes: how an attempt ended, and the tokens that it used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from app.kernel.errors import FailureReason
from app.workflows.language.definition import Definition


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """The tokens that an attempt used, and why its text ended."""

    tokens_in: int = 0
    tokens_out: int = 0
    tokens_cached: int = 0
    #: The time from its acceptance by the engine to the first token.
    first_token: timedelta | None = None
    #: `stop`, `length` and others as in the OpenAI API; None without a text.
    finish_reason: str | None = None
    #: What it cost, in the currency of the settings; None where that is not known.
    cost: Decimal | None = None
    #: By which prices, as JSON; None where there is nothing to say.
    cost_basis: Mapping[str, Any] | None = field(default=None, compare=False)
    #: What its prompt was put together of, as JSON; None where nothing was.
    assembly: Mapping[str, Any] | None = field(default=None, compare=False)
    #: What hooks did to it, as JSON; empty where none was called.
    hooks: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)


#: The finish reason of a text that was cut at `max_tokens`.
LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Success:
    """The work is done."""

    output: Any
    usage: TokenUsage = TokenUsage()
    #: Writes what belongs to it in the transaction that records it, whose unit of work it gets. If it raises, the work
    #: has failed, and nothing of it is written.
    within: Callable[[Any], object] | None = field(default=None, compare=False)
    #: Is called with the outcome that was recorded, once that is committed.
    recorded: Callable[[Success | Failure], object] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Failure:
    """The work failed."""

    reason: FailureReason
    message: str
    #: The text of the model.
    text: str | None = None
    usage: TokenUsage = TokenUsage()
    #: The least delay before another attempt, as a server requested.
    retry_after: timedelta = timedelta(0)
    #: The work was done, but its result cannot be recorded: there is no further attempt.
    final: bool = False


@dataclass(frozen=True, slots=True)
class Expanded:
    """The items of a map: each is a step of its own."""

    items: Sequence[Any]


@dataclass(frozen=True, slots=True)
class NewItem:
    """A turn of the model of an agent, or a call of a tool."""

    #: `turn` or `call`.
    kind: str
    value: Any


@dataclass(frozen=True, slots=True)
class Continued:
    """The next items of an agent; none to begin those again that a retry has reset."""

    items: Sequence[NewItem]
    #: The time that is left for them.
    time: timedelta


@dataclass(frozen=True, slots=True)
class Called:
    """Another workflow is called."""

    definition: Definition
    version: int | None
    inputs: Mapping[str, Any]
    #: The time that its run may take.
    deadline: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Timed:
    """The step waits for a duration or an instant."""

    delay: timedelta | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Signalled:
    """The step waits for an event."""

    event: str
    #: For the person who decides.
    message: str | None = None
    expires: timedelta | None = None


Awaited = Expanded | Continued | Called | Timed | Signalled
Outcome = Success | Failure | Awaited
