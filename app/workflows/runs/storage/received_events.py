"""The statements on received events: those that were sent to a run. Each answers one step, or waits for one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.kernel.database import UnitOfWork
from app.workflows.runs.storage import payloads
from app.workflows.runs.storage.payloads import Kept

_INSERT = text("""
    INSERT INTO event (id, run_id, name, payload, payload_sha256, payload_bytes, key)
    VALUES (:id, :run_id, :name, CAST(:payload AS json), :payload_sha256, :payload_bytes, :key)
""")
_TAKE = text("""
    UPDATE event SET step_id = :step_id WHERE id = (
        SELECT id FROM event WHERE run_id = :id AND name = :name AND step_id IS NULL ORDER BY id LIMIT 1
    ) RETURNING payload, payload_sha256
""")
_OF_KEY = text("""
    SELECT event.id, event.name, event.payload::text AS payload, event.payload_sha256, step.key AS step
    FROM event LEFT JOIN step ON step.id = event.step_id
    WHERE event.run_id = :id AND event.key = :key
""")


@dataclass(frozen=True, slots=True)
class TakenEvent:
    """The event that answers a step."""

    payload: Any
    payload_sha256: str | None


@dataclass(frozen=True, slots=True)
class ReceivedEvent:
    """An event that came under a key of its sender."""

    id: UUID
    name: str
    #: As JSON text.
    payload: str | None
    payload_sha256: str | None
    #: The key of the step that it answered.
    step: str | None


def insert(work: UnitOfWork, event_id: UUID, run_id: UUID, name: str, payload: Kept, key: str | None) -> None:
    """Write an event that answers no step yet."""
    values = {"id": event_id, "run_id": run_id, "name": name, "key": key}
    work.execute(_INSERT, values | payload.columns("payload"))


def take(work: UnitOfWork, run_id: UUID, name: str, step_id: UUID) -> TakenEvent | None:
    """The oldest event of that name that has answered no step yet; it answers this one."""
    rows = work.rows_of(TakenEvent, _TAKE, {"id": run_id, "name": name, "step_id": step_id})
    return payloads.filled(work, rows, "payload")[0] if rows else None


def of_key(work: UnitOfWork, run_id: UUID, key: str) -> ReceivedEvent | None:
    """The event that came under that key, or None."""
    return work.row_of(ReceivedEvent, _OF_KEY, {"id": run_id, "key": key})
