"""
The database tables of signals.

    signal_series       a signal with one set of labels
    signal_point        its observations in a minute, an hour or a day, added up
    signal_group        all series of a signal that share some labels
    signal_group_point  the observations of a group, as those of a series
    signal_watermark    up to when a reader has read, and up to when points are rolled up

The labels are stored once, in the series or the group: a point is small.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Column, DateTime, Identity, Index, Integer, SmallInteger, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field, SQLModel

#: Minutes of a point of each resolution.
MINUTE, HOUR, DAY = 1, 60, 1440


def _label(most: int) -> Any:
    return Field(default="", max_length=most, sa_column_kwargs={"server_default": ""})


class SignalSeriesRow(SQLModel, table=True):
    """A signal with one set of labels."""

    __tablename__ = "signal_series"
    __table_args__ = (
        UniqueConstraint(
            *("signal", "model", "pool", "host", "device", "namespace", "priority"), name="uq_signal_series_labels"
        ),
    )

    id: int | None = Field(default=None, sa_column=Column(Integer, Identity(always=True), primary_key=True))
    signal: str = Field(max_length=64)
    model: str = _label(200)
    pool: str = _label(200)
    host: str = _label(200)
    device: str = _label(200)
    namespace: str = _label(200)
    priority: str = _label(200)


class SignalPointRow(SQLModel, table=True):
    """The observations of a series in a minute, an hour or a day."""

    __tablename__ = "signal_point"
    __table_args__ = (Index("ix_signal_point_at", "resolution", "at"),)

    series_id: int = Field(primary_key=True, foreign_key="signal_series.id", ondelete="CASCADE")
    #: Minutes: 1, 60 or 1440.
    resolution: int = Field(sa_column=Column(SmallInteger, primary_key=True))
    #: The beginning of the minute, hour or day, in UTC.
    at: datetime = Field(sa_column=Column(DateTime(timezone=True), primary_key=True))
    observations: int = Field(sa_column=Column(BigInteger, nullable=False))
    weight: float
    total: float
    least: float | None = None
    greatest: float | None = None
    #: Observations by bucket, of a distribution.
    histogram: dict[str, int] | None = Field(default=None, sa_column=Column(JSONB(none_as_null=True)))


class SignalGroupRow(SQLModel, table=True):
    """All series of a signal that share some labels."""

    __tablename__ = "signal_group"
    __table_args__ = (
        UniqueConstraint(
            *("signal", "kept", "model", "pool", "host", "device", "namespace", "priority"),
            name="uq_signal_group_labels",
        ),
    )

    id: int | None = Field(default=None, sa_column=Column(Integer, Identity(always=True), primary_key=True))
    signal: str = Field(max_length=64)
    #: The labels that the series share, with commas; the others are empty here.
    kept: str = Field(max_length=64)
    model: str = _label(200)
    pool: str = _label(200)
    host: str = _label(200)
    device: str = _label(200)
    namespace: str = _label(200)
    priority: str = _label(200)


class SignalGroupPointRow(SQLModel, table=True):
    """The observations of a group in a minute, an hour or a day."""

    __tablename__ = "signal_group_point"
    __table_args__ = (Index("ix_signal_group_point_at", "resolution", "at"),)

    group_id: int = Field(primary_key=True, foreign_key="signal_group.id", ondelete="CASCADE")
    #: Minutes: 1, 60 or 1440.
    resolution: int = Field(sa_column=Column(SmallInteger, primary_key=True))
    #: The beginning of the minute, hour or day, in UTC.
    at: datetime = Field(sa_column=Column(DateTime(timezone=True), primary_key=True))
    observations: int = Field(sa_column=Column(BigInteger, nullable=False))
    weight: float
    total: float
    least: float | None = None
    greatest: float | None = None
    #: Observations by bucket, of a distribution.
    histogram: dict[str, int] | None = Field(default=None, sa_column=Column(JSONB(none_as_null=True)))


class SignalWatermarkRow(SQLModel, table=True):
    """How far a reader has come."""

    __tablename__ = "signal_watermark"

    name: str = Field(primary_key=True, max_length=64)
    #: All before it is read.
    at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False, server_default=text("now()")))
    #: Further state of the reader, such as counters that it saw last.
    state: dict[str, Any] = Field(sa_column=Column(JSONB, nullable=False, server_default=text("'{}'")))
