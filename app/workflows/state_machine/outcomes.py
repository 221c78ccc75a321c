"""Outcomes: how an attempt ended, and what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from app.kernel.errors import FailureReason
from app.workflows.language.definition import Definition


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """What an attempt took of a model."""

    tokens_in: int = 0
    tokens_out: int = 0
    tokens_cached: int = 0
    #: Until the first token, from the engine's taking it.
    first_token: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Success:
    """The work is done."""

    output: Any
    usage: TokenUsage = TokenUsage()


@dataclass(frozen=True, slots=True)
class Failure:
    """The work is not done."""

    reason: FailureReason
    message: str
    #: What the model wrote.
    text: str | None = None
    usage: TokenUsage = TokenUsage()
    #: The least delay before another attempt, as a server asked for it.
    retry_after: timedelta = timedelta(0)
    #: The work was done, but what came of it cannot be recorded: no other attempt is made.
    final: bool = False


@dataclass(frozen=True, slots=True)
class Expanded:
    """The items of a map are known: each is a step of its own."""

    items: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Called:
    """Another workflow is to run."""

    definition: Definition
    version: int | None
    inputs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Timed:
    """Nothing is to be done until some time has passed, or an instant has come."""

    delay: timedelta | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Signalled:
    """An event is to come."""

    event: str
    #: What a person reads who is to decide.
    message: str | None = None
    expires: timedelta | None = None


Awaited = Expanded | Called | Timed | Signalled
Outcome = Success | Failure | Awaited
