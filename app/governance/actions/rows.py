"""
The database table of actions.

    action_execution    an action for one firing, or for an operator: what it is about, why, and what came of it

An action of a firing has one row, whatever the number of control workers that hear of it: an index makes sure.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, Column, DateTime, Index, Text, text
from sqlalchemy.dialects.postgresql import JSON
from sqlmodel import Field, SQLModel

from app.governance.actions.execution import DUE, ExecutionState


def _instant(*, nullable: bool = True, default: str | None = None) -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if default is None else text(default))


def _json(*, nullable: bool = False) -> Any:
    return Column(JSON(none_as_null=True), nullable=nullable)


_DUE = f"state IN ({', '.join(repr(state.value) for state in sorted(DUE))})"


class ActionExecutionRow(SQLModel, table=True):
    """An execution. Its fields are those of `ActionExecution`."""

    __tablename__ = "action_execution"
    __table_args__ = (
        CheckConstraint(
            f"state IN ({', '.join(repr(state.value) for state in ExecutionState)})", name="state_is_known"
        ),
        Index(
            "uq_action_execution_firing_id_position",
            "firing_id",
            "position",
            unique=True,
            postgresql_where=text("firing_id IS NOT NULL"),
        ),
        Index("ix_action_execution_due", "due_at", postgresql_where=text(_DUE)),
        Index("ix_action_execution_target", "kind", "target", "created_at"),
        Index("ix_action_execution_namespace", "namespace", "id"),
        Index("ix_action_execution_rule", "rule", "id"),
        Index("ix_action_execution_created_at", "created_at"),
    )

    id: UUID = Field(primary_key=True)
    #: That of the rule; empty for one of the installation.
    namespace: str = Field(max_length=63)
    #: None for what an operator asked for.
    firing_id: UUID | None = None
    #: Its place among the actions of the rule.
    position: int
    #: The name of the rule; empty for an operator.
    rule: str = Field(max_length=200)
    kind: str = Field(max_length=32)
    target: str = Field(sa_column=Column(Text, nullable=False))
    parameters: dict[str, Any] = Field(sa_column=_json())
    cause: dict[str, Any] = Field(sa_column=_json())
    state: str = Field(max_length=16)
    dry_run: bool
    before: Any = Field(default=None, sa_column=_json(nullable=True))
    after: Any = Field(default=None, sa_column=_json(nullable=True))
    detail: str = Field(default="", sa_column=Column(Text, nullable=False))
    attempts: int = 0
    #: When a control worker does it next; while one does, when another one may.
    due_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
    created_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
    finished_at: datetime | None = Field(default=None, sa_column=_instant())
    #: When its rule cleared.
    cleared_at: datetime | None = Field(default=None, sa_column=_instant())
    undone_at: datetime | None = Field(default=None, sa_column=_instant())
    undo_detail: str = Field(default="", sa_column=Column(Text, nullable=False))
