"""
A response: the request, and its translation into a chat completion.

What cannot be honoured is refused by name. What the ecosystem sends without a meaning for a local model (cache keys,
`user`) is accepted and has no effect; so are unknown fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from app.inference.openai.chat import ChatRequest, MessageIn
from app.inference.openai.generation import MAX_TOP_LOGPROBS, NO_LIMIT, PlainText, RequestPart, Stops
from app.inference.openai.responses import items
from app.inference.openai.responses.items import InputItem
from app.inference.requests import PriorityClass
from app.workflows.language.memory_options import MemoryOptions
from app.workflows.language.template_arguments import ReasoningLevel, TemplateArguments

#: Most tools; most values of `metadata`, and most characters of their names and texts, as in OpenAI's API.
_MAX_TOOLS, _MAX_METADATA, _MAX_NAME, _MAX_VALUE = 128, 16, 64, 512
#: Most messages and characters of a conversation with all that came before.
MAX_MESSAGES, MAX_CHARACTERS = 10_000, 4_000_000
#: Fields of OpenAI's API that cannot be honoured, with what to do instead.
_REFUSED: Mapping[str, str] = {
    "prompt": "`instructions` and `input`: prompts are not stored here",
    "context_management": "`truncation`",
    "moderation": "no moderation: send the texts to a model for it",
    "image": "a part of the type input_image in `input`",
    "background_options": "`background` alone",
}
#: What `include` can add; the others belong to tools that are not here, and have no effect.
LOGPROBS = "message.output_text.logprobs"
#: Parameters that have the same meaning in a chat completion.
_SHARED = (
    *("model", "temperature", "top_p", "parallel_tool_calls", "service_tier", "truncation"),
    *("top_k", "min_p", "typical_p", "repeat_penalty", "seed", "stop", "chat_template_kwargs"),
)


class ResponseTool(RequestPart):
    """A tool; only functions exist here."""

    type: str
    name: Annotated[PlainText, Field(min_length=1, max_length=200)] | None = None
    description: PlainText | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _is_function(self) -> ResponseTool:
        if self.type != "function":
            raise ValueError(f"the tool {self.type[:40]!r} is not available here; only tools of the type function are")
        if self.name is None:
            raise ValueError("the function has no name")
        return self

    def translated(self) -> dict[str, Any]:
        """The tool in the form of a chat completion."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


class ChosenTools(RequestPart):
    """The one tool that the model must call, or the tools that it may call."""

    type: str
    name: PlainText | None = None
    mode: Literal["auto", "required"] = "auto"
    tools: Annotated[list[ResponseTool], Field(max_length=_MAX_TOOLS)] = Field(default_factory=list)

    @model_validator(mode="after")
    def _is_known(self) -> ChosenTools:
        if self.type not in ("function", "allowed_tools"):
            raise ValueError(f"a choice of the type {self.type[:40]!r} is not supported; use function or allowed_tools")
        if self.type == "function" and self.name is None:
            raise ValueError("the chosen function has no name")
        if self.type == "allowed_tools" and not self.tools:
            raise ValueError("allowed_tools names no tools")
        return self


ToolChoiceIn = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")] | Annotated[ChosenTools, Tag("<tool>")],
    Discriminator(lambda value: "<tool>" if isinstance(value, dict | ChosenTools) else "<mode>"),
]


class TextFormat(RequestPart):
    """The form of the text. A grammar forces it, whether or not `strict` is set."""

    type: Literal["text", "json_object", "json_schema"]
    name: PlainText | None = None
    description: PlainText | None = None
    schema_: dict[str, JsonValue] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> TextFormat:
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("schema is missing")
        return self


class TextOptions(RequestPart):
    """Options of the text."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(RequestPart):
    """Options of the thinking. Summaries are not made: the thinking itself is in the response."""

    effort: ReasoningLevel | None = None
    summary: PlainText | None = None


class ConversationReference(RequestPart):
    """A conversation, by its id."""

    id: Annotated[PlainText, Field(min_length=1, max_length=200)]


ContinuedConversation = Annotated[
    ConversationReference,
    BeforeValidator(lambda value: {"id": value} if isinstance(value, str) else value),
]


class ResponsesRequest(RequestPart):
    """A request for a response."""

    model: Annotated[PlainText, Field(min_length=1, max_length=200)]
    input: Annotated[list[InputItem], Field(min_length=1, max_length=items.MAX_ITEMS)]
    instructions: PlainText | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=_MAX_TOOLS)] | None = None
    tool_choice: ToolChoiceIn | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=5)
    top_p: float | None = Field(default=None, ge=0, le=1)
    max_output_tokens: int | None = Field(default=None, ge=1, le=NO_LIMIT)
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    include: Annotated[list[PlainText], Field(max_length=20)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[PlainText, Field(max_length=_MAX_NAME)], Annotated[PlainText, Field(max_length=_MAX_VALUE)]],
            Field(max_length=_MAX_METADATA),
        ]
        | None
    ) = None
    previous_response_id: Annotated[PlainText, Field(max_length=200)] | None = None
    #: The conversation that the input continues: its id, or an object with it.
    conversation: ContinuedConversation | None = None
    #: An extension: what of the conversation and of memory goes into the prompt.
    memory: MemoryOptions | None = None
    store: bool | None = None
    background: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    service_tier: Literal["auto", "default", "priority", "flex", "batch", "scale"] | None = None
    stream: bool | None = None
    user: PlainText | None = None
    #: No effect; returned as it was given.
    safety_identifier: PlainText | None = None
    prompt_cache_key: PlainText | None = None
    max_tool_calls: int | None = Field(default=None, ge=1)
    #: Whether, and how much, a model thinks whose template has a variable for that.
    reasoning: ReasoningOptions | None = None
    #: An extension: variables for the chat template.
    chat_template_kwargs: TemplateArguments | None = None
    #: Parameters of llama.cpp that OpenAI's API does not have here.
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stops | None = None
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    min_p: float | None = Field(default=None, ge=0, le=1)
    typical_p: float | None = Field(default=None, gt=0, le=1)
    repeat_penalty: float | None = Field(default=None, gt=0, le=5)

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, instead in _REFUSED.items():
            if given.get(name) is not None:
                raise ValueError(f"{name!r} is not supported; use {instead}")
        if isinstance(text := given.get("input"), str):
            return {**given, "input": [{"type": "message", "role": "user", "content": text}]}
        return given

    @field_validator("include")
    @classmethod
    def _without_duplicates(cls, given: list[str] | None) -> list[str] | None:
        return None if given is None else list(dict.fromkeys(given))

    @model_validator(mode="after")
    def _fits(self) -> ResponsesRequest:
        if self.conversation is not None and self.previous_response_id is not None:
            raise ValueError("conversation and previous_response_id cannot be used together; at most one is accepted")
        if self.background and self.store is False:
            raise ValueError("background needs store: a response that is not stored cannot be read later")
        chosen = self.tool_choice
        if isinstance(chosen, ChosenTools):
            known = {tool.name for tool in self.tools or ()}
            for name in [chosen.name] if chosen.type == "function" else [tool.name for tool in chosen.tools]:
                if name not in known:
                    raise ValueError(
                        f"tool_choice names {name!r}; the tools are {', '.join(map(str, known)) or 'none'}"
                    )
        return self

    @property
    def priority(self) -> PriorityClass:
        """The priority class: `flex` and `batch` wait for idle slots, all others are interactive."""
        return PriorityClass.BATCH if self.service_tier in ("flex", "batch") else PriorityClass.INTERACTIVE

    @property
    def is_stored(self) -> bool:
        """Whether the response can be read again, and continued."""
        return self.store is not False

    @property
    def wants_logprobs(self) -> bool:
        """Whether the text comes with its log-probabilities."""
        return self.top_logprobs is not None or LOGPROBS in (self.include or ())

    def instructed(self, before: Sequence[MessageIn]) -> list[MessageIn]:
        """
        Return all messages for the model: the instructions, the conversation before, and the input.

        Raises ValueError when they are too many or too long, or a result belongs to no call.
        """
        conversation = items.messages_of(self.input, before, is_continued=self.conversation is not None)
        if not conversation:
            raise ValueError("input has nothing that a model could read")
        given = [MessageIn(role="system", content=self.instructions)] if self.instructions else []
        whole = [*given, *conversation]
        characters = sum(len(message.content or "") for message in whole)
        if len(whole) > MAX_MESSAGES or characters > MAX_CHARACTERS:
            accepted = f"at most {MAX_MESSAGES} and {MAX_CHARACTERS} are accepted"
            raise ValueError(f"the conversation has {len(whole)} messages and {characters} characters; {accepted}")
        return whole

    def document(self) -> dict[str, Any]:
        """The request as JSON, with the fields that were set."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"stream"})

    def translated(self, before: Sequence[MessageIn]) -> ResponseChat:
        """
        Return the chat completion that answers it. `before` is the conversation that it continues.

        Raises ValueError, or its subclass ValidationError, when there is none.
        """
        given: dict[str, Any] = {name: value for name in _SHARED if (value := getattr(self, name)) is not None}
        messages = self.instructed(before)
        given["messages"] = [message.model_dump(mode="json", exclude_unset=True) for message in messages]
        if self.reasoning is not None and self.reasoning.effort is not None:
            given["reasoning_effort"] = self.reasoning.effort
        if self.max_output_tokens is not None:
            given["max_completion_tokens"] = self.max_output_tokens
        if self.conversation is not None:
            given["conversation_id"] = self.conversation.id
        if self.memory is not None:
            given["memory"] = self.memory.model_dump(mode="json", exclude_unset=True)
        if self.user is not None and (self.conversation is not None or self.memory is not None):
            given["user"] = self.user
        if self.wants_logprobs:
            given |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        tools, choice = self._tools()
        if tools:
            given["tools"] = [tool.translated() for tool in tools]
        if choice is not None:
            given["tool_choice"] = choice
        form = self.text.format if self.text is not None else None
        if form is not None and form.type == "json_schema":
            schema = {"name": form.name or "answer", "schema": form.schema_, "strict": form.strict}
            given["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif form is not None and form.type == "json_object":
            given["response_format"] = {"type": "json_object"}
        try:
            return ResponseChat.model_validate({**given, "response": self.document()})
        except ValidationError as error:
            raise ValueError("; ".join(one["msg"].removeprefix("Value error, ") for one in error.errors())) from None

    def _tools(self) -> tuple[list[ResponseTool], Any]:
        """The tools for the model, and its choice among them."""
        tools, chosen = self.tools or [], self.tool_choice
        if not isinstance(chosen, ChosenTools):
            return tools, chosen
        if chosen.type == "function":
            return tools, {"type": "function", "function": {"name": chosen.name}}
        allowed = {tool.name for tool in chosen.tools}
        return [tool for tool in tools if tool.name in allowed], chosen.mode


class ResponseChat(ChatRequest):
    """The chat completion of a response, as its run stores it: with the request that it answers."""

    response: dict[str, JsonValue]
