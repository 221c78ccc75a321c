"""
The database tables of rules.

    rule          the current version of each rule
    rule_version  all versions, the removed ones included until their rule is
    rule_state    what the evaluation remembers of a rule and a value of its label
    rule_firing   firings, open ones and those that have ended
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, Column, DateTime, Index, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import JSON, JSONB
from sqlmodel import Field, SQLModel

from app.governance.rules.firing import FiringState

_STATES = ", ".join(f"'{state.value}'" for state in FiringState)


def _instant(*, nullable: bool = True) -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if nullable else text("now()"))


class RuleRow(SQLModel, table=True):
    """A rule."""

    __tablename__ = "rule"
    __table_args__ = (UniqueConstraint("namespace", "name"),)

    id: UUID = Field(primary_key=True)
    #: Empty for a rule over the whole installation.
    namespace: str = Field(default="", max_length=63, sa_column_kwargs={"server_default": ""})
    name: str = Field(max_length=100)
    version: int
    #: `builtin`, `file` or `user`: who wrote the current version.
    source: str = Field(max_length=16)
    enabled: bool
    document: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    created_at: datetime = Field(sa_column=_instant(nullable=False))
    updated_at: datetime = Field(sa_column=_instant(nullable=False))


class RuleVersionRow(SQLModel, table=True):
    """A version of a rule. It is never changed."""

    __tablename__ = "rule_version"

    rule_id: UUID = Field(primary_key=True, foreign_key="rule.id", ondelete="CASCADE")
    version: int = Field(primary_key=True)
    source: str = Field(max_length=16)
    #: Who stored it.
    author: str = Field(sa_column=Column(Text, nullable=False))
    document: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    created_at: datetime = Field(sa_column=_instant(nullable=False))


class RuleStateRow(SQLModel, table=True):
    """What the evaluation remembers. A row without anything to remember is removed."""

    __tablename__ = "rule_state"

    rule_id: UUID = Field(primary_key=True, foreign_key="rule.id", ondelete="CASCADE")
    #: The value of the label `by`; empty for a rule over all.
    value: str = Field(primary_key=True, max_length=200)
    #: Rises with each change, which is made only if it has not risen since it was read.
    revision: int
    state: dict[str, Any] = Field(sa_column=Column(JSONB, nullable=False))
    firing_id: UUID | None = None


class RuleFiringRow(SQLModel, table=True):
    """A firing. Its fields are those of `Firing`."""

    __tablename__ = "rule_firing"
    __table_args__ = (
        CheckConstraint(f"state IN ({_STATES})", name="state_is_known"),
        Index("uq_rule_firing_open", "rule_id", "value", unique=True, postgresql_where=text("state <> 'cleared'")),
        Index("ix_rule_firing_namespace", "namespace", "id"),
        Index("ix_rule_firing_rule", "rule_id", "id"),
        Index("ix_rule_firing_cleared", "cleared_at", postgresql_where=text("cleared_at IS NOT NULL")),
    )

    id: UUID = Field(primary_key=True)
    #: No foreign key: the history outlasts the rule.
    rule_id: UUID
    name: str = Field(max_length=100)
    rule_version: int
    rule: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    namespace: str = Field(default="", max_length=63)
    #: The value of the label `by`; empty for a rule over all.
    value: str = Field(default="", max_length=200)
    labels: dict[str, str] = Field(sa_column=Column(JSONB, nullable=False))
    state: str = Field(max_length=16)
    dry_run: bool
    pending_at: datetime = Field(sa_column=_instant(nullable=False))
    fired_at: datetime | None = Field(default=None, sa_column=_instant())
    cleared_at: datetime | None = Field(default=None, sa_column=_instant())
    reason: str = Field(sa_column=Column(Text, nullable=False))
    cleared_reason: str = Field(sa_column=Column(Text, nullable=False))
    values: dict[str, Any] = Field(sa_column=Column("seen", JSONB, nullable=False))
