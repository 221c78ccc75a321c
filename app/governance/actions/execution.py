"""
Executions: one action for one firing, from the request to what came of it.

    pending -> done | applied | refused | failed
    applied -> undoing -> undone | kept

`done` is final: there is nothing to take back. `applied` holds until its rule clears. `refused` was not done, with the
reason: a limit, or nothing to act on. `kept` was left in place: somebody else has changed the same thing since, or
another execution still holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID


class ExecutionState(StrEnum):
    """Where an execution is."""

    PENDING = "pending"
    APPLIED = "applied"
    DONE = "done"
    REFUSED = "refused"
    FAILED = "failed"
    UNDOING = "undoing"
    UNDONE = "undone"
    KEPT = "kept"


#: States in which a control worker has something to do.
DUE = frozenset({ExecutionState.PENDING, ExecutionState.UNDOING})
#: States in which something holds that the action has changed.
HOLDING = frozenset({ExecutionState.APPLIED, ExecutionState.UNDOING})


@dataclass(frozen=True, slots=True)
class Cause:
    """Why something is done: the firing of a rule, or an operator."""

    #: The name of the rule; empty for an operator.
    rule: str
    #: One sentence: what was measured, and the limit.
    summary: str
    severity: str = "warning"
    #: That of the rule; empty for a rule of the installation.
    namespace: str = ""
    #: What it is about: model, pool, host, namespace, workflow.
    labels: Mapping[str, str] = field(default_factory=dict)
    firing_id: UUID | None = None
    value: float | None = None
    #: Record what would be done, and do nothing.
    dry_run: bool = False
    #: Who asked for it, when it was no rule.
    actor: str = ""

    @property
    def author(self) -> str:
        """Who is named as the author of changes."""
        return f"rule {self.rule}" if self.rule else self.actor or "an operator"


@dataclass(frozen=True, slots=True)
class ActionChange:
    """What an action has changed."""

    #: A sentence.
    detail: str
    before: Any = None
    after: Any = None
    #: Something holds from now on that can be taken back.
    holds: bool = False


@dataclass(frozen=True, slots=True)
class WantedExecution:
    """An action of a firing that is to be stored."""

    #: Its place among the actions of the rule.
    position: int
    kind: str
    target: str
    #: The JSON object of the action, with what the labels of the firing have filled in.
    parameters: dict[str, Any]
    #: Why it will not be done; empty when it will.
    refused: str = ""


class ActionRefused(Exception):
    """An action is not done, with the reason."""


@dataclass(frozen=True, slots=True)
class ActionExecution:
    """An execution, as it is stored."""

    id: UUID
    namespace: str
    firing_id: UUID | None
    position: int
    rule: str
    kind: str
    #: What it acts on, such as `model smollm2:135m`.
    target: str
    parameters: dict[str, Any]
    cause: dict[str, Any]
    state: str
    dry_run: bool
    before: Any
    after: Any
    detail: str
    attempts: int
    created_at: datetime
    finished_at: datetime | None
    cleared_at: datetime | None
    undone_at: datetime | None
    undo_detail: str
