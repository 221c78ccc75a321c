"""
The database tables of prompt assembly.

    conversation_summary   what was summarised, a row for each summary; never updated
    conversation_window    by conversation and model, where the window of its prompts begins
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, Column, DateTime, Index, Text, text
from sqlmodel import Field, SQLModel


def _instant() -> Any:
    return Column(DateTime(timezone=True), nullable=False, server_default=text("now()"))


def _place(*, nullable: bool = False) -> Any:
    return Column(BigInteger, nullable=nullable)


class ConversationSummaryRow(SQLModel, table=True):
    """A summary. Its fields are those of `StoredSummary`."""

    __tablename__ = "conversation_summary"
    __table_args__ = (
        Index("uq_conversation_summary_place", "conversation_id", "revision", "upto_seq", unique=True),
        Index("ix_conversation_summary_run", "run_id", postgresql_where=text("run_id IS NOT NULL")),
    )

    id: UUID = Field(primary_key=True)
    conversation_id: UUID = Field(foreign_key="conversation.id", ondelete="CASCADE")
    revision: int
    first_seq: int = Field(sa_column=_place())
    upto_seq: int = Field(sa_column=_place())
    previous_id: UUID | None = None
    model: str = Field(max_length=200)
    text: str = Field(sa_column=Column(Text, nullable=False))
    tokens: int
    sentences_removed: int
    identifiers_added: int
    identifiers_missing: int
    #: The run outlives neither: its row may be gone.
    run_id: UUID | None = None
    created_at: datetime = Field(sa_column=_instant())


class ConversationWindowRow(SQLModel, table=True):
    """Where the window of the prompts of a model begins. Its fields are those of `PromptWindow`."""

    __tablename__ = "conversation_window"

    conversation_id: UUID = Field(primary_key=True, foreign_key="conversation.id", ondelete="CASCADE")
    model: str = Field(primary_key=True, max_length=200)
    revision: int
    first_seq: int = Field(sa_column=_place())
    summarised_upto: int = Field(sa_column=_place())
    tokens_before: int | None = Field(default=None, sa_column=_place(nullable=True))
    updated_at: datetime = Field(sa_column=_instant())
