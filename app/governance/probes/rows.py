"""
The database table of probes.

    pool_probe   the last probe of each pool
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, Column, DateTime, Float, Text, text
from sqlmodel import Field, SQLModel

from app.governance.probes.probe import ProbeOutcome

_OUTCOMES = ", ".join(f"'{one.value}'" for one in ProbeOutcome)


def _instant(*, nullable: bool = True) -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if nullable else text("now()"))


class PoolProbeRow(SQLModel, table=True):
    """The last probe of a pool."""

    __tablename__ = "pool_probe"
    __table_args__ = (CheckConstraint(f"outcome IN ({_OUTCOMES})", name="outcome_is_known"),)

    pool_id: UUID = Field(primary_key=True, foreign_key="pool.id", ondelete="CASCADE")
    sent_at: datetime = Field(sa_column=_instant(nullable=False))
    #: None until the first one has ended.
    outcome: str | None = Field(default=None, max_length=16)
    ended_at: datetime | None = Field(default=None, sa_column=_instant())
    #: Until its token.
    seconds: float | None = Field(default=None, sa_column=Column(Float))
    #: Why it is not well.
    detail: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=""))
    #: Failures in a row.
    failures: int = Field(default=0, sa_column_kwargs={"server_default": "0"})
