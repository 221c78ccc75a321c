"""The section of conversations."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from pydantic import Field

from app.kernel.sections.section import CHANGEABLE, Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration


class ConversationSettings(Section):
    """Conversations: what was said, and for how long it is kept."""

    #: A conversation is deleted when nothing was appended to it for this long, unless it or its namespace has a
    #: retention of its own. Without a value it is kept until somebody deletes it.
    retention: Annotated[Duration | None, CHANGEABLE] = None
    #: Interval of the deletion of conversations whose retention is over.
    expire_every: Annotated[Duration, durations.at_least("1s")] = timedelta(minutes=5)
    #: Most messages of a conversation.
    max_messages: int = Field(default=20_000, ge=2, le=1_000_000)
    #: Most bytes of the texts of a message.
    max_message_bytes: int = Field(default=1024 * 1024, ge=1024, le=16 * 1024 * 1024)
    #: Most recent messages of a conversation that are also kept in Redis.
    window_messages: int = Field(default=64, ge=2, le=1_000)
    #: How long they are kept there after their last use.
    window_ttl: Annotated[Duration, durations.at_least("1s")] = timedelta(hours=1)
