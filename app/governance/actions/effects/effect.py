"""
Effects: what the functions of this package have in common.

An effect in a transaction changes rows, and its execution is recorded in the same transaction: it happens once, or not
at all. An effect outside of one calls a service with transactions of its own; after a crash it is repeated, so it is
one that can be: it sets a state, or has an idempotency key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from app.catalog.catalog import Catalog
from app.governance.actions.execution import ActionExecution
from app.governance.actions.outcome import ActionChange
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database, UnitOfWork
from app.kernel.settings import Settings
from app.scheduler.planner.defragmentation import Defragmentation
from app.workflows.runs.service import Runs


@dataclass(frozen=True, slots=True)
class ActionContext:
    """The dependencies of effects."""

    runs: Runs
    publisher: CeleryPublisher
    #: The settings with which the process started.
    base: Settings
    #: Those of this moment.
    settings: Callable[[], Settings]
    catalog: Callable[[], Catalog]
    #: Triggers a reconcile pass.
    wake: Callable[[], object]
    #: Moves idle pools so that models fit.
    defragment: Callable[[], Defragmentation]

    @property
    def database(self) -> Database:
        """The database."""
        return self.runs.database


def author_of(execution: ActionExecution) -> str:
    """Return who is named as the author of what an execution changes."""
    return f"rule {execution.rule}" if execution.rule else execution.cause.get("actor") or "an operator"


def reason_of(execution: ActionExecution) -> str:
    """Return the reason of what an execution changes: who, and why."""
    return f"{author_of(execution)}: {execution.cause.get('summary', '')}".removesuffix(": ")[:500]


@dataclass(frozen=True, slots=True)
class RowEffect:
    """What an action does in a transaction."""

    #: Raises ActionRefused, with the reason.
    apply: Callable[[ActionContext, UnitOfWork, Any, ActionExecution], ActionChange]
    #: Takes it back, and says so; raises ActionRefused when that would undo what somebody else did.
    undo: Callable[[ActionContext, UnitOfWork, Any, ActionExecution], str] | None = None
    #: What it acts on, where that is known only now.
    target: Callable[[ActionContext, UnitOfWork, Any, ActionExecution], str] | None = None


@dataclass(frozen=True, slots=True)
class OutsideEffect:
    """What an action does with transactions of its own."""

    apply: Callable[[ActionContext, Any, ActionExecution], ActionChange]
    undo: Callable[[ActionContext, Any, ActionExecution], str] | None = None
    target: Callable[[ActionContext, UnitOfWork, Any, ActionExecution], str] | None = None
    #: What holds before it, which is stored before it begins.
    before: Callable[[UnitOfWork, Any, ActionExecution], Any] | None = None
