"""
The database tables of files.

    file          what is known of a file beside its content
    file_chunk    its content, in chunks of `CHUNK_BYTES`; the last one may be shorter

A file without a hash is being written. It expires like any other, so what a process left behind is removed.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, Column, DateTime, Index, Text, text
from sqlalchemy.dialects.postgresql import BYTEA
from sqlmodel import Field, SQLModel

#: Bytes of a chunk. It is stored uncompressed, so that a part of it is read without reading all of it.
CHUNK_BYTES = 256 * 1024


def _instant(*, nullable: bool = True, default: str | None = None) -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if default is None else text(default))


class FileRow(SQLModel, table=True):
    """A file."""

    __tablename__ = "file"
    __table_args__ = (
        # The list of a namespace, and the sum of its bytes.
        Index("ix_file_namespace", "namespace", "id", postgresql_include=["bytes"]),
        Index("ix_file_expires", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
    )

    id: UUID = Field(primary_key=True)
    namespace: str = Field(max_length=64)
    filename: str = Field(sa_column=Column(Text, nullable=False))
    purpose: str = Field(max_length=32)
    #: Bytes that are stored so far.
    bytes: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    sha256: str | None = Field(default=None, max_length=64)
    created_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
    expires_at: datetime | None = Field(default=None, sa_column=_instant())


class FileChunkRow(SQLModel, table=True):
    """A part of the content of a file."""

    __tablename__ = "file_chunk"

    file_id: UUID = Field(primary_key=True, foreign_key="file.id", ondelete="CASCADE")
    #: Its place, from 0.
    number: int = Field(primary_key=True)
    data: bytes = Field(sa_column=Column(BYTEA, nullable=False))
