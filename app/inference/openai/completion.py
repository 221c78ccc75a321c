"""A completion (the older form, a plain prompt without a chat template): the request, and its translation."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from app.inference.openai.generation import MAX_TOP_LOGPROBS, NO_LIMIT, GenerationRequest, PlainText
from app.inference.requests import GenerateRequest

#: Fields that are not supported, with what to do instead.
_REFUSED = {
    "suffix": "no suffix: the models here continue a text",
    "best_of": "`n`",
    "conversation_id": "/v1/chat/completions: a plain prompt has no messages before it",
    "memory": "/v1/chat/completions",
}


class CompletionRequest(GenerationRequest):
    """A request for completions of one prompt."""

    prompt: Annotated[PlainText, Field(min_length=1)]
    #: OpenAI's default, too.
    max_tokens: int = Field(default=16, ge=1, le=NO_LIMIT)
    #: Log-probabilities of so many most likely tokens; 0 returns only those of the written tokens.
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    #: Whether the answer repeats the prompt.
    echo: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_one_prompt(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, instead in _REFUSED.items():
            if given.get(name) not in (None, 1):
                raise ValueError(f"{name!r} is not supported; use {instead}")
        if isinstance(prompt := given.get("prompt"), list):
            if len(prompt) != 1 or not isinstance(prompt[0], str):
                raise ValueError("prompt must be one text; send a request for each prompt (no lists, no token ids)")
            return {**given, "prompt": prompt[0]}
        return given

    @model_validator(mode="after")
    def _fits(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported; the prompt's tokens have no log-probabilities here")
        return self

    def translated(self) -> GenerateRequest:
        """The request for an engine."""
        return GenerateRequest(
            prompt=self.prompt,
            max_tokens=self.max_tokens,
            fits_context=self.max_tokens == NO_LIMIT,
            sampling=self.sampling(),
            stop=self.stops,
            priority=self.priority,
            n=self.n or 1,
            logprobs=self.logprobs,
        )
