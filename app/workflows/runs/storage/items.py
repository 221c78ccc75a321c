"""
The statements on the items of maps.

Items are steps with a parent. Who changes them holds the lock of their run, but for a claim, which is a
compare-and-set as for any step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.kernel.database import UnitOfWork
from app.kernel.errors import PayloadTooLarge
from app.workflows.runs.storage import payloads
from app.workflows.runs.storage.payloads import PayloadLimits
from app.workflows.state_machine.fan_out import FanOut

_LISTED = """
    unnest(CAST(:texts AS text[]), CAST(:refs AS text[]), CAST(:sizes AS integer[]))
        WITH ORDINALITY AS listed (value, ref, size, n)
"""
_INSERT = text(f"""
    INSERT INTO step (id, run_id, parent_id, item, input, input_sha256, input_bytes, key, position, kind, model,
                      model_index, queue, priority, rank, state, delegated, attempt, failures, losses, tokens_in,
                      tokens_out)
    SELECT gen_random_uuid(), :run_id, :parent_id, n - 1, CAST(value AS json), ref, size,
           :key || '[' || (n - 1) || ']', :position, :kind, :model, 0, :queue, :priority, :rank, 'pending', false,
           0, 0, 0, 0, 0
    FROM {_LISTED}
""")
_RESET = text(f"""
    UPDATE step SET state = 'pending', input = CAST(value AS json), input_sha256 = ref, input_bytes = size,
                    output = NULL, output_sha256 = NULL, output_bytes = NULL, error = NULL, failures = 0, losses = 0,
                    model = :model, model_index = 0, queue = :queue, branch = NULL, finished_at = NULL,
                    deadline_at = NULL
    FROM {_LISTED}
    WHERE parent_id = :parent_id AND item = n - 1
      AND NOT (state = 'succeeded' AND input::text IS NOT DISTINCT FROM value AND input_sha256 IS NOT DISTINCT FROM ref)
""")
_DROP = text("DELETE FROM step WHERE parent_id = :parent_id")
_FAN_OUT = text("SELECT total, waiting, in_flight, failed, stopping FROM fan_out WHERE step_id = :id")
_KEEP_FAN_OUT = text("""
    INSERT INTO fan_out (step_id, total, waiting, in_flight, failed, stopping)
    VALUES (:id, :total, :waiting, :in_flight, :failed, :stopping)
    ON CONFLICT (step_id) DO UPDATE SET total = :total, waiting = :waiting, in_flight = :in_flight, failed = :failed,
                                        stopping = :stopping
""")
_START = text("""
    UPDATE step SET state = 'ready', attempt = attempt + 1, published_at = now(), ready_at = COALESCE(ready_at, now())
    WHERE id IN (SELECT id FROM step WHERE parent_id = :id AND state = 'pending' ORDER BY item LIMIT :count)
    RETURNING id, key, attempt, queue, priority, rank
""")
_STOP = text("""
    WITH open AS (
        SELECT id, state FROM step
        WHERE parent_id = :id AND state IN ('pending', 'ready', 'waiting', 'awaiting', 'running', 'cancelling')
        FOR UPDATE
    ), moved AS (
        UPDATE step SET
            state = CASE WHEN open.state IN ('running', 'awaiting', 'cancelling') THEN 'cancelling'
                         ELSE 'cancelled' END,
            finished_at = CASE WHEN open.state IN ('pending', 'ready', 'waiting') THEN now() END, not_before = NULL
        FROM open WHERE step.id = open.id
    )
    SELECT id, state FROM open WHERE state <> 'pending'
""")
_FAILED = text("""
    SELECT item, error FROM step WHERE parent_id = :id AND state IN ('failed', 'cancelled') ORDER BY item LIMIT :limit
""")
_USED = text("""
    SELECT COALESCE(sum(tokens_in), 0) AS tokens_in, COALESCE(sum(tokens_out), 0) AS tokens_out,
           COALESCE(sum(output_bytes), 0) AS output_bytes
    FROM step WHERE parent_id = :id
""")


def expand(
    work: UnitOfWork, run_id: UUID, row: Any, work_of: Mapping[str, Any], found: Sequence[Any], limits: PayloadLimits
) -> FanOut:
    """
    Write the items of a map, none of them begun. Where it was expanded before into as many, those that have succeeded
    with the same value stay as they are.

    `row` is that of the map; `work_of` has `kind`, `model`, `queue` of an item. Raises PayloadTooLarge, InvalidInput
    for items that cannot be stored.
    """
    texts = [payloads.encoded(item, limits, f"item {n}") for n, item in enumerate(found)]
    kept, total = payloads.keep(work, texts, limits), len(texts)
    sizes = [one.bytes or 0 for one in kept]
    if sum(sizes) > limits.one:
        raise PayloadTooLarge("the items together", sum(sizes), limits.one)
    values = {
        **work_of,
        "run_id": run_id,
        "parent_id": row.id,
        "key": row.key,
        "position": 0,
        "priority": row.priority,
        "rank": row.rank,
        "texts": [one.text for one in kept],
        "refs": [one.sha256 for one in kept],
        "sizes": sizes,
    }
    before = find(work, row.id)
    waiting = total
    if before is not None and before.total == total:
        waiting = work.run(_RESET, values)
    else:
        work.ask(_DROP, values)
        work.ask(_INSERT, values)
    return FanOut(total, waiting)


def find(work: UnitOfWork, parent_id: UUID) -> FanOut | None:
    """How far a map has come; None before it was expanded."""
    row = work.row(_FAN_OUT, {"id": parent_id})
    return None if row is None else fan_of(row)


def fan_of(row: Any) -> FanOut:
    """How far a map has come, from a row that says it."""
    return FanOut(row.total, row.waiting, row.in_flight, row.failed, row.stopping)


def keep(work: UnitOfWork, parent_id: UUID, fan: FanOut) -> None:
    """Write how far a map has come."""
    work.ask(_KEEP_FAN_OUT, {"id": parent_id} | asdict(fan))


def start(work: UnitOfWork, parent_id: UUID, count: int) -> Any:
    """Make the next items ready: a cursor with `id`, `key`, `attempt`, `queue`, `priority`, `rank` of each."""
    return work.ask(_START, {"id": parent_id, "count": count})


def stop(work: UnitOfWork, parent_id: UUID) -> list[Any]:
    """Cancel every item that nobody holds, and mark the others: `id` and earlier `state` of those that had begun."""
    return work.rows(_STOP, {"id": parent_id})


def story(work: UnitOfWork, parent_id: UUID, fan: FanOut) -> dict[str, Any]:
    """What to tell of a map of which items failed: a `message`, and which `items`, the first hundred; else nothing."""
    if not fan.failed:
        return {}
    told = work.rows(_FAILED, {"id": parent_id, "limit": 100})
    first = next((one for one in told if one.error), None)
    why = f"; the first, item {first.item}: {first.error['message']}" if first else ""
    return {"message": f"{fan.failed} of {fan.total} items failed{why}", "items": [one.item for one in told]}


def used(work: UnitOfWork, parent_id: UUID) -> Any:
    """What all items took together: `tokens_in`, `tokens_out`; and the length of their outputs: `output_bytes`."""
    return work.row(_USED, {"id": parent_id})
