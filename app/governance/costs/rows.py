"""
The database tables of costs.

    cost_interval   what attempts cost in a quarter of an hour, by namespace, workflow and model
    budget          how much a namespace, or a workflow or model in it, may cost in a day, week or month

Quarters of an hour, because the days of every time zone begin with one.
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, Column, DateTime, Index, Numeric, text
from sqlmodel import Field, SQLModel


def _count() -> Any:
    return Field(sa_column=Column(BigInteger, nullable=False))


class CostIntervalRow(SQLModel, table=True):
    """What attempts that ended in a quarter of an hour cost."""

    __tablename__ = "cost_interval"
    __table_args__ = (Index("ix_cost_interval_namespace", "namespace", "at"),)

    #: The beginning of the interval.
    at: datetime = Field(sa_column=Column(DateTime(timezone=True), primary_key=True))
    namespace: str = Field(primary_key=True, max_length=63)
    workflow: str = Field(primary_key=True, max_length=200)
    model: str = Field(primary_key=True, max_length=200)
    attempts: int = _count()
    #: Of these, those whose cost is not known.
    unpriced: int = _count()
    #: Those that told no tokens.
    untold: int = _count()
    tokens_in: int = _count()
    tokens_cached: int = _count()
    tokens_out: int = _count()
    #: Time of devices, in microseconds.
    device_us: int = _count()
    cost: Decimal = Field(sa_column=Column(Numeric(30, 12), nullable=False))


class BudgetRow(SQLModel, table=True):
    """A budget."""

    __tablename__ = "budget"
    __table_args__ = (CheckConstraint("amount > 0", name="is_something"),)

    namespace: str = Field(primary_key=True, max_length=63)
    name: str = Field(primary_key=True, max_length=63)
    #: Only what this workflow, or this model, costs; None for all of the namespace.
    workflow: str | None = Field(default=None, max_length=200)
    model: str | None = Field(default=None, max_length=200)
    #: In the currency of the settings.
    amount: Decimal = Field(sa_column=Column(Numeric(24, 12), nullable=False))
    #: `day`, `week` or `month`.
    period: str = Field(max_length=8)
    #: New work is refused when it is used up.
    is_hard: bool
    #: Interactive work is never refused.
    spares_interactive: bool
    updated_at: datetime = Field(
        sa_column=Column(DateTime(timezone=True), nullable=False, server_default=text("now()"))
    )
