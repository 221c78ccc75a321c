"""Outcomes: how an attempt ended, and what it took."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from app.kernel.errors import FailureReason


@dataclass(frozen=True, slots=True)
class Usage:
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
    usage: Usage = Usage()


@dataclass(frozen=True, slots=True)
class Failure:
    """The work is not done."""

    reason: FailureReason
    message: str
    #: What the model wrote.
    text: str | None = None
    usage: Usage = Usage()
