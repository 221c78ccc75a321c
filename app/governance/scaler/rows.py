"""The table of the scaler: what it remembers of a class, and the request that its receiver has not accepted yet."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Column, DateTime, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field, SQLModel


class ScalerClassRow(SQLModel, table=True):
    """A class of hosts."""

    __tablename__ = "scaler_class"

    name: str = Field(primary_key=True, max_length=40)
    state: dict[str, Any] = Field(sa_column=Column(JSONB, nullable=False))
    #: The last decision, for views.
    decision: dict[str, Any] = Field(sa_column=Column(JSONB, nullable=False))
    #: The newest request, until its receiver has accepted it.
    pending: dict[str, Any] | None = Field(default=None, sa_column=Column(JSONB(none_as_null=True)))
    #: A worker sends the request until then; after a failure, when it is sent again.
    sending_until: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    #: Failed attempts for the pending request, and why the last one failed.
    attempts: int = Field(default=0)
    error: str = Field(default="", max_length=1000)
    asked_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    updated_at: datetime = Field(
        sa_column=Column(DateTime(timezone=True), nullable=False, server_default=text("now()"))
    )
