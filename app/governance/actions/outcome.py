"""
Outcomes: the states of an execution, and what came of it.

    pending -> done | applied | refused | failed
    applied -> undoing -> undone | kept

`done` is final: there is nothing to take back. `applied` holds until its rule clears. `refused` was not done, with the
reason: a limit, or nothing to act on. `kept` was left in place: somebody else has changed the same thing since, or
another execution still holds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


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


@dataclass(frozen=True, slots=True)
class ActionChange:
    """What an action has changed."""

    #: A sentence.
    detail: str
    before: Any = None
    after: Any = None
    #: Something holds from now on that can be taken back.
    holds: bool = False


class ActionRefused(Exception):
    """An action is not done, with the reason."""
