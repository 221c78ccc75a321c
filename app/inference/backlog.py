"""
The backlog: how many steps and runs wait or run now, counted for metrics.

Only what has not ended is counted, by indexes of exactly that, and at most `MOST` of each: the cost does not grow with
the history, and not without a limit with the backlog.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import text

from app.kernel.database import Database
from app.workflows.state_machine.states import FINAL_RUNS, RunState

#: A count stops here: there are at least so many.
MOST = 100_000

# A loose scan of the index: one step for each queue, and never one for each ready step.
_QUEUES = text("""
    WITH RECURSIVE name (queue) AS (
        (SELECT queue FROM step WHERE state = 'ready' ORDER BY queue LIMIT 1)
        UNION ALL
        SELECT (SELECT queue FROM step WHERE state = 'ready' AND queue > name.queue ORDER BY queue LIMIT 1)
        FROM name WHERE name.queue IS NOT NULL
    )
    SELECT name.queue, found.steps, found.age FROM name
    CROSS JOIN LATERAL (
        SELECT count(*) AS steps, GREATEST(extract(epoch FROM now() - min(since)), 0)::float AS age FROM (
            SELECT COALESCE(ready_at, created_at) AS since FROM step
            WHERE state = 'ready' AND queue = name.queue LIMIT :most
        ) AS waiting
    ) AS found
    WHERE name.queue IS NOT NULL LIMIT 1000
""")
_STEPS = text("""
    SELECT (SELECT count(*) FROM (SELECT FROM step WHERE state IN ('running', 'cancelling') LIMIT :most) AS a) AS held,
           (SELECT count(*) FROM (
               SELECT FROM step WHERE state IN ('waiting', 'awaiting') AND state = 'waiting' LIMIT :most) AS b
           ) AS waiting,
           (SELECT count(*) FROM (
               SELECT FROM step WHERE state IN ('waiting', 'awaiting') AND state = 'awaiting' LIMIT :most) AS c
           ) AS awaiting
""")
_RUNS = text("""
    SELECT state, count(*) AS runs FROM (SELECT state FROM run WHERE finished_at IS NULL LIMIT :most) AS open
    GROUP BY state
""")


@dataclass(frozen=True, slots=True)
class QueueBacklog:
    """The ready steps of a queue."""

    queue: str
    steps: int
    #: Seconds since the first of them became ready.
    age: float


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits and runs at one instant."""

    queues: Sequence[QueueBacklog]
    #: By state: `running`, `waiting` (for another attempt), `awaiting` (an event, items or a called run).
    steps: Mapping[str, int]
    #: By state, of those that have not ended.
    runs: Mapping[str, int]


def read(database: Database) -> Backlog:
    """Return the backlog. Raises Unavailable."""
    with database.work() as work:
        queues = work.rows_of(QueueBacklog, _QUEUES, {"most": MOST})
        steps = work.row(_STEPS, {"most": MOST})
        runs = work.rows(_RUNS, {"most": MOST})
    assert steps is not None, "it has no condition"
    by_state = {"running": steps.held, "waiting": steps.waiting, "awaiting": steps.awaiting}
    open_runs = {state.value: 0 for state in RunState if state not in FINAL_RUNS}
    return Backlog(queues, by_state, open_runs | {row.state: row.runs for row in runs})
