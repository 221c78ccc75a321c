"""Lists of conversations: of a namespace, of a user, by metadata and by time, part by part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.kernel.database import UnitOfWork
from app.kernel.postgres.filters import where
from app.memory.conversations.conversation import StoredConversation
from app.memory.conversations.store import CONVERSATION_COLUMNS


@dataclass(frozen=True, slots=True)
class ConversationFilter:
    """Which conversations are wanted; None means all."""

    namespace: str | None = None
    user: str | None = None
    #: Entries that their metadata has.
    metadata: Mapping[str, str] = field(default_factory=dict)
    #: A part of the title, in any case.
    title: str | None = None
    #: When they were created: from `since` on, before `until`.
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class ConversationPage:
    """A part of a list of conversations."""

    conversations: list[StoredConversation]
    has_more: bool


def page(
    work: UnitOfWork, wanted: ConversationFilter, *, after: UUID | None, limit: int, newest_first: bool = True
) -> ConversationPage:
    """Return conversations in the order of their creation, after one of them."""
    given: dict[str, Any] = {"limit": limit + 1}
    metadata = json.dumps(dict(wanted.metadata)) if wanted.metadata else None
    conditions = {
        "namespace": ("namespace = :namespace", wanted.namespace),
        "user": ("user_id = :user", wanted.user),
        "metadata": ("metadata @> CAST(:metadata AS jsonb)", metadata),
        "title": ("strpos(lower(title), lower(:title)) > 0", wanted.title),
        "since": ("created_at >= :since", wanted.since),
        "until": ("created_at < :until", wanted.until),
        "after": (f"id {'<' if newest_first else '>'} :after", after),
    }
    statement = text(
        f"SELECT {CONVERSATION_COLUMNS} FROM conversation {where(given, conditions)} "
        f"ORDER BY id {'DESC' if newest_first else 'ASC'} LIMIT :limit"
    )
    found = work.rows_of(StoredConversation, statement, given)
    return ConversationPage(found[:limit], len(found) > limit)
