"""
The database table of the audit log.

    audit_entry    a change: when, who, what, from where, and how it ended

Entries are only added and, after their retention, removed: the database itself refuses to change one.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Column, DateTime, Index, Text, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field, SQLModel


class AuditEntryRow(SQLModel, table=True):
    """A change that was made, or refused."""

    __tablename__ = "audit_entry"
    __table_args__ = (
        Index("ix_audit_entry_namespace", "namespace", "id"),
        Index("ix_audit_entry_at", "at"),
    )

    #: Sorts by the time of the change.
    id: UUID = Field(primary_key=True)
    at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False, server_default=text("now()")))
    #: The namespace of who made it; empty for a caller without one.
    namespace: str = Field(max_length=63)
    #: The name of a key, `local`, or `command line (USER)`.
    actor: str = Field(sa_column=Column(Text, nullable=False))
    key_id: str | None = Field(default=None, sa_column=Column(Text))
    #: The route, such as `PUT /v1/workflows/{name}`, or the command.
    action: str = Field(sa_column=Column(Text, nullable=False))
    #: The names and ids in the path.
    target: dict[str, Any] = Field(sa_column=Column(JSONB, nullable=False))
    #: The body, shortened and without secrets.
    summary: str = Field(sa_column=Column(Text, nullable=False))
    #: The HTTP status; 0 for a command that succeeded, otherwise its exit code.
    status: int
    #: The address of the client; empty for a command.
    address: str = Field(sa_column=Column(Text, nullable=False))
