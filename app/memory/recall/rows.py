"""
The tables of recall.

    passage          a part of a text, with its words; written by whoever writes the text, in the same transaction
    passage_pending  passages that have no vector yet: a queue, which the job of embeddings empties
    passage_vector   the vectors of a passage, one for each embedding model
    recall_model     the embedding models, and how far each has come
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, Column, DateTime, ForeignKey, Identity, Index, Integer, Text, text
from sqlalchemy.dialects.postgresql import TSVECTOR
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.types import UserDefinedType
from sqlmodel import Field, SQLModel

from app.memory.recall.passages import SourceKind


class HalfVector(UserDefinedType[str]):
    """pgvector's `halfvec`: numbers of 16 bits, of any number of dimensions."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        """Its name in SQL."""
        return "halfvec"


# So that a check of the schema knows what it reads.
ischema_names["halfvec"] = HalfVector


class RecallModelState(StrEnum):
    """How far an embedding model has come."""

    #: It gets vectors of the passages that were there before it.
    BUILDING = "building"
    #: Every passage has a vector, or is in the queue.
    READY = "ready"
    #: Another model is ready; its vectors are being removed.
    RETIRED = "retired"


def _known(values: type[StrEnum]) -> str:
    return ", ".join(repr(value.value) for value in values)


def _instant(*, nullable: bool = True, default: str | None = None) -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if default is None else text(default))


class PassageRow(SQLModel, table=True):
    """A part of a text."""

    __tablename__ = "passage"
    __table_args__ = (
        CheckConstraint(f"source IN ({_known(SourceKind)})", name="source_is_known"),
        Index("ix_passage_scope", "namespace", "owner", "source", "at"),
        # In the order in which they were written: consolidation.
        Index("ix_passage_namespace", "namespace", "id"),
        Index("ix_passage_source", "namespace", "source_id"),
        Index("ix_passage_thread", "namespace", "thread", "place"),
        Index("ix_passage_lexemes", "lexemes", postgresql_using="gin"),
    )

    id: int = Field(sa_column=Column(BigInteger, Identity(always=True), primary_key=True))
    namespace: str = Field(max_length=64)
    #: The user; empty for what belongs to the namespace alone.
    owner: str = Field(max_length=200)
    conversation: str | None = Field(default=None, max_length=64)
    source: str = Field(max_length=16)
    source_id: str = Field(max_length=200)
    #: The number of the part of its source, from 0.
    part: int
    #: The conversation, or else the source: in it, `place` orders the passages.
    thread: str = Field(max_length=200)
    place: int = Field(sa_type=BigInteger)
    text: str = Field(sa_column=Column(Text, nullable=False))
    role: str | None = Field(default=None, max_length=32)
    speaker: str | None = Field(default=None, max_length=200)
    kind: str | None = Field(default=None, max_length=32)
    #: When it was said.
    at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
    #: Words.
    length: int
    lexemes: str = Field(sa_column=Column(TSVECTOR, nullable=False))
    created_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))


class RecallModelRow(SQLModel, table=True):
    """An embedding model."""

    __tablename__ = "recall_model"
    __table_args__ = (CheckConstraint(f"state IN ({_known(RecallModelState)})", name="state_is_known"),)

    id: int = Field(sa_column=Column(Integer, Identity(always=True), primary_key=True))
    #: In the catalogue; after it, with an `@`, the beginning of the hash of its file, once that is known.
    name: str = Field(max_length=200, unique=True)
    state: str = Field(max_length=16)
    #: Of its vectors; None before the first one.
    dimensions: int | None = None
    #: The last of the older passages that has its vector.
    reached: int = Field(default=0, sa_type=BigInteger, sa_column_kwargs={"server_default": text("0")})
    #: Vectors that it has made, in all.
    made: int = Field(default=0, sa_type=BigInteger, sa_column_kwargs={"server_default": text("0")})
    #: Whether its vectors have an index.
    is_indexed: bool = Field(default=False, sa_column_kwargs={"server_default": text("false")})
    #: The run that makes its vectors now.
    run_id: UUID | None = None
    #: Why it makes none.
    problem: str | None = Field(default=None, sa_column=Column(Text))
    created_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
    ready_at: datetime | None = Field(default=None, sa_column=_instant())


class PassageVectorRow(SQLModel, table=True):
    """The vector of a passage, of length 1."""

    __tablename__ = "passage_vector"

    passage_id: int = Field(
        sa_column=Column(BigInteger, ForeignKey("passage.id", ondelete="CASCADE"), primary_key=True)
    )
    model_id: int = Field(sa_column=Column(ForeignKey("recall_model.id"), primary_key=True))
    vector: str = Field(sa_column=Column(HalfVector, nullable=False))


class PendingPassageRow(SQLModel, table=True):
    """A passage that has no vector yet."""

    __tablename__ = "passage_pending"
    __table_args__ = (Index("ix_passage_pending_ready", "passage_id", postgresql_where=text("problem IS NULL")),)

    passage_id: int = Field(
        sa_column=Column(BigInteger, ForeignKey("passage.id", ondelete="CASCADE"), primary_key=True)
    )
    #: Why no vector can be made of it; it is found by its words.
    problem: str | None = Field(default=None, sa_column=Column(Text))
