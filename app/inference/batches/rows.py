"""
The database table of batches.

A batch has the id of its run. Its row outlives the run, whose items are removed when the results are in files.
One process at a time works on a batch: the one that holds its lease.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, Column, DateTime, Index, text
from sqlalchemy.dialects.postgresql import JSON
from sqlmodel import Field, SQLModel

from app.inference.batches.batch import OPEN_BATCHES, BatchState

_OPEN = ", ".join(f"'{state.value}'" for state in BatchState if state in OPEN_BATCHES)


def _instant(*, nullable: bool = True, default: str | None = None) -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if default is None else text(default))


class BatchRow(SQLModel, table=True):
    """A batch. Its fields are those of `StoredBatch`."""

    __tablename__ = "batch"
    __table_args__ = (
        CheckConstraint(f"state IN ({', '.join(repr(state.value) for state in BatchState)})", name="state_is_known"),
        Index("ix_batch_namespace", "namespace", "id"),
        Index("ix_batch_open", "id", postgresql_where=text(f"state IN ({_OPEN})")),
    )

    id: UUID = Field(primary_key=True)
    namespace: str = Field(max_length=64)
    state: str = Field(max_length=16)
    endpoint: str = Field(max_length=64)
    input_file_id: UUID
    completion_window: str = Field(max_length=32)
    metadata_: dict[str, str] | None = Field(default=None, sa_column=Column("metadata", JSON))
    ending: str | None = Field(default=None, max_length=16)
    keep_s: int | None = None
    output_file_id: UUID | None = None
    error_file_id: UUID | None = None
    errors: list[dict[str, Any]] | None = Field(default=None, sa_column=Column(JSON))
    models: list[str] | None = Field(default=None, sa_column=Column(JSON))
    total: int = 0
    completed: int = 0
    failed: int = 0
    #: The process that works on it, and until when.
    owner: str | None = Field(default=None, max_length=200)
    lease_until: datetime | None = Field(default=None, sa_column=_instant())
    created_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
    expires_at: datetime = Field(sa_column=_instant(nullable=False))
    in_progress_at: datetime | None = Field(default=None, sa_column=_instant())
    finalizing_at: datetime | None = Field(default=None, sa_column=_instant())
    completed_at: datetime | None = Field(default=None, sa_column=_instant())
    failed_at: datetime | None = Field(default=None, sa_column=_instant())
    expired_at: datetime | None = Field(default=None, sa_column=_instant())
    cancelling_at: datetime | None = Field(default=None, sa_column=_instant())
    cancelled_at: datetime | None = Field(default=None, sa_column=_instant())


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """A batch."""

    id: UUID
    namespace: str
    state: str
    endpoint: str
    input_file_id: UUID
    #: As the client wrote it.
    completion_window: str
    metadata: Mapping[str, str] | None
    #: What it becomes at its end, where that is decided: `expired` or `cancelled`.
    ending: str | None
    #: Seconds for which its results are kept; None for the setting.
    keep_s: int | None
    output_file_id: UUID | None
    error_file_id: UUID | None
    #: What is wrong with its file.
    errors: list[dict[str, Any]] | None
    #: The names of its models.
    models: list[str] | None
    total: int
    completed: int
    failed: int
    created_at: datetime
    #: The end of its completion window.
    expires_at: datetime
    in_progress_at: datetime | None = None
    finalizing_at: datetime | None = None
    completed_at: datetime | None = None
    failed_at: datetime | None = None
    expired_at: datetime | None = None
    cancelling_at: datetime | None = None
    cancelled_at: datetime | None = None
    #: The completion window is over.
    late: bool = field(default=False)

    @property
    def is_open(self) -> bool:
        """Whether it has not ended."""
        return self.state in OPEN_BATCHES
