"""Executions: one action for one firing, from the request to what came of it (`outcome.py` has its states)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID


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
