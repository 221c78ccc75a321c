"""
The SQL statements for rules, what their evaluation remembers, and their firings.

Every function runs in a transaction of its caller. A change of what is remembered names the revision that was read: of
two control workers that decide the same, one makes the change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Text, Uuid, bindparam, text

from app.governance.rules.evaluation import RuleMemory
from app.governance.rules.firing import Firing, FiringState
from app.governance.rules.rule import Rule
from app.kernel.database import UnitOfWork

#: The namespace of rules over the whole installation.
INSTALLATION = ""
_COLUMNS = "id, namespace, name, version, source, enabled, document, created_at, updated_at"
_FIRING = """id, rule_id, name, rule_version, rule, namespace, value, labels, state, dry_run, pending_at, fired_at,
             cleared_at, reason, cleared_reason, seen"""

_LOCK_NAME = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 7205759411))")
_ONE = text(f"SELECT {_COLUMNS} FROM rule WHERE namespace = :namespace AND name = :name")
_ALL = text(f"""
    SELECT {_COLUMNS} FROM rule WHERE CAST(:namespace AS text) IS NULL OR namespace = :namespace
    ORDER BY name, namespace
""")
_COUNT = text("SELECT count(*) AS n FROM rule WHERE namespace = :namespace")
_INSERT = text("""
    INSERT INTO rule (id, namespace, name, version, source, enabled, document)
    VALUES (:id, :namespace, :name, :version, :source, :enabled, CAST(:document AS json))
""")
_REPLACE = text("""
    UPDATE rule SET version = :version, source = :source, document = CAST(:document AS json), updated_at = now()
    WHERE id = :id
""")
_ENABLE = text("UPDATE rule SET enabled = :enabled, updated_at = now() WHERE id = :id")
_DELETE = text("DELETE FROM rule WHERE id = :id")
_VERSION = text("""
    INSERT INTO rule_version (rule_id, version, source, author, document)
    VALUES (:id, :version, :source, :author, CAST(:document AS json))
""")
_VERSIONS = text("""
    SELECT version, source, author, document, created_at FROM rule_version WHERE rule_id = :id
    ORDER BY version DESC LIMIT :limit
""")
_LAST_VERSION = text("SELECT COALESCE(max(version), 0) AS version FROM rule_version WHERE rule_id = :id")
_PRUNE_VERSIONS = text("DELETE FROM rule_version WHERE rule_id = :id AND version <= :version")
_EVALUATED = text(f"""
    SELECT {_COLUMNS} FROM rule WHERE enabled OR EXISTS (SELECT FROM rule_state WHERE rule_id = rule.id)
""")
_STATES = text("SELECT rule_id, value, revision, state, firing_id FROM rule_state")
_ORPHANS = text(f"""
    SELECT {_FIRING} FROM rule_firing
    WHERE state <> 'cleared' AND NOT EXISTS (SELECT FROM rule WHERE rule.id = rule_id) LIMIT 500
""")
_NEW_STATE = text("""
    INSERT INTO rule_state (rule_id, value, revision, state, firing_id)
    SELECT :rule_id, :value, 1, CAST(:state AS jsonb), :firing_id WHERE EXISTS (
        SELECT FROM rule WHERE id = :rule_id FOR KEY SHARE
    )
    ON CONFLICT DO NOTHING
""").bindparams(bindparam("firing_id", type_=Uuid()))
_CHANGE_STATE = text("""
    UPDATE rule_state SET revision = revision + 1, state = CAST(:state AS jsonb), firing_id = :firing_id
    WHERE rule_id = :rule_id AND value = :value AND revision = :revision
""").bindparams(bindparam("firing_id", type_=Uuid()))
_FORGET = text("DELETE FROM rule_state WHERE rule_id = :rule_id AND value = :value AND revision = :revision")
_NEW_FIRING = text(f"""
    INSERT INTO rule_firing ({_FIRING})
    VALUES (:id, :rule_id, :name, :rule_version, CAST(:rule AS json), :namespace, :value, CAST(:labels AS jsonb),
            CAST(:state AS text), :dry_run, now(), CASE WHEN CAST(:state AS text) = 'firing' THEN now() END, NULL,
            :reason, '', CAST(:seen AS jsonb))
    ON CONFLICT DO NOTHING
    RETURNING pending_at, fired_at
""")
_FIRE = text("""
    UPDATE rule_firing SET state = 'firing', fired_at = now(), reason = :reason, seen = CAST(:seen AS jsonb)
    WHERE id = :id AND state = 'pending' RETURNING pending_at, fired_at
""")
_CLEAR = text(f"""
    UPDATE rule_firing SET state = 'cleared', cleared_at = now(), cleared_reason = :reason
    WHERE id = :id AND state = 'firing' RETURNING {_FIRING}
""")
_DROP = text("DELETE FROM rule_firing WHERE id = :id AND state = 'pending'")
_FIRINGS = text(f"""
    SELECT {_FIRING} FROM rule_firing
    WHERE (CAST(:namespace AS text) IS NULL OR namespace = :namespace)
      AND (CAST(:rule AS text) IS NULL OR name = :rule)
      AND (CAST(:state AS text) IS NULL OR state = :state)
      AND (CAST(:before AS uuid) IS NULL OR id < :before)
    ORDER BY id DESC LIMIT :limit
""").bindparams(bindparam("rule", type_=Text()), bindparam("before", type_=Uuid()))
_ONE_FIRING = text(f"""
    SELECT {_FIRING} FROM rule_firing WHERE id = :id AND (CAST(:namespace AS text) IS NULL OR namespace = :namespace)
""")
_OPEN_COUNTS = text("""
    SELECT rule_id, count(*) FILTER (WHERE state = 'firing') AS firing,
           count(*) FILTER (WHERE state = 'pending') AS pending
    FROM rule_firing WHERE state <> 'cleared' GROUP BY rule_id
""")
_LAST_FIRED = text("""
    SELECT rule.id, (SELECT fired_at FROM rule_firing WHERE rule_id = rule.id AND fired_at IS NOT NULL
                     ORDER BY id DESC LIMIT 1) AS fired_at
    FROM rule WHERE id = ANY(:ids)
""")
_REMOVE = text("""
    DELETE FROM rule_firing WHERE id = ANY(ARRAY(
        SELECT id FROM rule_firing WHERE cleared_at < now() - CAST(:kept AS interval) ORDER BY cleared_at LIMIT :most
    ))
""")
#: Versions that are kept of a rule.
KEPT_VERSIONS = 200


@dataclass(frozen=True, slots=True)
class StoredRule:
    """A rule as it is stored."""

    id: UUID
    namespace: str
    name: str
    version: int
    source: str
    enabled: bool
    document: dict[str, Any]
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A version of a rule."""

    version: int
    source: str
    author: str
    document: dict[str, Any]
    created_at: datetime


@dataclass(frozen=True, slots=True)
class RuleState:
    """What is remembered of a rule and a value of its label; revision 0: nothing is stored."""

    rule_id: UUID
    value: str
    revision: int
    memory: RuleMemory
    firing_id: UUID | None


def lock_name(work: UnitOfWork, namespace: str, name: str) -> None:
    """Lock the name of a rule until the end of the transaction."""
    work.execute(_LOCK_NAME, {"name": f"{namespace}/{name}"})


def find(work: UnitOfWork, namespace: str, name: str) -> StoredRule | None:
    """Return a rule."""
    return work.row_of(StoredRule, _ONE, {"namespace": namespace, "name": name})


def listed(work: UnitOfWork, namespace: str | None) -> list[StoredRule]:
    """Return the rules of a namespace, or all, by name."""
    return work.rows_of(StoredRule, _ALL, {"namespace": namespace})


def count(work: UnitOfWork, namespace: str) -> int:
    """Return the number of rules of a namespace."""
    return int(work.rows(_COUNT, {"namespace": namespace})[0].n)


def insert(work: UnitOfWork, rule: StoredRule, author: str) -> None:
    """Add a rule with its first version."""
    values = {name: getattr(rule, name) for name in ("id", "namespace", "name", "version", "source", "enabled")}
    work.run(_INSERT, values | {"document": json.dumps(rule.document)})
    _add_version(work, rule.id, rule.version, rule.source, author, rule.document)


def new_version(work: UnitOfWork, rule_id: UUID, source: str, document: Mapping[str, Any], author: str) -> int:
    """Store a new version of a rule. Returns its number."""
    version = int(work.rows(_LAST_VERSION, {"id": rule_id})[0].version) + 1
    values = {"id": rule_id, "version": version, "source": source, "document": json.dumps(document)}
    work.run(_REPLACE, values)
    _add_version(work, rule_id, version, source, author, document)
    work.run(_PRUNE_VERSIONS, {"id": rule_id, "version": version - KEPT_VERSIONS})
    return version


def _add_version(
    work: UnitOfWork, rule_id: UUID, version: int, source: str, author: str, document: Mapping[str, Any]
) -> None:
    values = {"id": rule_id, "version": version, "source": source, "author": author, "document": json.dumps(document)}
    work.run(_VERSION, values)


def enable(work: UnitOfWork, rule_id: UUID, *, enabled: bool) -> None:
    """Switch a rule on or off."""
    work.run(_ENABLE, {"id": rule_id, "enabled": enabled})


def delete(work: UnitOfWork, rule_id: UUID) -> None:
    """Remove a rule with its versions. Its firings stay; open ones are cleared by the next evaluation."""
    work.run(_DELETE, {"id": rule_id})


def versions(work: UnitOfWork, rule_id: UUID, limit: int) -> list[StoredVersion]:
    """Return the versions of a rule, the newest first."""
    return work.rows_of(StoredVersion, _VERSIONS, {"id": rule_id, "limit": limit})


def evaluated(work: UnitOfWork) -> list[StoredRule]:
    """Return the rules that are switched on, and those of which something is remembered."""
    return work.rows_of(StoredRule, _EVALUATED)


def states(work: UnitOfWork) -> dict[UUID, dict[str, RuleState]]:
    """Return what is remembered, by rule and value of its label."""
    found: dict[UUID, dict[str, RuleState]] = {}
    for row in work.rows(_STATES):
        state = RuleState(row.rule_id, row.value, row.revision, RuleMemory.of_json(row.state), row.firing_id)
        found.setdefault(row.rule_id, {})[row.value] = state
    return found


def change_state(work: UnitOfWork, before: RuleState, memory: RuleMemory, firing_id: UUID | None) -> bool:
    """Change what is remembered, unless it was changed since it was read. Returns whether it was changed."""
    values: dict[str, Any] = {"rule_id": before.rule_id, "value": before.value}
    if before.revision and memory.is_empty and memory.fired_at is None:
        return work.run(_FORGET, values | {"revision": before.revision}) == 1
    values |= {"state": json.dumps(memory.as_json()), "firing_id": firing_id}
    if not before.revision:
        return work.run(_NEW_STATE, values) == 1
    return work.run(_CHANGE_STATE, values | {"revision": before.revision}) == 1


def forget(work: UnitOfWork, before: RuleState) -> None:
    """Forget what is remembered, unless it was changed since it was read."""
    work.run(_FORGET, {"rule_id": before.rule_id, "value": before.value, "revision": before.revision})


def begin_firing(
    work: UnitOfWork, id_: UUID, of: StoredRule, rule: Rule, value: str, state: FiringState, reason: str, seen: Any
) -> Firing | None:
    """Add a firing; None when the rule has an open one for this value."""
    labels: dict[str, str] = {rule.by: value} if rule.by else {}
    values = {
        "id": id_,
        "rule_id": of.id,
        "name": of.name,
        "rule_version": of.version,
        "rule": json.dumps(of.document),
        "namespace": of.namespace,
        "value": value,
        "labels": json.dumps(labels),
        "state": state,
        "dry_run": rule.dry_run,
        "reason": reason,
        "seen": json.dumps(seen),
    }
    row = work.row(_NEW_FIRING, values)
    if row is None:
        return None
    return Firing(
        id_, of.id, rule, of.version, of.namespace, labels, state, rule.dry_run, row.pending_at, row.fired_at, None,
        reason, "", seen,
    )  # fmt: skip


def fire(work: UnitOfWork, firing: Firing, reason: str, seen: Any) -> Firing | None:
    """Make a pending firing fire; None when it is not pending."""
    row = work.row(_FIRE, {"id": firing.id, "reason": reason, "seen": json.dumps(seen)})
    if row is None:
        return None
    return replace(firing, state=FiringState.FIRING, fired_at=row.fired_at, reason=reason, values=seen)


def clear(work: UnitOfWork, firing_id: UUID, reason: str) -> Firing | None:
    """Clear a firing; None when it does not fire."""
    row = work.row(_CLEAR, {"id": firing_id, "reason": reason})
    return None if row is None else _firing(row)


def drop(work: UnitOfWork, firing_id: UUID) -> bool:
    """Remove a pending firing. Returns whether there was one."""
    return work.run(_DROP, {"id": firing_id}) == 1


def firing(work: UnitOfWork, firing_id: UUID, namespace: str | None = None) -> Firing | None:
    """Return a firing, of one namespace or of any."""
    row = work.row(_ONE_FIRING, {"id": firing_id, "namespace": namespace})
    return None if row is None else _firing(row)


def firings(
    work: UnitOfWork,
    namespace: str | None,
    *,
    rule: str | None = None,
    state: FiringState | None = None,
    before: UUID | None = None,
    limit: int = 100,
) -> list[Firing]:
    """Return firings, the newest first, before one."""
    values = {"namespace": namespace, "rule": rule, "state": state, "before": before, "limit": limit}
    return [_firing(row) for row in work.rows(_FIRINGS, values)]


def orphans(work: UnitOfWork) -> list[Firing]:
    """Return open firings of rules that were removed."""
    return [_firing(row) for row in work.rows(_ORPHANS)]


def open_counts(work: UnitOfWork) -> dict[UUID, tuple[int, int]]:
    """Return how many firings of each rule fire, and how many are pending."""
    return {row.rule_id: (row.firing, row.pending) for row in work.rows(_OPEN_COUNTS)}


def last_fired(work: UnitOfWork, rule_ids: Sequence[UUID]) -> dict[UUID, datetime | None]:
    """Return when each rule fired last."""
    return {row.id: row.fired_at for row in work.rows(_LAST_FIRED, {"ids": list(rule_ids)})}


def remove_firings(work: UnitOfWork, kept: timedelta, most: int) -> int:
    """Remove up to so many firings that were cleared before. Returns their number."""
    return work.run(_REMOVE, {"kept": kept, "most": most})


def _firing(row: Any) -> Firing:
    return Firing(
        row.id, row.rule_id, Rule.model_validate(row.rule), row.rule_version, row.namespace, row.labels,
        FiringState(row.state), row.dry_run, row.pending_at, row.fired_at, row.cleared_at, row.reason,
        row.cleared_reason, row.seen,
    )  # fmt: skip
