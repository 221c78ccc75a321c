"""
Messages: what one side said in a conversation, as values.

A message is never changed. Its `seq` is its place in the conversation, from 1; a deleted message leaves a gap.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID

#: The prefix of the ids of messages.
MESSAGE_PREFIX = "msg_"
#: Most characters of the name of a speaker, of a model, and of the id of a tool call.
MAX_SPEAKER, MAX_MODEL, MAX_CALL_ID = 200, 200, 200
#: Most tool calls of a message.
MAX_CALLS = 128


class MessageRole(StrEnum):
    """Who speaks."""

    SYSTEM = "system"
    DEVELOPER = "developer"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class StoredCall:
    """A tool call of a message. `arguments` is JSON, as the model wrote it."""

    id: str
    name: str
    arguments: str = "{}"

    def document(self) -> dict[str, str]:
        """The call as it is stored."""
        return {"id": self.id, "name": self.name, "arguments": self.arguments}


@dataclass(frozen=True, slots=True)
class NewMessage:
    """A message that is to be appended."""

    role: MessageRole
    content: str = ""
    #: The name of who speaks, where several share a role.
    speaker: str | None = None
    #: Tool calls; only of the assistant.
    calls: tuple[StoredCall, ...] = ()
    #: The call whose result this is; only of a tool.
    call_id: str | None = None
    #: The model that wrote it.
    model: str | None = None
    #: Its length by the tokenizer of the model that wrote or read it; None if nobody counted.
    tokens: int | None = None
    #: The run, and the step of it, that appended it.
    run_id: UUID | None = None
    step_key: str | None = None

    @property
    def written_calls(self) -> str | None:
        """Its calls as they are stored."""
        return json.dumps([call.document() for call in self.calls]) if self.calls else None

    @property
    def size(self) -> int:
        """Bytes of its content and its calls, as they are stored."""
        return len(self.content.encode()) + len(self.written_calls or "")


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message of a conversation. Its fields are those of `NewMessage`, and its place."""

    id: UUID
    conversation_id: UUID
    seq: int
    role: MessageRole
    content: str
    created_at: datetime
    speaker: str | None = None
    calls: tuple[StoredCall, ...] = ()
    call_id: str | None = None
    model: str | None = None
    tokens: int | None = None
    run_id: UUID | None = None
    step_key: str | None = None
