"""The statements on the history of runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.kernel.database import UnitOfWork
from app.workflows.runs.storage.payloads import as_json

_ADD = text("""
    INSERT INTO history (run_id, step, attempt, event, cause)
    VALUES (:run_id, :step, :attempt, :event, CAST(:cause AS json))
""")


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """An entry of the history of a run."""

    run_id: UUID
    #: The new state, or what else happened.
    event: str
    cause: Mapping[str, Any] | None = None
    #: The key of the step that it is about; None for the run.
    step: str | None = None
    attempt: int | None = None


def add(work: UnitOfWork, *entries: HistoryEntry) -> None:
    """Add entries to the history."""
    if entries:
        work.execute(
            _ADD, [asdict(entry) | {"cause": as_json(entry.cause) if entry.cause else None} for entry in entries]
        )
