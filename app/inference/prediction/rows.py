"""The table of what predictions are made of."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, Column, DateTime, Index, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field, SQLModel


class PredictionHistoryRow(SQLModel, table=True):
    """What was learned of a workflow or a model; the residuals of new workflows; how far the learning has come."""

    __tablename__ = "prediction_history"
    __table_args__ = (
        CheckConstraint("kind IN ('workflow', 'model', 'group', 'cursor')", name="kind_is_known"),
        Index("ix_prediction_history_age", "kind", "updated_at"),
    )

    kind: str = Field(primary_key=True, max_length=16)
    #: Of a workflow; empty for the others.
    namespace: str = Field(primary_key=True, max_length=63)
    name: str = Field(primary_key=True, max_length=200)
    state: dict[str, Any] = Field(sa_column=Column(JSONB, nullable=False))
    updated_at: datetime = Field(
        sa_column=Column(DateTime(timezone=True), nullable=False, server_default=text("now()"))
    )
