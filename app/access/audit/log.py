"""
The storage of the audit log.

Every function but `add_all` runs in a transaction of its caller.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.access.audit.entry import MAX_ACTOR, storable
from app.kernel import clock, ids
from app.kernel.database import Database, UnitOfWork
from app.kernel.postgres.filters import where

_COLUMNS = "id, at, namespace, actor, key_id, action, target, summary, status, address"
_HAS_TARGET = "jsonb_path_exists(target, '$.* ? (@ == $name)', jsonb_build_object('name', CAST(:target AS text)))"
_INSERT = text("""
    INSERT INTO audit_entry (id, at, namespace, actor, key_id, action, target, summary, status, address)
    VALUES (:id, :at, :namespace, :actor, :key_id, :action, CAST(:target AS jsonb), :summary, :status, :address)
""")
_REMOVE = text("""
    DELETE FROM audit_entry WHERE id IN (
        SELECT id FROM audit_entry WHERE at < now() - make_interval(secs => :seconds) ORDER BY at LIMIT :limit
    )
""")


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """A change, as it is written to the audit log."""

    actor: str
    #: The route or the command.
    action: str
    #: The HTTP status; of a command, its exit code.
    status: int
    #: The namespace of who made it; empty for a caller without one.
    namespace: str = ""
    key_id: str | None = None
    #: The names and ids in the path.
    target: Mapping[str, str] = field(default_factory=dict)
    summary: str = ""
    address: str = ""
    #: It sorts by the time of the change.
    id: UUID = field(default_factory=ids.new_id)
    at: datetime = field(default_factory=clock.now)


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """An entry as it is stored."""

    id: UUID
    at: datetime
    namespace: str
    actor: str
    key_id: str | None
    action: str
    target: dict[str, Any]
    summary: str
    status: int
    address: str


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which entries are wanted; None means all."""

    namespace: str | None = None
    actor: str | None = None
    #: A part of the action.
    action: str | None = None
    #: A name or id in the path.
    target: str | None = None
    since: datetime | None = None
    until: datetime | None = None


def add(work: UnitOfWork, record: AuditRecord) -> None:
    """Add an entry."""
    target = {name: storable(str(value), MAX_ACTOR) for name, value in record.target.items()}
    values = {
        "id": record.id,
        "at": record.at,
        "namespace": record.namespace,
        "actor": storable(record.actor, MAX_ACTOR),
        "key_id": record.key_id,
        "action": storable(record.action, MAX_ACTOR),
        "target": json.dumps(target),
        "summary": record.summary,
        "status": record.status,
        "address": storable(record.address, MAX_ACTOR),
    }
    work.execute(_INSERT, values)


def add_all(database: Database, records: Sequence[AuditRecord]) -> None:
    """Add entries, in one transaction. Raises DatabaseUnreachable."""
    with database.work() as work:
        for record in records:
            add(work, record)


def page(work: UnitOfWork, wanted: AuditFilter, *, before: UUID | None, limit: int) -> list[AuditEntry]:
    """Return entries from the newest to the oldest, before an entry."""
    given: dict[str, Any] = {"limit": limit}
    conditions = {
        "namespace": ("namespace = :namespace", wanted.namespace),
        "actor": ("actor = :actor", wanted.actor),
        "action": ("strpos(action, :action) > 0", wanted.action),
        "target": (_HAS_TARGET, wanted.target),
        "since": ("at >= :since", wanted.since),
        "until": ("at < :until", wanted.until),
        "before": ("id < :before", before),
    }
    statement = f"SELECT {_COLUMNS} FROM audit_entry {where(given, conditions)} ORDER BY id DESC LIMIT :limit"
    return work.rows_of(AuditEntry, text(statement), given)


def remove(work: UnitOfWork, retention: timedelta, limit: int) -> int:
    """Remove up to so many entries whose retention is over. Returns their number."""
    return work.run(_REMOVE, {"seconds": retention.total_seconds(), "limit": limit})
