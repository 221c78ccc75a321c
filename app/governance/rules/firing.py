"""
A firing: the time in which the conditions of a rule hold, for one value of its label `by` or for all.

    pending → firing → cleared

A pending firing whose conditions cease is removed: it was none. There is at most one open firing for a rule and a
value. Each change is made once, whatever the number of control workers.

Who acts on firings implements `FiringHooks`. The calls are made in the transaction that stores the change, so what they
write is stored with it or not at all; what they do beyond the database must follow the commit (`work.after_commit`), or
be found by a job of their own. Rules in dry run make no calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol
from uuid import UUID

from app.governance.rules.rule import Rule
from app.kernel.database import UnitOfWork


class FiringState(StrEnum):
    """The state of a firing."""

    #: The conditions hold, not for long enough yet.
    PENDING = "pending"
    FIRING = "firing"
    #: It has ended.
    CLEARED = "cleared"


@dataclass(frozen=True, slots=True)
class Firing:
    """A firing of a rule."""

    id: UUID
    rule_id: UUID
    #: As it was when it began to fire.
    rule: Rule
    rule_version: int
    #: Of the rule; empty for a rule over the whole installation.
    namespace: str
    #: The label by which the rule fires, and its value; empty for a rule over all.
    labels: Mapping[str, str]
    state: FiringState
    dry_run: bool
    pending_at: datetime
    fired_at: datetime | None = None
    cleared_at: datetime | None = None
    #: Why it began, in a sentence: the conditions with their values.
    reason: str = ""
    #: Why it ended.
    cleared_reason: str = ""
    #: The values that the conditions saw, by their position.
    values: Mapping[str, Any] = field(default_factory=dict)


class FiringHooks(Protocol):
    """Who acts on firings."""

    def on_firing(self, work: UnitOfWork, firing: Firing) -> None:
        """Called once for each firing, in the transaction in which it begins to fire."""

    def on_cleared(self, work: UnitOfWork, firing: Firing) -> None:
        """Called once for each firing, in the transaction in which it is cleared."""
