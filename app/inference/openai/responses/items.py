"""
The input items of a response: messages, tool calls and their results, and their translation into chat messages.

Items that only OpenAI's own tools write are refused by name. Reasoning of earlier answers is accepted and not given to
the model, as chat templates expect.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from app.inference.images import references
from app.inference.images.references import ImageOrigin
from app.inference.openai.chat import ContentPart, FunctionCallIn, ImageText, MessageIn, ToolCallIn
from app.inference.openai.generation import PlainText, RequestPart

#: Most items, and most parts of a message.
MAX_ITEMS, _MAX_PARTS = 10_000, 1_000
_ACCEPTED = "message, function_call, function_call_output and reasoning"


class InputPart(RequestPart):
    """A part of the content of a message: text, or an image."""

    type: str
    text: PlainText | None = None
    refusal: PlainText | None = None
    image_url: ImageText = None
    file_id: ImageText = None

    @model_validator(mode="after")
    def _is_known(self) -> InputPart:
        if self.type not in ("input_text", "output_text", "text", "refusal", "input_image"):
            kind = self.type[:40]
            raise ValueError(f"parts of the type {kind!r} cannot be given to a model here; use input_text, input_image")
        if self.type == "input_image":
            if (self.image_url is None) == (self.file_id is None):
                raise ValueError("a part of the type input_image has either image_url or file_id")
            if self.file_id is not None and references.parse(self.file_id).origin is not ImageOrigin.FILE:
                raise ValueError("file_id is no id of a file: file- and 32 hexadecimal digits")
        elif self.written is None:
            raise ValueError(f"a part of the type {self.type!r} has no text")
        return self

    @property
    def written(self) -> str | None:
        """Its text."""
        return self.refusal if self.type == "refusal" else self.text

    @property
    def image(self) -> str | None:
        """The reference of its image, if it is one."""
        return (self.image_url or self.file_id) if self.type == "input_image" else None


#: A text, or a list of parts.
ItemContent = Annotated[
    Annotated[PlainText, Tag("<text>")] | Annotated[list[InputPart], Field(max_length=_MAX_PARTS), Tag("<parts>")],
    Discriminator(lambda value: "<parts>" if isinstance(value, list | tuple) else "<text>"),
]


class MessageItem(RequestPart):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: ItemContent


class CallItem(RequestPart):
    """An earlier tool call of the model."""

    type: Literal["function_call"]
    call_id: Annotated[PlainText, Field(min_length=1, max_length=200)]
    name: Annotated[PlainText, Field(min_length=1, max_length=200)]
    arguments: PlainText

    @model_validator(mode="after")
    def _has_arguments(self) -> CallItem:
        try:
            FunctionCallIn(name=self.name, arguments=self.arguments).parsed()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the arguments of {self.name!r} are not a JSON object: {error}") from None
        return self


class CallOutputItem(RequestPart):
    """The result of an earlier tool call."""

    type: Literal["function_call_output"]
    call_id: Annotated[PlainText, Field(min_length=1, max_length=200)]
    output: ItemContent


class ReasoningItem(RequestPart):
    """The reasoning of an earlier answer; it has no effect."""

    type: Literal["reasoning"]


class OtherItem(RequestPart):
    """An item of another type, which is refused."""

    type: Any = None

    @model_validator(mode="after")
    def _is_refused(self) -> OtherItem:
        raise ValueError(f"items of the type {str(self.type)[:40]!r} are not supported; accepted are {_ACCEPTED}")


_TAGS = {
    "message": "<message>",
    "function_call": "<call>",
    "function_call_output": "<output>",
    "reasoning": "<reasoning>",
}


def _tag(value: Any) -> str:
    kind = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", None)
    return _TAGS.get(kind, "<other>") if isinstance(kind, str) else "<other>"


InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[CallItem, Tag("<call>")]
    | Annotated[CallOutputItem, Tag("<output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[OtherItem, Tag("<other>")],
    Discriminator(_tag),
]


def messages_of(
    items: Iterable[InputItem], before: Sequence[MessageIn], *, is_continued: bool = False
) -> list[MessageIn]:
    """
    Return the conversation: the messages `before`, and those of the items. With `is_continued` there are more before
    them, which are not known here.

    Calls that follow each other, and the text before them, are one message, as chat templates expect.

    Raises ValueError for the result of a call that the conversation does not have.
    """
    found = list(before)
    for place, item in enumerate(items):
        match item:
            case MessageItem():
                found.append(MessageIn(role=item.role, content=_content(item.content)))
            case CallItem():
                call = ToolCallIn(id=item.call_id, function=FunctionCallIn(name=item.name, arguments=item.arguments))
                last = found[-1] if found else None
                if last is not None and last.role == "assistant":
                    calls = [*(last.tool_calls or ()), call]
                    found[-1] = MessageIn(role="assistant", content=last.content, tool_calls=calls)
                else:
                    found.append(MessageIn(role="assistant", tool_calls=[call]))
            case CallOutputItem():
                if not is_continued and not any(
                    call.id == item.call_id for message in found for call in message.tool_calls or ()
                ):
                    raise ValueError(f"input[{place}] is the result of the call {item.call_id!r}, which is not there")
                found.append(MessageIn(role="tool", content=_content(item.output), tool_call_id=item.call_id))
            case _:
                pass
    return found


def _content(content: str | list[InputPart]) -> str | list[ContentPart]:
    if isinstance(content, str):
        return content
    if not any(part.image is not None for part in content):
        return "".join(part.written or "" for part in content)
    return [
        ContentPart(type="text", text=part.written or "")
        if part.image is None
        else ContentPart(type="image_url", image_url=part.image)
        for part in content
    ]
