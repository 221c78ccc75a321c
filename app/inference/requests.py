"""
Requests: what an engine is asked, and what it answers.

A request is a value: it names no run, no step and no worker.
Every engine takes the same requests, whether it runs llama.cpp in this process or speaks to a server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Literal


class PriorityClass(StrEnum):
    """Who goes first when not all can go; the order is that of `RANKS`."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"


#: Smaller goes first.
RANKS: Mapping[PriorityClass, int] = {
    PriorityClass.INTERACTIVE: 0,
    PriorityClass.STANDARD: 1,
    PriorityClass.BATCH: 2,
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, in the words of the chat template."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. The defaults are llama.cpp's own, but for `seed`."""

    #: 0 takes the most likely token each time.
    temperature: float = 0.8
    #: Keep this many of the most likely tokens; 0 keeps all.
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    #: 1 penalises nothing; looks back over `penalty_last_n` tokens.
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    #: None draws a fresh seed for each request.
    seed: int | None = None
    #: Token id to a number added to its logit.
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Text wanted from a model: messages for its chat template, or a bare prompt. One of the two is given."""

    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    #: Tokens to write at the most.
    max_tokens: int = 256
    sampling: Sampling = Sampling()
    #: The text ends before the first of these.
    stop: tuple[str, ...] = ()
    #: A JSON Schema: the text is a JSON document that conforms to it.
    schema: Mapping[str, Any] | None = None
    #: A GBNF grammar with the rule `root`. Not together with `schema`.
    grammar: str | None = None
    priority: PriorityClass = PriorityClass.STANDARD
    #: The request is given up at this instant.
    deadline: datetime | None = None


class FinishReason(StrEnum):
    """Why the text ended."""

    #: The model ended it, or a stop text came.
    STOP = "stop"
    #: `max_tokens` were written.
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Generated:
    """What a model wrote, and what that took."""

    text: str
    finish: FinishReason
    #: Tokens of the prompt, template included.
    tokens_in: int
    #: Tokens written.
    tokens_out: int
    #: Tokens of the prompt that an earlier request had already computed.
    tokens_cached: int
    #: From submission until the first token; the waiting for a slot is in it.
    time_to_first: timedelta
    #: From submission until the end.
    time_total: timedelta
