"""
The database tables of the personal context.

    context_document   a document of a user, or of a whole namespace
    context_file       a file of the watched folder: its state when it was read, and what is wrong with it

A document of a file has a row in both; one that was stored over the API has none in `context_file`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, Column, DateTime, ForeignKey, Index, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import JSON
from sqlmodel import Field, SQLModel


def _instant(*, nullable: bool = True, default: str | None = None) -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if default is None else text(default))


class ContextDocumentRow(SQLModel, table=True):
    """A document."""

    __tablename__ = "context_document"
    __table_args__ = (UniqueConstraint("namespace", "user_name", "kind", "name"),)

    id: UUID = Field(primary_key=True)
    namespace: str = Field(max_length=63)
    #: Empty for a document of the whole namespace.
    user_name: str = Field(max_length=200)
    kind: str = Field(max_length=16)
    name: str = Field(max_length=100)
    format: str = Field(max_length=16)
    title: str = Field(sa_column=Column(Text, nullable=False))
    #: As it was written, with its front matter.
    content: str = Field(sa_column=Column(Text, nullable=False))
    tags: list[str] = Field(sa_column=Column(JSON, nullable=False))
    #: It is in each prompt, whatever the prompt is about.
    always: bool
    #: `api` or `folder`.
    source: str = Field(max_length=16)
    #: Rises with each change, from 1.
    version: int
    created_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
    updated_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))


class ContextFileRow(SQLModel, table=True):
    """A file of the watched folder."""

    __tablename__ = "context_file"
    __table_args__ = (
        Index("ix_context_file_namespace", "namespace", "user_name"),
        Index("ix_context_file_document_id", "document_id"),
    )

    #: Its path in the folder.
    path: str = Field(sa_column=Column(Text, primary_key=True, nullable=False))
    namespace: str = Field(max_length=63)
    user_name: str = Field(max_length=200)
    #: Its state when it was read.
    size: int = Field(sa_column=Column(BigInteger, nullable=False))
    mtime_ns: int = Field(sa_column=Column(BigInteger, nullable=False))
    sha256: str = Field(max_length=64)
    #: Why it is no document; empty when it is one.
    problem: str = Field(sa_column=Column(Text, nullable=False))
    document_id: UUID | None = Field(
        default=None, sa_column=Column(ForeignKey("context_document.id", ondelete="CASCADE"))
    )
    read_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
