"""
The statements on the items of maps.

Items are steps with a parent. They are changed under the lock of their run, except by a claim, which is a
compare-and-set as for every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.kernel.database import QueryResult, UnitOfWork
from app.kernel.errors import PayloadTooLarge
from app.workflows.runs.storage import payloads
from app.workflows.runs.storage.payloads import PayloadLimits
from app.workflows.runs.storage.selected import LockedItem, LockedStep, ReadyStep
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
                    output = NULL, output_sha256 = NULL, output_bytes = NULL, error = NULL, finish_reason = NULL,
                    failures = 0, losses = 0, model = :model, model_index = 0, queue = :queue, branch = NULL,
                    finished_at = NULL, deadline_at = NULL
    FROM {_LISTED}
    WHERE parent_id = :parent_id AND item = n - 1
      AND state IN ('pending', 'succeeded', 'failed', 'skipped', 'cancelled')
      AND NOT (state = 'succeeded' AND input::text IS NOT DISTINCT FROM value AND input_sha256 IS NOT DISTINCT FROM ref)
""")
_DROP = text("DELETE FROM step WHERE parent_id = :parent_id")
_FAN_OUT = text("""
    SELECT total, waiting, in_flight, failed, stopping, truncated, tokens_in, tokens_out FROM fan_out
    WHERE step_id = :id
""")
_WRITE_FAN_OUT = text("""
    INSERT INTO fan_out (step_id, total, waiting, in_flight, failed, stopping, truncated, tokens_in, tokens_out)
    VALUES (:id, :total, :waiting, :in_flight, :failed, :stopping, :truncated, :tokens_in, :tokens_out)
    ON CONFLICT (step_id) DO UPDATE SET total = :total, waiting = :waiting, in_flight = :in_flight, failed = :failed,
                                        stopping = :stopping, truncated = :truncated, tokens_in = :tokens_in,
                                        tokens_out = :tokens_out
""")
# The counts of a map that is begun again: of its items that are kept.
_KEPT = text("""
    SELECT CAST(:total AS integer) AS total, CAST(:waiting AS integer) AS waiting, 0 AS in_flight, 0 AS failed,
           false AS stopping, CAST(count(*) FILTER (WHERE finish_reason = 'length') AS integer) AS truncated,
           CAST(0 AS bigint) AS tokens_in, CAST(0 AS bigint) AS tokens_out
    FROM step WHERE parent_id = :parent_id AND state = 'succeeded'
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
_ENDED_BADLY = text("""
    SELECT item, error FROM step WHERE parent_id = :id AND state IN ('failed', 'cancelled') ORDER BY item LIMIT :limit
""")
_OUTPUT_BYTES = text("SELECT COALESCE(sum(output_bytes), 0) AS bytes FROM step WHERE parent_id = :id")


@dataclass(frozen=True, slots=True)
class StoppedItem:
    """An item that has begun and was cancelled, or is to stop."""

    id: UUID
    #: Its state before that.
    state: str


def expand(
    work: UnitOfWork,
    run_id: UUID,
    step: LockedStep,
    kind: Mapping[str, Any],
    values: Sequence[Any],
    limits: PayloadLimits,
) -> FanOut:
    """
    Write the items of a map, none of them begun. If it was expanded before into as many items, those that succeeded
    with the same value keep their outputs.

    `kind` has `kind`, `model` and `queue` of an item. Raises PayloadTooLarge, and InvalidInput for values that cannot
    be stored.
    """
    texts = [payloads.encoded(value, limits, f"item {n}") for n, value in enumerate(values)]
    kept, total = payloads.keep(work, texts, limits), len(texts)
    sizes = [one.bytes or 0 for one in kept]
    if sum(sizes) > limits.one:
        raise PayloadTooLarge("the items together", sum(sizes), limits.one)
    parameters = {
        **kind,
        "run_id": run_id,
        "parent_id": step.id,
        "key": step.key,
        "position": 0,
        "priority": step.priority,
        "rank": step.rank,
        "texts": [one.text for one in kept],
        "refs": [one.sha256 for one in kept],
        "sizes": sizes,
    }
    before = find(work, step.id)
    if before is not None and before.total == total:
        reset = {"total": total, "waiting": work.run(_RESET, parameters), "parent_id": step.id}
        fan = work.row_of(FanOut, _KEPT, reset)
        assert fan is not None, "an aggregate has one row"
        return fan
    work.execute(_DROP, parameters)
    work.execute(_INSERT, parameters)
    return FanOut(total, total)


def find(work: UnitOfWork, parent_id: UUID) -> FanOut | None:
    """The counts of a map; None before it was expanded."""
    return work.row_of(FanOut, _FAN_OUT, {"id": parent_id})


def fan_out_of(item: LockedItem) -> FanOut:
    """The counts of the map of an item."""
    counts = (item.total, item.waiting, item.in_flight, item.failed, item.stopping, item.truncated)
    return FanOut(*counts, item.map_tokens_in, item.map_tokens_out)


def write_fan_out(work: UnitOfWork, parent_id: UUID, fan: FanOut) -> None:
    """Write the counts of a map."""
    work.execute(_WRITE_FAN_OUT, {"id": parent_id} | asdict(fan))


def start(work: UnitOfWork, parent_id: UUID, count: int) -> QueryResult:
    """Make the next items ready; returns them as `ReadyStep`."""
    return work.execute_of(ReadyStep, _START, {"id": parent_id, "count": count})


def stop(work: UnitOfWork, parent_id: UUID) -> list[StoppedItem]:
    """Cancel every item that no worker holds, and mark the held ones; returns those that had begun."""
    return work.rows_of(StoppedItem, _STOP, {"id": parent_id})


def failures(work: UnitOfWork, parent_id: UUID, fan: FanOut) -> dict[str, Any]:
    """Details for the error of a map: a `message`, and the first hundred failed `items`; empty if none failed."""
    if not fan.failed:
        return {}
    rows = work.rows(_ENDED_BADLY, {"id": parent_id, "limit": 100})
    first = next((row for row in rows if row.error), None)
    why = f"; the first, item {first.item}: {first.error['message']}" if first else ""
    return {"message": f"{fan.failed} of {fan.total} items failed{why}", "items": [row.item for row in rows]}


def output_bytes(work: UnitOfWork, parent_id: UUID) -> int:
    """The length of the outputs of all items of a map together."""
    row = work.row(_OUTPUT_BYTES, {"id": parent_id})
    assert row is not None, "an aggregate has one row"
    return int(row.bytes)
