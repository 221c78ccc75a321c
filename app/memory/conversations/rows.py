"""
The database tables of conversations.

    conversation            what is known of one beside its messages; its row is the lock for appending
    conversation_message    what was said; a row is never updated
    conversation_run        runs that were given messages of a conversation, whether they appended any or not
    conversation_retention  how long namespaces keep their conversations
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, Column, DateTime, Index, Interval, Text, text
from sqlalchemy.dialects.postgresql import JSON, JSONB
from sqlmodel import Field, SQLModel

from app.memory.conversations.message import MessageRole

_ROLES = ", ".join(f"'{role.value}'" for role in MessageRole)


def _instant() -> Any:
    return Column(DateTime(timezone=True), nullable=False, server_default=text("now()"))


class ConversationRow(SQLModel, table=True):
    """A conversation. Its fields are those of `StoredConversation`."""

    __tablename__ = "conversation"
    __table_args__ = (
        # Lists: those of a namespace, of a user, and by metadata.
        Index("ix_conversation_namespace", "namespace", "id"),
        Index("ix_conversation_user", "namespace", "user_id", "id", postgresql_where=text("user_id IS NOT NULL")),
        Index(
            "ix_conversation_metadata",
            "metadata",
            postgresql_using="gin",
            postgresql_ops={"metadata": "jsonb_path_ops"},
        ),
        # Retention: of the namespace, and of its own.
        Index("ix_conversation_idle", "namespace", "updated_at", postgresql_where=text("retention IS NULL")),
        # What is new since an instant: extraction of memories.
        Index("ix_conversation_updated", "updated_at"),
        Index("ix_conversation_expires", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
    )

    id: UUID = Field(primary_key=True)
    namespace: str = Field(max_length=64)
    #: Not `user`: in SQL that is the user of the database.
    user_id: str | None = Field(default=None, max_length=200)
    title: str | None = Field(default=None, sa_column=Column(Text))
    metadata_: dict[str, str] = Field(sa_column=Column("metadata", JSONB, nullable=False))
    model: str | None = Field(default=None, max_length=200)
    retention: timedelta | None = Field(default=None, sa_column=Column(Interval))
    next_seq: int = Field(default=1, sa_column=Column(BigInteger, nullable=False))
    revision: int = 0
    messages: int = 0
    bytes: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    forked_from: UUID | None = None
    forked_at: int | None = Field(default=None, sa_column=Column(BigInteger))
    created_at: datetime = Field(sa_column=_instant())
    updated_at: datetime = Field(sa_column=_instant())
    #: `updated_at` and its own retention; none without one.
    expires_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))


class ConversationMessageRow(SQLModel, table=True):
    """A message. Its fields are those of `StoredMessage`."""

    __tablename__ = "conversation_message"
    __table_args__ = (
        CheckConstraint(f"role IN ({_ROLES})", name="role_is_known"),
        Index("uq_conversation_message_id", "id", unique=True),
    )

    conversation_id: UUID = Field(primary_key=True, foreign_key="conversation.id", ondelete="CASCADE")
    seq: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    id: UUID
    role: str = Field(max_length=16)
    content: str = Field(sa_column=Column(Text, nullable=False))
    speaker: str | None = Field(default=None, max_length=200)
    calls: list[dict[str, str]] | None = Field(default=None, sa_column=Column(JSON))
    call_id: str | None = Field(default=None, max_length=200)
    model: str | None = Field(default=None, max_length=200)
    tokens: int | None = None
    #: The run may be removed before.
    run_id: UUID | None = None
    step_key: str | None = Field(default=None, sa_column=Column(Text))
    created_at: datetime = Field(sa_column=_instant())


class ConversationRunRow(SQLModel, table=True):
    """That a run holds texts of a conversation. The run may be removed before."""

    __tablename__ = "conversation_run"

    conversation_id: UUID = Field(primary_key=True, foreign_key="conversation.id", ondelete="CASCADE")
    run_id: UUID = Field(primary_key=True)


class ConversationRetentionRow(SQLModel, table=True):
    """How long a namespace keeps a conversation after its last message; without a time, for ever."""

    __tablename__ = "conversation_retention"

    namespace: str = Field(primary_key=True, max_length=64)
    retention: timedelta | None = Field(default=None, sa_column=Column(Interval))
    updated_at: datetime = Field(sa_column=_instant())
