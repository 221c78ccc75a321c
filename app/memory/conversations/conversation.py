"""
Conversations, without their messages.

A conversation belongs to a namespace. Those of one user of it share long-term memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

from app.kernel.errors import Conflict

#: The prefix of the ids of conversations.
CONVERSATION_PREFIX = "conv_"
#: Most characters of a title and of the name of a user.
MAX_TITLE, MAX_USER = 500, 200
#: Most entries of metadata, and most characters of their names and texts, as in OpenAI's API.
MAX_METADATA, MAX_METADATA_NAME, MAX_METADATA_TEXT = 16, 64, 512


@dataclass(frozen=True, slots=True)
class NewConversation:
    """What is said of a new conversation."""

    namespace: str
    #: Whose long-term memory it shares; None for that of the namespace.
    user: str | None = None
    title: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    #: The model that answers, unless a request names another one.
    model: str | None = None
    #: It is deleted when nothing was appended for this long; None for the retention of its namespace.
    retention: timedelta | None = None


@dataclass(frozen=True, slots=True)
class StoredConversation:
    """A conversation."""

    id: UUID
    namespace: str
    user: str | None
    title: str | None
    metadata: Mapping[str, str]
    model: str | None
    retention: timedelta | None
    #: The `seq` of the next message.
    next_seq: int
    #: Rises when a message is deleted: what was derived from the messages before is then no longer valid.
    revision: int
    #: How many messages there are, and the bytes of their texts.
    messages: int
    bytes: int
    #: The conversation that it is a fork of, and the `seq` of the last message that both have.
    forked_from: UUID | None
    forked_at: int | None
    created_at: datetime
    #: When a message was last appended.
    updated_at: datetime


class ConversationFull(Conflict):
    """A conversation has no room for further messages."""

    def __init__(self, shown: str, limit: int) -> None:
        self.limit = limit
        super().__init__(
            f"the conversation {shown} can have at most {limit} messages (setting conversations.max_messages); "
            "start another one, or fork it at a message"
        )
