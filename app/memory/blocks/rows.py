"""
The database tables of memory blocks.

    memory_block              a block, as it is now
    memory_block_version      what it was after each change; never rewritten, the oldest are removed in time
    memory_block_attachment   what it is attached to; there, a label has one block
    memory_block_template     sets of blocks that are created together
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Column, DateTime, ForeignKey, Index, Text, text
from sqlalchemy.dialects.postgresql import JSON
from sqlmodel import Field, SQLModel


def _instant(*, nullable: bool = True, default: str | None = None) -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if default is None else text(default))


class BlockRow(SQLModel, table=True):
    """A block."""

    __tablename__ = "memory_block"
    __table_args__ = (
        Index("ix_memory_block_namespace", "namespace", "id"),
        Index("ix_memory_block_label", "namespace", "label", "id"),
    )

    id: UUID = Field(primary_key=True)
    namespace: str = Field(max_length=63)
    label: str = Field(max_length=64)
    description: str = Field(sa_column=Column(Text, nullable=False))
    value: str = Field(sa_column=Column(Text, nullable=False))
    #: Most characters of the value.
    char_limit: int
    read_only: bool
    version: int
    archived_at: datetime | None = Field(default=None, sa_column=_instant())
    created_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
    updated_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))


class BlockVersionRow(SQLModel, table=True):
    """A version of a block."""

    __tablename__ = "memory_block_version"

    block_id: UUID = Field(
        sa_column=Column(ForeignKey("memory_block.id", ondelete="CASCADE"), primary_key=True, nullable=False)
    )
    version: int = Field(primary_key=True)
    value: str = Field(sa_column=Column(Text, nullable=False))
    description: str = Field(sa_column=Column(Text, nullable=False))
    char_limit: int
    author_kind: str = Field(max_length=16)
    author: str = Field(sa_column=Column(Text, nullable=False))
    #: The run and the step in which a model wrote it. The run may be removed before.
    run_id: str | None = Field(default=None, max_length=64)
    step: str | None = Field(default=None, sa_column=Column(Text))
    operation: str = Field(max_length=64)
    created_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))


class BlockAttachmentRow(SQLModel, table=True):
    """That a block is in the context of something."""

    __tablename__ = "memory_block_attachment"
    __table_args__ = (Index("ix_memory_block_attachment_block_id", "block_id"),)

    namespace: str = Field(max_length=63, primary_key=True)
    target_kind: str = Field(max_length=16, primary_key=True)
    #: The id of a conversation, the name of a user or an agent; empty for the namespace.
    target: str = Field(max_length=200, primary_key=True)
    #: That of the block, which never changes.
    label: str = Field(max_length=64, primary_key=True)
    block_id: UUID = Field(sa_column=Column(ForeignKey("memory_block.id", ondelete="CASCADE"), nullable=False))
    created_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))


class BlockTemplateRow(SQLModel, table=True):
    """A set of blocks that are created together."""

    __tablename__ = "memory_block_template"

    namespace: str = Field(max_length=63, primary_key=True)
    name: str = Field(max_length=64, primary_key=True)
    document: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    created_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
    updated_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
