"""
Engine requests and their results.

A request is a value: it contains no run, step or worker.
All engines accept the same requests, whether they run llama.cpp in this process or call a server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Literal

from app.workflows.language.template_arguments import ReasoningLevel


class PriorityClass(StrEnum):
    """The priority class of a request; `RANKS` defines the order."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"


#: The class with the smaller rank is served first.
RANKS: Mapping[PriorityClass, int] = {
    PriorityClass.INTERACTIVE: 0,
    PriorityClass.STANDARD: 1,
    PriorityClass.BATCH: 2,
}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call of the model."""

    name: str
    arguments: Mapping[str, Any]
    #: The arguments as the model wrote them; empty when that is not known.
    written: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Pixels:
    """A decoded image: rows from above, three bytes (red, green, blue) for each pixel."""

    width: int
    height: int
    data: bytes = field(repr=False)

    def digest(self) -> str:
        """Return a name of the image that differs from those of all others."""
        return hashlib.sha256(b"%d,%d," % (self.width, self.height) + self.data).hexdigest()


@dataclass(frozen=True, slots=True)
class ImageInput:
    """An image at its place in a message."""

    #: How many characters of the content are before it.
    at: int
    #: Where it comes from: a data URL, the id of a file, or an http(s) URL.
    reference: str = field(repr=False)
    #: The field of the request that names it, for messages.
    place: str
    #: The decoded image; None until it was read.
    pixels: Pixels | None = None


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation, with the roles of chat templates."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    #: Tool calls of the assistant in this message; their results follow in messages with the role `tool`.
    tool_calls: tuple[ToolCall, ...] = ()
    #: Images, in the order of their places.
    images: tuple[ImageInput, ...] = ()


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters. The defaults are those of llama.cpp, except `seed`."""

    #: 0 means greedy sampling: always the most likely token.
    temperature: float = 0.8
    #: Keep this many of the most likely tokens; 0 keeps all.
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    #: 1 means no penalty; applies to the last `penalty_last_n` tokens.
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    #: None means a new random seed for each request.
    seed: int | None = None
    #: Maps token ids to numbers that are added to their logits; `-inf` forbids a token.
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    #: Mirostat 2.0 (arXiv 2007.14966) replaces top_k, top_p, min_p and typical_p.
    mirostat: bool = False
    #: The target surprise of mirostat, in bits, and its learning rate.
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    #: DRY: penalises tokens that continue a repeated sequence; 0 turns it off.
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    #: Sequences of at most this many tokens repeat without a penalty.
    dry_allowed_length: int = 2
    #: Applies to the last tokens of this number; -1 means all.
    dry_last_n: int = -1
    #: The text continues after the end-of-text token, up to `max_tokens`: for benchmarks.
    ignore_end: bool = False
    #: Texts that end a repeated sequence.
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    #: Names of parameters that the client did not set: what is recommended for the model replaces them.
    unset: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str = ""
    #: JSON Schema of the arguments, an object.
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})


@dataclass(frozen=True, slots=True)
class NamedTool:
    """The one tool that the model must call."""

    name: str


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A request for generated text: either messages for the chat template, or a plain prompt."""

    messages: tuple[ChatMessage, ...] = ()
    prompt: str | None = None
    #: Maximum generated tokens.
    max_tokens: int = 256
    #: A `max_tokens` beyond what the context leaves is reduced to that, instead of refused.
    fits_context: bool = False
    #: A conversation that does not fit the context loses its oldest turns; system messages are kept.
    truncates: bool = False
    #: A text that was cut before its JSON or its tool call was complete is returned, instead of a failure.
    keeps_cut: bool = False
    sampling: Sampling = Sampling()
    #: The text ends before the first of these texts.
    stop: tuple[str, ...] = ()
    #: A JSON Schema: the text is a JSON document that conforms to it.
    schema: Mapping[str, Any] | None = None
    #: A GBNF grammar with the rule `root`. Not together with `schema`.
    grammar: str | None = None
    priority: PriorityClass = PriorityClass.STANDARD
    #: The request is cancelled at this instant.
    deadline: datetime | None = None
    #: Number of texts for the prompt, which is computed once.
    n: int = 1
    #: None returns no log-probabilities; 0 those of the generated tokens; k also those of the k best at each position.
    logprobs: int | None = None
    #: Functions that the model may call. Not together with `schema` or `grammar`.
    tools: tuple[Tool, ...] = ()
    #: `auto`: the model may call tools. `required`: it must call at least one. A NamedTool: it must call this one.
    #: `none`: it sees no tools.
    tool_choice: Literal["auto", "required", "none"] | NamedTool = "auto"
    #: Whether the model may make several calls at once, if its family supports this.
    parallel_calls: bool = True
    #: The start of the answer, which the model continues; placed after the template's opening of the answer.
    prefill: str = ""
    #: Variables for the chat template, such as `enable_thinking`; they replace those of the catalogue.
    template_arguments: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    #: How much the model thinks, if its template has a variable for that.
    reasoning_effort: ReasoningLevel | None = None

    @property
    def images(self) -> tuple[ImageInput, ...]:
        """The images of all messages, in order."""
        return tuple(image for message in self.messages for image in message.images)


class FinishReason(StrEnum):
    """Why the text ended."""

    #: The model ended the text, or a stop text occurred.
    STOP = "stop"
    #: The limit `max_tokens` was reached.
    LENGTH = "length"
    #: A filter of the server removed the rest of the text.
    CONTENT_FILTER = "content_filter"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with the logarithm of its probability before sampling."""

    token: int
    #: The bytes of the token: a character may extend over several tokens.
    piece: bytes
    logprob: float
    #: The most likely tokens at this position, best first.
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallPiece:
    """A new part of a tool call that is being written."""

    #: The place of the call among those of its text, from 0.
    place: int
    #: The name of the tool, with the first part only.
    name: str | None = None
    #: The next characters of the arguments, which are JSON.
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class TextPiece:
    """A new part of a text that is being written."""

    text: str
    #: Which of the texts of the request: 0 is the first, others are its alternatives.
    index: int = 0
    #: The tokens since the last piece, if the request asks for log-probabilities.
    logprobs: tuple[TokenLogprob, ...] = ()
    calls: tuple[ToolCallPiece, ...] = ()
    #: A new part of the thinking.
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class Generated:
    """The result of a GenerateRequest: the text, token counts and times."""

    #: The text without tool calls and thinking.
    text: str
    finish: FinishReason
    #: Tokens of the prompt, template included.
    tokens_in: int
    #: Generated tokens.
    tokens_out: int
    #: Tokens of the prompt that were reused from an earlier request.
    tokens_cached: int
    #: From submission to the first token, including the wait for a slot.
    time_to_first: timedelta
    #: From submission to the end.
    time_total: timedelta
    #: One for each generated token that is no part of the thinking, if the request asks for them.
    logprobs: tuple[TokenLogprob, ...] = ()
    #: Tool calls, with arguments that conform to the schemas of the tools.
    tool_calls: tuple[ToolCall, ...] = ()
    #: The seed that was used. In reproducible mode, the same request with this seed returns the same text.
    seed: int | None = None
    #: The second and further texts, if the request asks for several.
    alternatives: tuple[Generated, ...] = ()
    #: What the model thought before the text, without its tags.
    reasoning: str = ""
    #: Generated tokens of the thinking, tags included.
    reasoning_tokens: int = 0
    #: Predicted tokens that were computed in advance, and those of them that became part of the text.
    tokens_drafted: int = 0
    tokens_accepted: int = 0


class LongText(StrEnum):
    """The treatment of a text that is longer than the embedding context."""

    #: Split into windows; the result is the normalised mean of their vectors, weighted by tokens.
    CHUNK = "chunk"
    REFUSE = "refuse"
    #: Only the beginning is embedded.
    TRUNCATE = "truncate"


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """A request for the embeddings of texts."""

    texts: tuple[str, ...]
    long_text: LongText = LongText.CHUNK
    #: Adds the model's prefix for queries or documents to each text.
    task: Literal["query", "document"] | None = None
    #: Truncates each vector to this dimension and normalises it again: for Matryoshka models.
    dimensions: int | None = None
    priority: PriorityClass = PriorityClass.STANDARD


@dataclass(frozen=True, slots=True)
class Embedded:
    """One vector of length 1 for each text, in order."""

    vectors: tuple[tuple[float, ...], ...]
    tokens_in: int
    time_total: timedelta


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """A request for the relevance of each document to the query."""

    query: str
    documents: tuple[str, ...]
    priority: PriorityClass = PriorityClass.STANDARD


@dataclass(frozen=True, slots=True)
class Reranked:
    """One score for each document, in order; higher is better. Only comparisons of the scores are meaningful."""

    scores: tuple[float, ...]
    tokens_in: int
    time_total: timedelta
