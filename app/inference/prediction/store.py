"""
The storage of what predictions are made of, and the reading of ended runs.

A pass reads the runs that have ended since the last one, some hundred at a time, by an index; of each run the first
steps, and of each map some items. One process at a time learns: it holds the row of the cursor.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.inference.prediction.history import MOST_STEPS
from app.kernel.database import UnitOfWork

#: Items of a map that are learned from.
_ITEMS = 20
#: How long before now the learning begins at first, and how long a workflow without runs is remembered.
_BEGIN, _REMEMBERED = timedelta(days=7), timedelta(days=90)
#: Most workflows that are remembered.
_MOST_WORKFLOWS = 20_000
#: A transaction that writes an end may commit a little after another one with a later instant.
_LAG = timedelta(seconds=2)

_PEEK = text("""
    SELECT EXISTS (
        SELECT FROM run
        WHERE finished_at IS NOT NULL AND finished_at < now() - CAST(:lag AS interval)
          AND finished_at > COALESCE(
              (SELECT CAST(state ->> 'at' AS timestamptz) FROM prediction_history WHERE kind = 'cursor'),
              '-infinity'
          )
    ) AS found
""")
_BEGIN_CURSOR = text("""
    INSERT INTO prediction_history (kind, namespace, name, state)
    VALUES ('cursor', '', '', jsonb_build_object('at', now() - CAST(:begin AS interval),
                                                 'id', '00000000-0000-0000-0000-000000000000'))
    ON CONFLICT DO NOTHING
""")
_CURSOR = text("SELECT state FROM prediction_history WHERE kind = 'cursor' FOR UPDATE SKIP LOCKED")
_RUNS = text("""
    SELECT id, namespace, workflow, state, inputs_bytes, expected, finished_at,
           extract(epoch FROM finished_at - created_at)::float AS seconds, created_at,
           EXISTS (SELECT FROM history WHERE history.run_id = run.id AND event = 'paused') AS was_paused
    FROM run
    WHERE finished_at IS NOT NULL AND (finished_at, id) > (CAST(:at AS timestamptz), CAST(:id AS uuid))
      AND finished_at < now() - CAST(:lag AS interval)
    ORDER BY finished_at, id LIMIT :limit
""")
_USED = """
    attempt.model, attempt.tokens_in, attempt.tokens_cached, attempt.tokens_out, attempt.first_token_ms,
    extract(epoch FROM attempt.finished_at - attempt.started_at)::float AS seconds,
    extract(epoch FROM attempt.started_at - step.ready_at)::float AS waited, attempt.attempt
"""
_ATTEMPT = """
    LEFT JOIN attempt ON attempt.step_id = step.id AND attempt.attempt = step.attempt
         AND attempt.outcome = 'succeeded'
"""
_STEPS = text(f"""
    SELECT step.run_id, step.id, step.key, step.kind, step.state, step.ready_at, fan_out.total AS items,
           extract(epoch FROM step.finished_at - step.started_at)::float AS took, {_USED}
    FROM unnest(CAST(:ids AS uuid[])) AS wanted (id)
    CROSS JOIN LATERAL (
        SELECT * FROM step WHERE run_id = wanted.id AND parent_id IS NULL ORDER BY position LIMIT :most
    ) AS step
    LEFT JOIN fan_out ON fan_out.step_id = step.id
    {_ATTEMPT}
""")
_ITEM_ROWS = text(f"""
    SELECT step.parent_id, {_USED}
    FROM unnest(CAST(:ids AS uuid[])) AS map (id)
    CROSS JOIN LATERAL (
        SELECT * FROM step WHERE parent_id = map.id AND state = 'succeeded' ORDER BY item LIMIT :most
    ) AS step
    {_ATTEMPT}
""")
_READ = text("""
    SELECT kind, namespace, name, state FROM prediction_history
    WHERE kind = :kind AND namespace = :namespace AND name = ANY(:names)
""")
_READ_GROUPS = text("SELECT name, state FROM prediction_history WHERE kind = 'group' AND namespace = ''")
_WRITE = text("""
    INSERT INTO prediction_history (kind, namespace, name, state)
    SELECT kind, namespace, name, state
    FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS new (kind text, namespace text, name text, state jsonb)
    ON CONFLICT (kind, namespace, name) DO UPDATE SET state = EXCLUDED.state, updated_at = now()
""")
_FORGET = text("""
    DELETE FROM prediction_history WHERE kind IN ('workflow', 'model') AND updated_at < GREATEST(
        now() - CAST(:remembered AS interval),
        (SELECT updated_at FROM prediction_history WHERE kind = 'workflow'
         ORDER BY updated_at DESC OFFSET :most LIMIT 1)
    )
""")


def is_due(work: UnitOfWork) -> bool:
    """Whether runs have ended since the last pass. It writes nothing."""
    row = work.row(_PEEK, {"lag": _LAG})
    return row is not None and bool(row.found)


def lock_cursor(work: UnitOfWork) -> Mapping[str, Any] | None:
    """Lock and return the cursor; None when another process learns now."""
    work.run(_BEGIN_CURSOR, {"begin": _BEGIN})
    row = work.row(_CURSOR)
    return None if row is None else row.state


def ended_runs(work: UnitOfWork, cursor: Mapping[str, Any], limit: int) -> list[Any]:
    """Return the next runs that have ended after the cursor."""
    return work.rows(_RUNS, {"at": cursor["at"], "id": cursor["id"], "lag": _LAG, "limit": limit})


def steps_of(work: UnitOfWork, run_ids: Sequence[UUID]) -> list[Any]:
    """Return the steps of runs, with their last attempts."""
    return work.rows(_STEPS, {"ids": list(run_ids), "most": MOST_STEPS})


def items_of(work: UnitOfWork, step_ids: Sequence[UUID]) -> list[Any]:
    """Return some items of each map."""
    return work.rows(_ITEM_ROWS, {"ids": list(step_ids), "most": _ITEMS})


def read(work: UnitOfWork, kind: str, names: Collection[str], namespace: str = "") -> dict[str, Any]:
    """Return stored states by name."""
    found = work.rows(_READ, {"kind": kind, "namespace": namespace, "names": sorted(names)})
    return {row.name: row.state for row in found}


def read_groups(work: UnitOfWork) -> dict[str, Any]:
    """Return the residuals of new workflows by basis."""
    return {row.name: row.state for row in work.rows(_READ_GROUPS)}


def write(work: UnitOfWork, states: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> None:
    """Write states by kind, namespace and name."""
    rows = [
        {"kind": kind, "namespace": namespace, "name": name, "state": state}
        for (kind, namespace, name), state in sorted(states.items(), key=lambda one: one[0])
    ]
    work.run(_WRITE, {"rows": json.dumps(rows)})


def move_cursor(work: UnitOfWork, at: datetime, run_id: UUID) -> None:
    """Continue after that run in the next pass."""
    write(work, {("cursor", "", ""): {"at": at.isoformat(), "id": str(run_id)}})


def forget(work: UnitOfWork) -> int:
    """Remove what was learned of workflows and models that are no longer used; returns the number of rows."""
    return work.run(_FORGET, {"remembered": _REMEMBERED, "most": _MOST_WORKFLOWS})
