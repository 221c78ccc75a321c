"""
The database table of limits on calls.

    call_limit    what was set for a key or a namespace instead of the values of the settings
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import CheckConstraint, Column, DateTime, Index, text
from sqlmodel import Field, SQLModel

from app.access.limits.limits import SubjectKind


class CallLimitRow(SQLModel, table=True):
    """The limits of a key or a namespace; null means the value of the settings, 0 no limit."""

    __tablename__ = "call_limit"
    __table_args__ = (
        CheckConstraint(f"kind IN ({', '.join(repr(kind.value) for kind in SubjectKind)})", name="kind_is_known"),
        Index("ix_call_limit_namespace", "namespace"),
    )

    kind: str = Field(primary_key=True, max_length=16)
    #: The id of a key, or the name of a namespace.
    id: str = Field(primary_key=True, max_length=100)
    #: The namespace that may see it: its own, or that of the key.
    namespace: str = Field(max_length=63)
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_calls: int | None = None
    waiting_interactive: int | None = None
    waiting_batch: int | None = None
    updated_at: datetime = Field(
        sa_column=Column(DateTime(timezone=True), nullable=False, server_default=text("now()"))
    )
