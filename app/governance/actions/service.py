"""
The action service: requests actions for firings, and their undoing.

`fired` and `cleared` run in the transaction in which a rule fires or clears, and do nothing but store: control workers
carry the actions out afterwards, each once. A firing that is delivered twice has its actions once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

from app.governance.actions import store, targets
from app.governance.actions.action import AlertAction, GovernanceAction, document_of
from app.governance.actions.execution import ActionRefused, Cause, WantedExecution
from app.kernel.database import UnitOfWork
from app.kernel.sections.governance import ActionSettings


def fired(work: UnitOfWork, cause: Cause, actions: Sequence[GovernanceAction], settings: ActionSettings) -> list[UUID]:
    """Request the actions of a firing, alerts excepted. Returns the ids of the executions."""
    if settings.mode == "off":
        return []
    cause = replace(cause, dry_run=cause.dry_run or settings.mode == "dry_run")
    return [
        store.insert(work, cause, _wanted(position, action, cause))
        for position, action in enumerate(actions)
        if not isinstance(action, AlertAction)
    ]


def cleared(work: UnitOfWork, firing_id: UUID) -> None:
    """Request that what still holds of the actions of a firing is taken back."""
    store.clear(work, firing_id)


def _wanted(position: int, action: GovernanceAction, cause: Cause) -> WantedExecution:
    kind, target = action.kind.value, targets.target_of(action)
    try:
        filled = targets.filled(action, cause.labels)
    except ActionRefused as refusal:
        return WantedExecution(position, kind, target, document_of(action), str(refusal))
    return WantedExecution(position, kind, targets.target_of(filled), document_of(filled))
