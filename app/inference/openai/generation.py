"""
The parameters that chat completions and completions share, and their translation into sampling parameters.

A parameter that llama.cpp cannot honour is refused by name. One that the ecosystem sends without a meaning for a local
model (`user`, `metadata`, `store`, cache keys) is accepted and has no effect; so are unknown fields.
A parameter that is not set has the value that is recommended for the model, or else llama.cpp's default, not OpenAI's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag
from pydantic_core import ErrorDetails

from app.inference.recommended import RECOMMENDABLE
from app.inference.requests import PriorityClass, Sampling
from app.kernel.security import texts

#: More than any context: the limit is then what the context leaves.
NO_LIMIT = 1_000_000
#: Most texts for one prompt, and most log-probabilities for one token: the limits of the engine.
MAX_TEXTS, MAX_TOP_LOGPROBS = 16, 20


def _storable(text: str) -> str:
    if texts.storable(text) != text:
        raise ValueError("the text holds NUL or half a character, which cannot be stored")
    return text


#: A text that can be stored with the run.
PlainText = Annotated[str, AfterValidator(_storable)]

#: A text, or a list of texts.
Stops = Annotated[
    Annotated[PlainText, Tag("text")] | Annotated[list[PlainText], Field(max_length=16), Tag("texts")],
    Discriminator(lambda value: "texts" if isinstance(value, list | tuple) else "text"),
]
#: Names of alternatives above and in `chat`, which pydantic adds to the place of an error.
ALTERNATIVES = frozenset({"text", "texts", "parts", "mode", "tool"})

#: The class of a request, by OpenAI's service tier.
_CLASSES: Mapping[str, PriorityClass] = {"flex": PriorityClass.BATCH, "batch": PriorityClass.BATCH}


class RequestPart(BaseModel):
    """A part of a request. Unknown fields are ignored, as clients of OpenAI's API expect."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class StreamOptions(RequestPart):
    """Options of a streamed answer."""

    #: A last chunk, without choices, has the usage of the whole request.
    include_usage: bool = False


class GenerationRequest(RequestPart):
    """The parameters of every request for text."""

    model: Annotated[PlainText, Field(min_length=1, max_length=200)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_TEXTS)
    stop: Stops | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(default=None, ge=0, le=5)
    top_p: float | None = Field(default=None, ge=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: Annotated[dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], float], Field(max_length=1024)] | None = (
        None
    )
    service_tier: Literal["auto", "default", "priority", "flex", "batch", "scale"] | None = None
    #: Parameters of llama.cpp that OpenAI's API does not have.
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    min_p: float | None = Field(default=None, ge=0, le=1)
    typical_p: float | None = Field(default=None, gt=0, le=1)
    repeat_penalty: float | None = Field(default=None, gt=0, le=5)
    #: Tokens to which the penalties apply: the last ones, or all with -1.
    repeat_last_n: int | None = Field(default=None, ge=-1, le=2**20)

    @property
    def streamed(self) -> bool:
        """Whether the answer is streamed."""
        return bool(self.stream)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def priority(self) -> PriorityClass:
        """The priority class: `flex` and `batch` wait for idle slots, all others are interactive."""
        return _CLASSES.get(self.service_tier or "", PriorityClass.INTERACTIVE)

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    def sampling(self) -> Sampling:
        """The sampling parameters of the engine."""
        names = (
            *("temperature", "top_p", "frequency_penalty", "presence_penalty"),
            *("top_k", "min_p", "typical_p", "repeat_penalty"),
        )
        given: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.repeat_last_n is not None:
            given["penalty_last_n"] = self.repeat_last_n
        if self.top_p == 0:
            given |= {"top_p": 1.0, "top_k": 1}  # the most likely token alone
        if self.seed is not None:
            given["seed"] = self.seed % 2**32
        if self.logit_bias:
            # OpenAI's -100 forbids a token.
            given["logit_bias"] = {
                int(token): float("-inf") if bias <= -100 else bias for token, bias in self.logit_bias.items()
            }
        return Sampling(**given, unset=RECOMMENDABLE - given.keys())


def place_of(error: ErrorDetails) -> tuple[int | str, ...]:
    """The path of the wrong field, without the names of alternatives: those below, and all that begin with `<`."""
    place = error["loc"]
    fields = ("content", "stop", "tool_choice")
    return tuple(
        part
        for at, part in enumerate(place)
        if not (at and place[at - 1] in fields and part in ALTERNATIVES) and not str(part).startswith("<")
    )
