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
class ToolCall:
    """What the model asks for."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation, in the words of the chat template."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    #: What the assistant asked for in this turn; what the tools gave follows in messages of the role `tool`.
    tool_calls: tuple[ToolCall, ...] = ()


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
    #: Token id to a number added to its logit; `-inf` forbids the token.
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    #: Mirostat 2.0 (arXiv 2007.14966) in the place of top_k, top_p, min_p and typical_p.
    mirostat: bool = False
    #: The surprise that mirostat aims at, in bits, and how fast it learns.
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    #: DRY: punishes the continuation of a repeated run of tokens; 0 is off.
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    #: Runs up to this length may repeat unpunished, in tokens.
    dry_allowed_length: int = 2
    #: Looks back over this many tokens; -1 looks over all.
    dry_last_n: int = -1
    #: The text goes on past the model's own end, up to `max_tokens`: for measurements.
    ignore_end: bool = False
    #: Texts that end a run.
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may ask for."""

    name: str
    description: str = ""
    #: JSON Schema of the arguments, an object.
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})


@dataclass(frozen=True, slots=True)
class NamedTool:
    """The one tool that the model must ask for."""

    name: str


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Text wanted from a model: messages for its chat template, or a bare prompt. One of the two is given."""

    messages: tuple[ChatMessage, ...] = ()
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
    #: Texts wanted for the one prompt; the prompt is computed once.
    n: int = 1
    #: None gives no log-probabilities; 0 those of the written tokens; k also those of the k best at each place.
    logprobs: int | None = None
    #: Functions that the model may ask for. Not together with `schema` or `grammar`.
    tools: tuple[Tool, ...] = ()
    #: Whether the model may ask for them, must ask for one or more, must ask for the named one, or hears of none.
    tool_choice: Literal["auto", "required", "none"] | NamedTool = "auto"
    #: Whether it may ask for several at once, where its family can.
    parallel_calls: bool = True
    #: The end of the text that the model is to continue, placed after the template's opening of the answer.
    prefill: str = ""


class FinishReason(StrEnum):
    """Why the text ended."""

    #: The model ended it, or a stop text came.
    STOP = "stop"
    #: `max_tokens` were written.
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with the logarithm of its probability before sampling."""

    token: int
    #: The token's own bytes: a character may reach over several tokens.
    piece: bytes
    logprob: float
    #: The best tokens of the place, best first.
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Generated:
    """What a model wrote, and what that took."""

    #: Without the calls of tools in it.
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
    #: One for each written token, where the request asks for them.
    logprobs: tuple[TokenLogprob, ...] = ()
    #: The tools that the model asks for, with arguments that conform to their schemas.
    tool_calls: tuple[ToolCall, ...] = ()
    #: The seed that was used: the same request with it gives the same text in the reproducible mode.
    seed: int | None = None
    #: The second and further texts where the request asks for several.
    alternatives: tuple[Generated, ...] = ()


class LongText(StrEnum):
    """What happens to a text that is longer than the model can embed at once."""

    #: Cut into windows; the mean of their vectors, weighted by their tokens, is normalised again.
    CHUNK = "chunk"
    REFUSE = "refuse"
    #: Only the beginning counts.
    TRUNCATE = "truncate"


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """Vectors wanted for texts."""

    texts: tuple[str, ...]
    long_text: LongText = LongText.CHUNK
    #: Puts the model's prefix for queries, or for documents, before each text.
    task: Literal["query", "document"] | None = None
    #: Keep so many numbers of each vector, and make its length 1 again: for models trained that way (Matryoshka).
    dimensions: int | None = None


@dataclass(frozen=True, slots=True)
class Embedded:
    """One vector of length 1 for each text, in order."""

    vectors: tuple[tuple[float, ...], ...]
    tokens_in: int
    time_total: timedelta


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """How well each document answers the query."""

    query: str
    documents: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reranked:
    """One score for each document, in order; higher is better, and only the order has a meaning."""

    scores: tuple[float, ...]
    tokens_in: int
    time_total: timedelta
