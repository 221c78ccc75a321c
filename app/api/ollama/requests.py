"""
Requests of Ollama's API, and their translation into requests of OpenAI's form.

A parameter that no model here can honour is refused by name; options that say how Ollama loads a model have no effect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    JsonValue,
    StrictBool,
    field_validator,
    model_validator,
)

from app.api.ollama.keep_alive import KeepAliveIn
from app.inference.images import references
from app.inference.openai.embedding import MAX_INPUTS
from app.inference.openai.generation import PlainText, RequestPart

_MAX_MESSAGES, _MAX_CALLS = 10_000, 128
#: Options with the same name and meaning in requests of OpenAI's form.
_SAME = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("repeat_penalty", "repeat_last_n", "presence_penalty", "frequency_penalty"),
)
#: Options that the engine is not asked for, with the only value that has no effect.
_WITHOUT_EFFECT: Mapping[str, int] = {"mirostat": 0}

_Name = Annotated[PlainText, Field(min_length=1, max_length=200)]
_Text = Annotated[PlainText, Field()]
_Images = Annotated[list[Annotated[PlainText, AfterValidator(references.data_url)]], Field(max_length=256)] | None


class _RequestIn(RequestPart):
    """What all requests have. `name` is the older name of `model`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: _Name
    keep_alive: KeepAliveIn | None = None

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, given: Any) -> Any:
        if isinstance(given, dict) and "model" not in given and "name" in given:
            return {**given, "model": given["name"]}
        return given


class OllamaOptions(RequestPart):
    """The object `options`. Options that are not listed have no effect."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    mirostat: int | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    num_predict: int | None = Field(default=None, ge=-2, lt=2**63)
    #: At most the context of a slot, which the catalogue defines.
    num_ctx: int | None = Field(default=None, ge=0, lt=2**63)
    stop: Annotated[list[PlainText], Field(max_length=16)] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @model_validator(mode="after")
    def _known(self) -> OllamaOptions:
        for name, value in _WITHOUT_EFFECT.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(f"{name} is not supported; leave it out, or send {value}")
        return self

    def translated(self, context: int) -> dict[str, Any]:
        """The parameters for a model with that context. Raises ValueError when `num_ctx` is more."""
        if self.num_ctx is not None and self.num_ctx > context:
            raise ValueError(
                f"num_ctx: a slot of this model has {context} tokens; send at most that, "
                "or raise `context` of its entry in the catalogue"
            )
        found: dict[str, Any] = {name: value for name in _SAME if (value := getattr(self, name)) is not None}
        if self.seed is not None and self.seed >= 0:
            found["seed"] = self.seed
        if self.num_predict is not None and 0 < self.num_predict < context:
            found["max_tokens"] = self.num_predict
        if self.stop:
            found["stop"] = self.stop
        return found


class OllamaFunctionIn(RequestPart):
    """A tool call of an earlier answer."""

    name: _Name
    arguments: dict[str, JsonValue] = Field(default_factory=dict)


class OllamaToolCallIn(RequestPart):
    """A tool call of an earlier answer."""

    function: OllamaFunctionIn


class OllamaMessageIn(RequestPart):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: _Text = ""
    #: Images as base64, which come before the text.
    images: _Images = None
    tool_calls: Annotated[list[OllamaToolCallIn], Field(max_length=_MAX_CALLS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_null(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("content", "") is None:
            return {**given, "content": ""}
        return given

    def translated(self) -> dict[str, Any]:
        """The message in OpenAI's form."""
        calls = [
            {"function": {"name": call.function.name, "arguments": json.dumps(call.function.arguments)}}
            for call in self.tool_calls or ()
        ]
        content = _content(self.content, self.images)
        return {"role": self.role, "content": content, **({"tool_calls": calls} if calls else {})}


#: By `think`, the effort in OpenAI's form.
_EFFORTS: Mapping[bool | str, str] = {True: "medium", False: "none"}


class _GenerationIn(_RequestIn):
    """What requests for text have."""

    stream: bool | None = None
    format: Literal["", "json"] | dict[str, JsonValue] | None = None
    options: OllamaOptions | None = None
    think: StrictBool | Literal["low", "medium", "high"] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def streamed(self) -> bool:
        """Whether the answer is streamed, which is the default."""
        return self.stream is not False

    def _shared(self, model: str, context: int) -> dict[str, Any]:
        found = {"model": model, **(self.options or OllamaOptions()).translated(context)}
        if self.think is not None:
            found["reasoning_effort"] = _EFFORTS.get(self.think, self.think)
        if self.logprobs:
            found |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if isinstance(self.format, dict):
            found["response_format"] = {"type": "json_schema", "json_schema": {"schema": self.format}}
        elif self.format:
            found["response_format"] = {"type": "json_object"}
        return found


class OllamaChatIn(_GenerationIn):
    """The body of `/api/chat`."""

    messages: Annotated[list[OllamaMessageIn], Field(max_length=_MAX_MESSAGES)] = Field(default_factory=list)
    tools: list[Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_messages(cls, given: Any) -> Any:
        return {**given, "messages": []} if isinstance(given, dict) and given.get("messages", []) is None else given

    @property
    def only_loads(self) -> bool:
        """Whether it only loads or unloads the model."""
        return not self.messages

    def translated(self, model: str, context: int) -> dict[str, Any]:
        """The chat completion for a model with that context. Raises ValueError."""
        tools = {"tools": self.tools} if self.tools else {}
        messages = [message.translated() for message in self.messages]
        return {**self._shared(model, context), "messages": messages, **tools}


class OllamaGenerateIn(_GenerationIn):
    """The body of `/api/generate`."""

    prompt: _Text = ""
    system: PlainText | None = None
    #: The prompt is continued without a chat template.
    raw: bool | None = None
    suffix: str | None = None
    template: str | None = None
    images: _Images = None
    context: list[Any] | None = None

    @model_validator(mode="after")
    def _refuse(self) -> OllamaGenerateIn:
        if self.suffix:
            raise ValueError("suffix is not supported: the models here continue a text")
        if self.template:
            raise ValueError("template is not supported: the entry in the catalogue defines it (prompt.chat_template)")
        if self.images and self.raw:
            raise ValueError("raw cannot be used together with images")
        if self.context:
            raise ValueError("context is not supported: send the conversation to /api/chat")
        if self.raw and (self.system or self.format or self.logprobs):
            raise ValueError("raw cannot be used together with system, format or logprobs")
        return self

    @property
    def only_loads(self) -> bool:
        """Whether it only loads or unloads the model."""
        return not self.prompt

    def translated(self, model: str, context: int) -> dict[str, Any]:
        """The completion, or chat completion, for a model with that context. Raises ValueError."""
        shared = self._shared(model, context)
        if self.raw:
            return {"max_tokens": 1_000_000, **shared, "prompt": self.prompt}
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {**shared, "messages": [*system, {"role": "user", "content": _content(self.prompt, self.images)}]}


class OllamaEmbedIn(_RequestIn):
    """The body of `/api/embed`."""

    input: Annotated[list[_Text], Field(max_length=MAX_INPUTS)] = Field(default_factory=list)
    truncate: bool | None = None
    dimensions: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _in_a_list(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("input"), str):
            return {**given, "input": [given["input"]] if given["input"] else []}
        return given

    @property
    def only_loads(self) -> bool:
        """Whether it only loads or unloads the model."""
        return not self.input

    def translated(self, model: str) -> dict[str, Any]:
        """The request in OpenAI's form. A long text is truncated unless `truncate` is false."""
        dimensions = {"dimensions": self.dimensions} if self.dimensions else {}
        long_text = "refuse" if self.truncate is False else "truncate"
        return {"model": model, "input": self.input, "long_text": long_text, **dimensions}


class OllamaEmbeddingsIn(_RequestIn):
    """The body of `/api/embeddings`, the older form."""

    prompt: _Text = ""

    def embed(self) -> OllamaEmbedIn:
        """The same in the newer form."""
        texts = [self.prompt] if self.prompt else []
        return OllamaEmbedIn(model=self.model, input=texts, keep_alive=self.keep_alive)


class OllamaShowIn(_RequestIn):
    """The body of `/api/show`."""

    verbose: bool | None = None


def _content(text: str, images: list[str] | None) -> str | list[dict[str, Any]]:
    """The content of a message in OpenAI's form; `images` are data URLs."""
    if not images:
        return text
    return [*({"type": "image_url", "image_url": one} for one in images), {"type": "text", "text": text}]
