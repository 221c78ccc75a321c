"""A chat completion: the request, and its translation for an engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from app.inference.images import references
from app.inference.openai.generation import MAX_TOP_LOGPROBS, NO_LIMIT, GenerationRequest, PlainText, RequestPart
from app.inference.requests import ChatMessage, GenerateRequest, ImageInput, NamedTool, Tool, ToolCall
from app.workflows.language.memory_options import MemoryOptions
from app.workflows.language.template_arguments import ReasoningLevel, TemplateArguments

#: Most messages, parts of a message, tools, and tool calls in a message.
_MAX_MESSAGES, _MAX_PARTS, _MAX_TOOLS = 10_000, 1_000, 128
#: Fields of OpenAI's API that no local model can honour, with what to do instead.
_REFUSED: Mapping[str, str] = {
    "functions": "`tools`",
    "function_call": "`tool_choice`",
    "audio": "no audio: models here read and write text, and read images",
    "moderation": "no moderation: send the texts to a model for it",
    "web_search_options": "no web search: offer a tool instead",
}


def _image_text(value: Any) -> Any:
    """Return the reference of an image, which OpenAI's API puts into an object with `detail`."""
    return value.get("url") if isinstance(value, dict) else value


def names_image(text: str | None, info: ValidationInfo) -> str | None:
    """Validate the reference of a part that is an image; in other parts the field has no meaning."""
    if text is not None and info.data.get("type") in ("image_url", "input_image"):
        references.parse(text)
    return text


#: What names an image: a data URL, the id of a file, or an http(s) URL. It is not read here.
ImageText = Annotated[PlainText | None, BeforeValidator(_image_text), AfterValidator(names_image)]


class ContentPart(RequestPart):
    """A part of the content of a message: text, or an image."""

    type: str
    text: PlainText | None = None
    image_url: ImageText = None

    @model_validator(mode="after")
    def _is_known(self) -> ContentPart:
        if self.type not in ("text", "refusal", "image_url") or (self.type == "text" and self.text is None):
            kind = self.type[:40]
            raise ValueError(f"parts of the type {kind!r} cannot be given to a model here; use text or image_url")
        if self.type == "image_url" and self.image_url is None:
            raise ValueError(f"a part of the type image_url has no image_url; accepted: {references.ACCEPTED}")
        return self

    @property
    def image(self) -> str | None:
        """The reference of its image, if it is one."""
        return self.image_url if self.type == "image_url" else None


#: A text, or a list of parts.
Content = Annotated[
    Annotated[PlainText, Tag("text")] | Annotated[list[ContentPart], Field(max_length=_MAX_PARTS), Tag("parts")],
    Discriminator(lambda value: "parts" if isinstance(value, list | tuple) else "text"),
]


class FunctionCallIn(RequestPart):
    """The function of an earlier tool call, with its arguments as JSON in a text."""

    name: Annotated[PlainText, Field(min_length=1, max_length=200)]
    arguments: PlainText = "{}"

    def parsed(self) -> Mapping[str, Any]:
        """The arguments. Raises ValueError when they are no JSON object."""
        value = json.loads(self.arguments or "{}")
        if not isinstance(value, dict):
            raise ValueError("the arguments are not a JSON object")  # noqa: TRY004 pydantic expects a ValueError
        return value


class ToolCallIn(RequestPart):
    """An earlier tool call of the assistant."""

    id: PlainText = ""
    function: FunctionCallIn

    @model_validator(mode="after")
    def _has_arguments(self) -> ToolCallIn:
        try:
            self.function.parsed()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the arguments of {self.function.name!r} are not a JSON object: {error}") from None
        return self


class MessageIn(RequestPart):
    """One message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCallIn], Field(max_length=_MAX_TOOLS)] | None = None
    #: Who speaks, and the call that a result answers: kept with a conversation, and not given to the model.
    name: Annotated[PlainText, Field(max_length=200)] | None = None
    tool_call_id: Annotated[PlainText, Field(max_length=200)] | None = None

    @model_validator(mode="after")
    def _has_content(self) -> MessageIn:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("the message has no content; only an assistant message with tool calls may have none")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only assistant messages can have tool_calls")
        if self.has_images and self.role not in ("user", "tool"):
            raise ValueError(f"messages with the role {self.role} have no images; those of the user can")
        return self

    @property
    def has_images(self) -> bool:
        """Whether a part of it is an image."""
        return not isinstance(self.content, str) and any(part.image is not None for part in self.content or ())

    def translated(self, place: str = "") -> ChatMessage:
        """The message for a chat template; `place` is its field in the request."""
        images: list[ImageInput] = []
        if isinstance(self.content, str):
            content = self.content
        else:
            content = ""
            for number, part in enumerate(self.content or ()):
                if part.image is not None:
                    images.append(ImageInput(len(content), part.image, f"{place}.content[{number}].image_url"))
                else:
                    content += part.text or ""
        calls = tuple(ToolCall(call.function.name, call.function.parsed()) for call in self.tool_calls or ())
        role = "system" if self.role == "developer" else self.role
        return ChatMessage(role, content, calls, tuple(images))


class FunctionIn(RequestPart):
    """A function that the model may call."""

    name: Annotated[PlainText, Field(min_length=1, max_length=200)]
    description: PlainText | None = None
    parameters: dict[str, JsonValue] | None = None


class ToolIn(RequestPart):
    """A tool; only functions exist here."""

    type: Literal["function"] = "function"
    function: FunctionIn


class ChosenFunction(RequestPart):
    """The name of a function."""

    name: PlainText


class ToolChoice(RequestPart):
    """The one tool that the model must call."""

    type: Literal["function"] = "function"
    function: ChosenFunction


#: A mode, or the one tool.
AnyToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")] | Annotated[ToolChoice, Tag("tool")],
    Discriminator(lambda value: "tool" if isinstance(value, dict | ToolChoice) else "mode"),
]


class JsonSchemaFormat(RequestPart):
    """A JSON Schema for the answer."""

    name: PlainText | None = None
    schema_: dict[str, JsonValue] = Field(default={}, alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestPart):
    """The form of the answer. A grammar forces it, whether or not `strict` is set."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self

    def schema_of_answer(self) -> Mapping[str, Any] | None:
        """The JSON Schema of the answer, or None for free text."""
        match self.type:
            case "json_schema":
                assert self.json_schema is not None
                return self.json_schema.schema_
            case "json_object":
                return {"type": "object"}
            case _:
                return None


class ChatRequest(GenerationRequest):
    """A request for chat completions."""

    messages: Annotated[list[MessageIn], Field(min_length=1, max_length=_MAX_MESSAGES)]
    max_tokens: int | None = Field(default=None, ge=1, le=NO_LIMIT)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=NO_LIMIT)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolIn], Field(max_length=_MAX_TOOLS)] | None = None
    tool_choice: AnyToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    #: An extension, as responses have it: `auto` leaves out the oldest messages that do not fit the context.
    truncation: Literal["auto", "disabled"] | None = None
    #: Extensions: the conversation that the messages continue, whose long-term memory is used, and what of both goes
    #: into the prompt.
    conversation_id: Annotated[PlainText, Field(min_length=1, max_length=200)] | None = None
    user: Annotated[PlainText, Field(max_length=200)] | None = None
    memory: MemoryOptions | None = None
    #: Whether, and how much, a model thinks whose template has a variable for that.
    reasoning_effort: ReasoningLevel | None = None
    #: An extension, as in vLLM and llama.cpp: variables for the chat template.
    chat_template_kwargs: TemplateArguments | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for name, instead in _REFUSED.items():
                if given.get(name) is not None:
                    raise ValueError(f"{name!r} is not supported; use {instead}")
        return given

    @field_validator("response_format")
    @classmethod
    def _text_is_none(cls, given: ResponseFormat | None) -> ResponseFormat | None:
        return None if given is not None and given.type == "text" else given

    @model_validator(mode="after")
    def _fits(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.tools and self.response_format is not None:
            raise ValueError("tools and response_format cannot be used together; at most one is accepted")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice is set, but the request has no tools")
        if self.is_assembled and self.has_images:
            raise ValueError("images cannot be sent with conversation_id or memory: conversations keep texts only")
        if self.is_assembled and (self.n or 1) > 1:
            raise ValueError("n must be 1 with conversation_id or memory: one answer continues a conversation")
        return self

    @property
    def is_assembled(self) -> bool:
        """Whether its prompt is put together of more than its messages."""
        return self.conversation_id is not None or self.memory is not None

    @property
    def has_images(self) -> bool:
        """Whether a message has an image."""
        return any(message.has_images for message in self.messages)

    def translated(self) -> GenerateRequest:
        """The request for an engine."""
        limit = self.max_completion_tokens or self.max_tokens
        choice: Any = self.tool_choice or "auto"
        if isinstance(choice, ToolChoice):
            choice = NamedTool(choice.function.name)
        return GenerateRequest(
            messages=tuple(message.translated(f"messages[{at}]") for at, message in enumerate(self.messages)),
            max_tokens=limit or NO_LIMIT,
            fits_context=limit is None,
            truncates=self.truncation == "auto",
            keeps_cut=True,
            sampling=self.sampling(),
            stop=self.stops,
            schema=self.response_format.schema_of_answer() if self.response_format is not None else None,
            priority=self.priority,
            n=self.n or 1,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            tools=tuple(_tool(tool.function) for tool in self.tools or ()),
            tool_choice=choice if self.tools else "auto",
            parallel_calls=self.parallel_tool_calls is not False,
            template_arguments=self.chat_template_kwargs or {},
            reasoning_effort=self.reasoning_effort,
        )


def _tool(function: FunctionIn) -> Tool:
    parameters = function.parameters or {"type": "object", "properties": {}}
    return Tool(function.name, function.description or "", parameters)
