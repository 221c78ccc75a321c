"""
The statements on batches, and on the items of their runs.

A batch is changed by the process that holds its lease; a cancel changes its state alone, by compare-and-set.
Every instant is the database's.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.files import storage
from app.inference.batches.batch import OPEN_BATCHES, BatchState, RequestCounts
from app.inference.batches.rows import StoredBatch
from app.kernel.database import UnitOfWork

_OPEN = ", ".join(f"'{state.value}'" for state in BatchState if state in OPEN_BATCHES)
_COLUMNS = """
    id, namespace, state, endpoint, input_file_id, completion_window, metadata, ending, keep_s, output_file_id,
    error_file_id, errors, models, total, completed, failed, created_at, expires_at, in_progress_at, finalizing_at,
    completed_at, failed_at, expired_at, cancelling_at, cancelled_at, expires_at <= now() AS late
"""
_INSERT = text(f"""
    INSERT INTO batch (id, namespace, state, endpoint, input_file_id, completion_window, metadata, keep_s, total,
                       completed, failed, expires_at)
    VALUES (:id, :namespace, 'validating', :endpoint, :input_file_id, :completion_window, CAST(:metadata AS json),
            :keep_s, 0, 0, 0, now() + CAST(:window AS interval))
    RETURNING {_COLUMNS}
""")
_COUNT_OPEN = text(f"SELECT count(*) AS count FROM batch WHERE namespace = :namespace AND state IN ({_OPEN})")
_LOCK_NAMESPACE = text("SELECT pg_advisory_xact_lock(hashtextextended(:namespace, 7205759407))")
_GET = text(f"SELECT {_COLUMNS} FROM batch WHERE id = :id")
_LOCK = text(f"SELECT {_COLUMNS} FROM batch WHERE id = :id FOR UPDATE")
_DUE = text(f"""
    SELECT batch.id FROM batch LEFT JOIN run ON run.id = batch.id
    WHERE batch.state IN ({_OPEN})
      AND (batch.state <> 'in_progress' OR batch.expires_at <= now() OR run.id IS NULL OR run.finished_at IS NOT NULL)
    ORDER BY batch.id
""")
_INPUTS = text(f"SELECT input_file_id FROM batch WHERE state IN ({_OPEN})")
_CLAIM = text(f"""
    UPDATE batch SET owner = :owner, lease_until = now() + CAST(:lease AS interval)
    WHERE id = :id AND state IN ({_OPEN}) AND (lease_until IS NULL OR lease_until < now())
    RETURNING {_COLUMNS}
""")
_RENEW = text("""
    UPDATE batch SET lease_until = now() + CAST(:lease AS interval) WHERE id = :id AND owner = :owner
""")
_RELEASE = text("UPDATE batch SET owner = NULL, lease_until = NULL WHERE id = :id AND owner = :owner")
# A moment is noted once: that of the state that is entered.
_MOVE = f"""
    UPDATE batch SET state = :state, {{moment}} = now(), ending = COALESCE(CAST(:ending AS text), ending),
                     errors = COALESCE(CAST(:errors AS json), errors), models = COALESCE(CAST(:models AS json), models),
                     total = COALESCE(CAST(:total AS integer), total),
                     completed = COALESCE(CAST(:completed AS integer), completed),
                     failed = COALESCE(CAST(:failed AS integer), failed),
                     output_file_id = COALESCE(CAST(:output_file_id AS uuid), output_file_id),
                     error_file_id = COALESCE(CAST(:error_file_id AS uuid), error_file_id)
    WHERE id = :id AND state = ANY(:before) AND (CAST(:owner AS text) IS NULL OR owner = :owner) RETURNING {_COLUMNS}
"""
_MOVES = {state: text(_MOVE.format(moment=f"{state.value}_at")) for state in BatchState if state != "validating"}
_NO_CHANGE = dict.fromkeys(
    ("ending", "errors", "models", "total", "completed", "failed", "output_file_id", "error_file_id", "owner")
)
_PROGRESS = text("""
    SELECT step.run_id AS id, sum(total - waiting - in_flight - fan_out.failed) AS completed,
           sum(fan_out.failed) AS failed
    FROM step JOIN fan_out ON fan_out.step_id = step.id
    WHERE step.run_id = ANY(:ids) AND step.parent_id IS NULL GROUP BY step.run_id
""")
_RUN = text("SELECT state, error FROM run WHERE id = :id")
_MAPS = text("""
    SELECT id, key FROM step WHERE run_id = :run_id AND parent_id IS NULL AND kind = 'map' ORDER BY position
""")
_ITEMS = text("""
    SELECT id, item, state, output::text AS output, output_sha256, error FROM step
    WHERE parent_id = :map_id AND item >= :first AND item < :end
""")


@dataclass(frozen=True, slots=True)
class BatchItem:
    """A line of a batch, as the run has it."""

    id: UUID
    item: int
    state: str
    #: Its answer as JSON, where that is stored in its row.
    output: str | None
    output_sha256: str | None
    error: Mapping[str, Any] | None


def insert(work: UnitOfWork, values: Mapping[str, Any], max_open: int) -> StoredBatch | None:
    """Write a new batch; None when its namespace has `max_open` that have not ended."""
    work.execute(_LOCK_NAMESPACE, {"namespace": values["namespace"]})
    row = work.row(_COUNT_OPEN, values)
    assert row is not None, "an aggregate has one row"
    if row.count >= max_open:
        return None
    metadata = values["metadata"]
    return work.row_of(StoredBatch, _INSERT, {**values, "metadata": None if metadata is None else json.dumps(metadata)})


def find(work: UnitOfWork, id_: UUID, *, lock: bool = False) -> StoredBatch | None:
    """The batch of that id."""
    return work.row_of(StoredBatch, _LOCK if lock else _GET, {"id": id_})


def page(work: UnitOfWork, namespace: str | None, after: UUID | None, limit: int) -> list[StoredBatch]:
    """Batches, the newest first."""
    conditions = ["true"]
    if namespace is not None:
        conditions.append("namespace = :namespace")
    if after is not None:
        conditions.append("id < :after")
    statement = text(f"SELECT {_COLUMNS} FROM batch WHERE {' AND '.join(conditions)} ORDER BY id DESC LIMIT :limit")
    return work.rows_of(StoredBatch, statement, {"namespace": namespace, "after": after, "limit": limit})


def due_ids(work: UnitOfWork) -> list[UUID]:
    """Batches for which something is to be done, the oldest first."""
    return [row.id for row in work.rows(_DUE)]


def used_files(work: UnitOfWork) -> set[UUID]:
    """The input files of batches that have not ended."""
    return {row.input_file_id for row in work.rows(_INPUTS)}


def claim(work: UnitOfWork, id_: UUID, owner: str, lease: timedelta) -> StoredBatch | None:
    """Take the lease of a batch; None when it has ended, or another process has the lease."""
    return work.row_of(StoredBatch, _CLAIM, {"id": id_, "owner": owner, "lease": lease})


def renew(work: UnitOfWork, id_: UUID, owner: str, lease: timedelta) -> bool:
    """Renew the lease of a batch; False when another process has it."""
    return bool(work.run(_RENEW, {"id": id_, "owner": owner, "lease": lease}))


def release(work: UnitOfWork, id_: UUID, owner: str) -> None:
    """Give the lease back."""
    work.execute(_RELEASE, {"id": id_, "owner": owner})


def move(
    work: UnitOfWork, id_: UUID, before: Collection[BatchState], state: BatchState, **changes: Any
) -> StoredBatch | None:
    """
    Write a new state, with the instant and other columns; None when the state is not one of `before`.

    With `owner`, also when that process does not have the lease.
    """
    encoded = {
        name: json.dumps(value) if name in ("errors", "models") and value is not None else value
        for name, value in changes.items()
    }
    values = {**_NO_CHANGE, **encoded, "id": id_, "before": [one.value for one in before], "state": state.value}
    return work.row_of(StoredBatch, _MOVES[state], values)


def progress(work: UnitOfWork, ids: Collection[UUID]) -> dict[UUID, RequestCounts]:
    """What the runs of these batches have done; without those that have not begun."""
    rows = work.rows(_PROGRESS, {"ids": list(ids)}) if ids else []
    return {row.id: RequestCounts(0, int(row.completed), int(row.failed)) for row in rows}


def run_state(work: UnitOfWork, id_: UUID) -> tuple[str, Mapping[str, Any] | None] | None:
    """State and error of the run of a batch; None when there is no run."""
    row = work.row(_RUN, {"id": id_})
    return None if row is None else (row.state, row.error)


def maps(work: UnitOfWork, run_id: UUID) -> dict[str, UUID]:
    """The maps of a run by their keys, in their order."""
    return {row.key: row.id for row in work.rows(_MAPS, {"run_id": run_id})}


def items(work: UnitOfWork, map_id: UUID, first: int, end: int) -> dict[int, BatchItem]:
    """Items of a map by their index."""
    values = {"map_id": map_id, "first": first, "end": end}
    return {item.item: item for item in work.rows_of(BatchItem, _ITEMS, values)}


def body_of_line(work: UnitOfWork, run_id: UUID, offset: int, length: int) -> tuple[str, bytes] | None:
    """The endpoint of the batch with this run, and a line of its input file; None when the run is no batch."""
    batch = find(work, run_id)
    return None if batch is None else (batch.endpoint, storage.slice_of(work, batch.input_file_id, offset, length))
