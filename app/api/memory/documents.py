"""Bodies and answers of the resource `conversations`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.files.file import shown_id
from app.inference.openai.chat import MessageIn, ToolCallIn
from app.inference.openai.generation import PlainText, RequestPart
from app.inference.openai.responses.items import InputItem
from app.kernel.units import durations
from app.kernel.units.durations import Duration
from app.memory.conversations import export
from app.memory.conversations.conversation import (
    CONVERSATION_PREFIX,
    MAX_METADATA,
    MAX_METADATA_NAME,
    MAX_METADATA_TEXT,
    MAX_TITLE,
    MAX_USER,
    StoredConversation,
)
from app.memory.conversations.hot import RoleCounts
from app.memory.conversations.message import (
    MAX_CALL_ID,
    MAX_MODEL,
    MAX_SPEAKER,
    MessageRole,
    NewMessage,
    StoredCall,
    StoredMessage,
)

#: Most items or messages of a request.
MAX_ITEMS = 1_000

Metadata = Annotated[
    dict[
        Annotated[PlainText, Field(max_length=MAX_METADATA_NAME)],
        Annotated[PlainText, Field(max_length=MAX_METADATA_TEXT)],
    ],
    Field(max_length=MAX_METADATA),
]
Title = Annotated[PlainText, Field(max_length=MAX_TITLE)]
ModelName = Annotated[PlainText, Field(min_length=1, max_length=MAX_MODEL)]
UserName = Annotated[PlainText, Field(min_length=1, max_length=MAX_USER)]
#: A hundred years: a limit that no arithmetic with instants passes.
Retention = Annotated[Duration, Field(ge=timedelta(seconds=1), le=timedelta(days=36_500))]


class ConversationIn(BaseModel):
    """A new conversation. Unknown fields are ignored, as clients of OpenAI's API expect."""

    model_config = ConfigDict(extra="ignore")

    items: Annotated[list[InputItem], Field(max_length=MAX_ITEMS)] | None = None
    metadata: Metadata | None = None
    user: UserName | None = Field(default=None, description="whose long-term memory it shares")
    title: Title | None = None
    model: ModelName | None = Field(default=None, description="the model that answers, unless a request names another")
    retention: Retention | None = Field(
        default=None,
        description="it is deleted when nothing was appended for this long; by default that of its namespace",
        examples=["30d"],
    )


class ConversationPatch(BaseModel):
    """What changes of a conversation: the fields that are given."""

    model_config = ConfigDict(extra="ignore")

    metadata: Metadata | None = None
    title: Title | None = None
    model: ModelName | None = None
    retention: Retention | None = None

    def given(self) -> dict[str, Any]:
        """The fields that were given; metadata of null is none."""
        found = {name: getattr(self, name) for name in self.model_fields_set}
        return {**found, "metadata": found["metadata"] or {}} if "metadata" in found else found


class ItemsIn(BaseModel):
    """Items that are appended, next to each other."""

    model_config = ConfigDict(extra="ignore")

    items: Annotated[list[InputItem], Field(min_length=1, max_length=MAX_ITEMS)]


class AppendedMessageIn(MessageIn):
    """A message in the form of chat completions, with what is known of its origin."""

    name: Annotated[PlainText, Field(max_length=MAX_SPEAKER)] | None = None
    tool_call_id: Annotated[PlainText, Field(max_length=MAX_CALL_ID)] | None = None
    model: ModelName | None = None
    tokens: int | None = Field(default=None, ge=0, le=100_000_000)

    @model_validator(mode="after")
    def _belongs_to_a_call(self) -> AppendedMessageIn:
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("a message has a tool_call_id if, and only if, its role is tool")
        return self

    def message(self) -> NewMessage:
        """The message."""
        content = self.content if isinstance(self.content, str) else "".join(p.text or "" for p in self.content or ())
        return NewMessage(
            MessageRole(self.role),
            content,
            self.name,
            tuple(_call(call) for call in self.tool_calls or ()),
            self.tool_call_id,
            self.model,
            self.tokens,
        )


class MessagesIn(RequestPart):
    """Messages that are appended, next to each other."""

    messages: Annotated[list[AppendedMessageIn], Field(min_length=1, max_length=MAX_ITEMS)]


class ConversationForkIn(BaseModel):
    """Where a conversation forks."""

    model_config = ConfigDict(extra="forbid")

    at: str | int | None = Field(
        default=None, description="the id or the number of the last message of the fork; by default the last one"
    )
    title: Title | None = None
    metadata: Metadata | None = None


class RoleCountsOut(BaseModel):
    """What one role has said."""

    messages: int
    tokens: int = Field(description="of the messages whose tokens were counted")


class ConversationOut(BaseModel):
    """A conversation. All but `id`, `object`, `created_at` and `metadata` is Arriero's."""

    id: str = Field(examples=["conv_0199a3c2d6f47a0b8c1d2e3f4a5b6c7d"])
    object: Literal["conversation"] = "conversation"
    created_at: int = Field(description="seconds since 1970")
    metadata: Mapping[str, str]
    namespace: str
    user: str | None
    title: str | None
    model: str | None
    retention: str | None = Field(description="its own; null for that of its namespace")
    messages: int
    bytes: int = Field(description="of the texts of its messages")
    updated_at: int = Field(description="when a message was last appended")
    forked_from: str | None
    forked_at: int | None = Field(description="the number of the last message that it shares with `forked_from`")
    roles: Mapping[MessageRole, RoleCountsOut] | None = Field(
        default=None, description="what each role has said; not in lists"
    )


class ConversationListOut(BaseModel):
    """A part of the list of conversations."""

    object: Literal["list"] = "list"
    data: list[ConversationOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ItemListOut(BaseModel):
    """A part of the items of a conversation, each in the form of OpenAI's API."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ConversationMessageOut(BaseModel):
    """A message in the form of chat completions, with its place and what is known of its origin."""

    id: str
    seq: int
    role: MessageRole
    content: str
    created_at: str
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    model: str | None = None
    tokens: int | None = None
    run_id: str | None = None
    step: str | None = None


class MessageListOut(BaseModel):
    """A part of the messages of a conversation."""

    object: Literal["list"] = "list"
    data: list[ConversationMessageOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


def out(found: StoredConversation, counters: Mapping[MessageRole, RoleCounts] | None = None) -> ConversationOut:
    """Return a conversation in the form of the API."""
    retention = found.retention
    counted = {} if counters is None else counters
    roles = {role: RoleCountsOut(messages=one.messages, tokens=one.tokens) for role, one in counted.items()}
    return ConversationOut(
        id=shown_id(found.id, CONVERSATION_PREFIX),
        created_at=int(found.created_at.timestamp()),
        metadata=found.metadata,
        namespace=found.namespace,
        user=found.user,
        title=found.title,
        model=found.model,
        retention=None if retention is None else durations.show(retention),
        messages=found.messages,
        bytes=found.bytes,
        updated_at=int(found.updated_at.timestamp()),
        forked_from=None if found.forked_from is None else shown_id(found.forked_from, CONVERSATION_PREFIX),
        forked_at=found.forked_at,
        roles=None if counters is None else roles,
    )


def message_list(messages: list[StoredMessage], *, has_more: bool) -> MessageListOut:
    """Return messages in the form of the API."""
    data = [ConversationMessageOut.model_validate(export.document(message)) for message in messages]
    first_id, last_id = (data[0].id, data[-1].id) if data else (None, None)
    return MessageListOut(data=data, first_id=first_id, last_id=last_id, has_more=has_more)


def item_list(items: list[dict[str, Any]], *, has_more: bool) -> ItemListOut:
    """Return items in the form of the API."""
    first_id, last_id = (items[0]["id"], items[-1]["id"]) if items else (None, None)
    return ItemListOut(data=items, first_id=first_id, last_id=last_id, has_more=has_more)


def _call(call: ToolCallIn) -> StoredCall:
    return StoredCall(call.id, call.function.name, call.function.arguments)
