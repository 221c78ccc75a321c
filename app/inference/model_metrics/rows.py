"""
The table of what models did.

    model_metric   the sum of the operations of one interval, by namespace, model and kind of operation

An interval has five minutes, and after some days an hour.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Column, DateTime, Float, Index
from sqlalchemy.dialects.postgresql import ARRAY
from sqlmodel import Field, SQLModel


def _count() -> Any:
    return Field(sa_column=Column(BigInteger, nullable=False))


def _seconds(*, nullable: bool = False) -> Any:
    return Field(default=None, sa_column=Column(Float, nullable=nullable))


def _buckets() -> Any:
    return Field(sa_column=Column(ARRAY(BigInteger), nullable=False))


class ModelMetricRow(SQLModel, table=True):
    """The operations of one interval."""

    __tablename__ = "model_metric"
    __table_args__ = (Index("ix_model_metric_at", "at"), Index("ix_model_metric_namespace", "namespace", "at"))

    #: The beginning of the interval, and its length in seconds.
    at: datetime = Field(sa_column=Column(DateTime(timezone=True), primary_key=True))
    span: int = Field(primary_key=True)
    namespace: str = Field(primary_key=True, max_length=63)
    model: str = Field(primary_key=True, max_length=200)
    operation: str = Field(primary_key=True, max_length=16)
    succeeded: int = _count()
    failed: int = _count()
    cancelled: int = _count()
    tokens_in: int = _count()
    tokens_out: int = _count()
    tokens_cached: int = _count()
    writing_seconds: float = _seconds()
    latency_count: int = _count()
    latency_total: float = _seconds()
    latency_least: float | None = _seconds(nullable=True)
    latency_greatest: float | None = _seconds(nullable=True)
    latency_buckets: list[int] = _buckets()
    first_count: int = _count()
    first_total: float = _seconds()
    first_least: float | None = _seconds(nullable=True)
    first_greatest: float | None = _seconds(nullable=True)
    first_buckets: list[int] = _buckets()
