"""
Erasure of runs on demand: rows, history and payloads, before their retention is over.

A run goes as a whole, with the run that called it and those that it called: their inputs and outputs are passed on.
One that has not ended is cancelled first. Until its worker lets go of it, it stays, and the deletion of expired runs
removes it as soon as it has ended.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from sqlalchemy import text

from app.kernel.errors import NotFound, RowsLocked
from app.workflows import garbage
from app.workflows.retention import remove_part
from app.workflows.runs.changes import transactions
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import MAX_DEPTH

#: How long a transaction waits for rows that another has locked.
_LOCK_WAIT = timedelta(seconds=2)
#: Most payloads of one run that are removed with it; others are left to garbage collection.
_PAYLOADS = 10_000

_CALLER = text("""
    SELECT caller.run_id AS id FROM run JOIN step AS caller ON caller.id = run.parent_step_id WHERE run.id = :id
""")
_EXPIRE = text("""
    UPDATE run SET retention_s = 0, expires_at = CASE WHEN finished_at IS NOT NULL THEN now() END
    WHERE id = :id RETURNING finished_at IS NOT NULL AS ended
""")
# Of the run and of all that it called, however deep.
_TREE = """
    WITH RECURSIVE tree AS (
        SELECT id FROM run WHERE id = :id
        UNION
        SELECT called.id FROM tree JOIN step ON step.run_id = tree.id
        JOIN run AS called ON called.parent_step_id = step.id
    )
"""
_PAYLOAD_HASHES = text(f"""
    {_TREE}
    SELECT DISTINCT sha256 FROM (
        SELECT unnest(ARRAY[inputs_sha256, output_sha256]) AS sha256 FROM run JOIN tree ON tree.id = run.id
        UNION SELECT unnest(ARRAY[input_sha256, output_sha256]) FROM step JOIN tree ON tree.id = step.run_id
        UNION SELECT payload_sha256 FROM event JOIN tree ON tree.id = event.run_id
    ) AS used WHERE sha256 IS NOT NULL LIMIT :limit
""")
_DEFINITION = text(f"{_TREE} SELECT DISTINCT run.sha256 FROM run JOIN tree ON tree.id = run.id")
_LEFT = text("SELECT count(*) AS count FROM run WHERE id = ANY(:ids)")


@dataclass(frozen=True, slots=True)
class ErasedRuns:
    """What became of runs that were to be erased."""

    #: Runs that are gone; those that they called are not counted.
    removed: int
    #: Runs that have not ended yet, and go when they have.
    pending: tuple[UUID, ...]


def erase(runs: Runs, run_ids: Collection[UUID]) -> ErasedRuns:
    """Erase runs; ids that are not there are passed over. Raises DatabaseUnreachable."""
    removed, pending = 0, []
    for root in sorted({_root(runs, run_id) for run_id in run_ids}):
        try:
            ended = _expire(runs, root)
        except RowsLocked:
            ended = False
        if ended is None:
            continue
        if ended and _remove(runs, root):
            removed += 1
        else:
            pending.append(root)
    return ErasedRuns(removed, tuple(pending))


def left(runs: Runs, run_ids: Collection[UUID]) -> int:
    """Return how many of these runs there are."""
    with runs.database.work() as work:
        row = work.row(_LEFT, {"ids": list(run_ids)})
    assert row is not None, "an aggregate has one row"
    return int(row.count)


def _root(runs: Runs, run_id: UUID) -> UUID:
    """The run that no other one called."""
    with runs.database.work() as work:
        for _ in range(MAX_DEPTH + 1):
            caller = work.row(_CALLER, {"id": run_id})
            if caller is None:
                break
            run_id = caller.id
    return run_id


def _expire(runs: Runs, run_id: UUID) -> bool | None:
    """Cancel a run, and let its retention be over; whether it has ended, None when it is not there."""
    try:
        runs.cancel(run_id, message="its texts were deleted")
    except NotFound:
        return None
    with transactions.begin(runs.database, _LOCK_WAIT) as work:
        row = work.row(_EXPIRE, {"id": run_id})
    return None if row is None else bool(row.ended)


def _remove(runs: Runs, run_id: UUID) -> bool:
    """Remove a run that has ended, part by part, and the payloads that only it had; False while rows are locked."""
    with runs.database.work() as work:
        hashes = [row.sha256 for row in work.rows(_PAYLOAD_HASHES, {"id": run_id, "limit": _PAYLOADS})]
        definitions = [row.sha256 for row in work.rows(_DEFINITION, {"id": run_id})]
    try:
        while left(runs, [run_id]):
            with transactions.begin(runs.database, _LOCK_WAIT) as work:
                remove_part(work, [run_id])
    except RowsLocked:
        return False
    with runs.database.work() as work:
        garbage.remove_unreferenced(work, "payload", hashes)
        garbage.remove_unreferenced(work, "definition", definitions)
    return True
