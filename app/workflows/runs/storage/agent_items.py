"""
The statements on the items of agents: turns of the model, and calls of tools.

They are appended, and never rewritten once they have ended. A retry of the run resets those after the last turn that
has ended well.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.kernel.database import UnitOfWork
from app.workflows.runs.storage import payloads
from app.workflows.runs.storage.payloads import PayloadLimits
from app.workflows.runs.storage.selected import LockedStep
from app.workflows.state_machine.fan_out import FanOut
from app.workflows.state_machine.outcomes import NewItem

_APPEND = text("""
    INSERT INTO step (id, run_id, parent_id, item, input, input_sha256, input_bytes, key, position, kind, model,
                      model_index, queue, priority, rank, state, delegated, attempt, failures, losses, tokens_in,
                      tokens_out)
    SELECT gen_random_uuid(), :run_id, :parent_id, n, CAST(CAST(:value AS text) AS json), :sha256, :bytes,
           CAST(:key AS text) || '[' || n || ']', 0, :kind, :model, 0, :queue, :priority, :rank, 'pending', false,
           0, 0, 0, 0, 0
    FROM (SELECT count(*) AS n FROM step WHERE parent_id = :parent_id) AS before
""")
_SET_DEADLINE = text("""
    UPDATE step SET deadline_at = now() + CAST(:time AS interval) WHERE parent_id = :parent_id AND state = 'pending'
""")
_COUNTS = text("""
    SELECT CAST(count(*) AS integer) AS total,
           CAST(count(*) FILTER (WHERE state = 'pending') AS integer) AS waiting, 0 AS in_flight,
           CAST(count(*) FILTER (WHERE state = 'failed') AS integer) AS failed, false AS stopping,
           CAST(count(*) FILTER (WHERE finish_reason = 'length') AS integer) AS truncated,
           CAST(0 AS bigint) AS tokens_in, CAST(0 AS bigint) AS tokens_out
    FROM step WHERE parent_id = :parent_id
""")
_REOPEN = text("""
    UPDATE step SET state = 'pending', output = NULL, output_sha256 = NULL, output_bytes = NULL, error = NULL,
                    finish_reason = NULL, failures = 0, losses = 0, model_index = 0, ready_at = NULL,
                    started_at = NULL, finished_at = NULL, deadline_at = NULL
    FROM step AS agent
    WHERE agent.run_id = :run_id AND agent.kind = 'agent' AND agent.state IN ('pending', 'ready')
      AND step.parent_id = agent.id AND step.state IN ('failed', 'cancelled', 'skipped')
      AND step.item >= (SELECT max(turn.item) FROM step AS turn WHERE turn.parent_id = agent.id AND turn.kind = 'turn')
""")
_ITEMS = text("""
    SELECT step.item, step.kind, step.state, input, input_sha256, step.error, step.tokens_in, step.tokens_out,
           step.ready_at, step.finished_at, output_bytes,
           CASE WHEN output_bytes <= :most THEN output END AS output,
           CASE WHEN output_bytes <= :most THEN output_sha256 END AS output_sha256,
           (SELECT sum(cost)::float FROM attempt WHERE attempt.step_id = step.id) AS cost
    FROM step WHERE parent_id = :parent_id ORDER BY step.item
""")


@dataclass(frozen=True, slots=True)
class AgentItem:
    """An item of an agent, as it is stored."""

    item: int
    #: `turn` or `call`.
    kind: str
    state: str
    input: Any
    input_sha256: str | None
    #: None also where it is too long to be read; `output_bytes` says so.
    output: Any
    output_sha256: str | None
    output_bytes: int | None
    error: dict[str, Any] | None
    tokens_in: int
    tokens_out: int
    cost: float | None
    ready_at: datetime | None
    finished_at: datetime | None


def append(
    work: UnitOfWork,
    step: LockedStep,
    run_id: UUID,
    item: NewItem,
    model: str | None,
    queue: str,
    limits: PayloadLimits,
) -> None:
    """Write an item after the others; it is not begun. Raises PayloadTooLarge, InvalidInput."""
    (kept,) = payloads.keep(work, [payloads.encoded(item.value, limits, f"the {item.kind}")], limits)
    values = {
        "run_id": run_id,
        "parent_id": step.id,
        "value": kept.text,
        "sha256": kept.sha256,
        "bytes": kept.bytes,
        "key": step.key,
        "kind": item.kind,
        "model": model,
        "queue": queue,
        "priority": step.priority,
        "rank": step.rank,
    }
    work.run(_APPEND, values)


def counts(work: UnitOfWork, parent_id: UUID, time: timedelta) -> FanOut:
    """Set the deadline of the items that are to begin, and return the counts of all."""
    work.execute(_SET_DEADLINE, {"parent_id": parent_id, "time": time})
    found = work.row_of(FanOut, _COUNTS, {"parent_id": parent_id})
    assert found is not None, "an aggregate has one row"
    return found


def reopen(work: UnitOfWork, run_id: UUID) -> None:
    """Reset the last items of agents that are retried: those that did not succeed since the last whole turn."""
    work.execute(_REOPEN, {"run_id": run_id})


def read(work: UnitOfWork, parent_id: UUID, most: int) -> Sequence[AgentItem]:
    """The items of an agent in their order; without the outputs of more than `most` bytes."""
    found = work.rows_of(AgentItem, _ITEMS, {"parent_id": parent_id, "most": most})
    return payloads.filled(work, found, "input", "output")


def beginning(work: UnitOfWork, parent_id: UUID, item: int, characters: int) -> str:
    """The first characters of the output of an item, as JSON."""
    row = work.row(
        text("SELECT CAST(output AS text) AS output, output_sha256 FROM step WHERE parent_id = :id AND item = :item"),
        {"id": parent_id, "item": item},
    )
    assert row is not None, "items are not removed while their run is open"
    found = payloads.text_of(work, row.output, row.output_sha256) or json.dumps(None)
    return found[:characters]
