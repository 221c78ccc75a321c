"""
Demand: what waits for each model, read from the steps of runs.

Steps that are ready wait now; those that wait for other steps of their run will, and are told so that their model can
be there in time. How often a model is asked for, and how long a step keeps a slot, are seen from the steps of the last
minutes: ids sort by time, so that only those are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.fleet.catalog import Catalog
from app.fleet.fleet import Priority
from app.fleet.needs import Wish
from app.fleet.observation import InFlight
from app.fleet.reconcile import Asked, Waiting
from app.kernel.database import Database
from app.kernel.errors import NotFound

#: The last minutes.
_LATELY = timedelta(minutes=3)
#: How long a step is expected to keep a slot when none of its model has ended lately.
_USUAL = timedelta(seconds=5)
#: A step that did not begin is looked for among runs no older than that; the sweep finds what is.
_AHEAD = 2_000

_READY = text("""
    SELECT model, step.priority, count(*) AS steps, min(COALESCE(ready_at, published_at, now())) AS oldest,
           to_timestamp(avg(extract(epoch FROM COALESCE(ready_at, published_at, now())))) AS mean,
           min(LEAST(step.deadline_at, run.deadline_at)) AS deadline
    FROM step JOIN run ON run.id = step.run_id
    WHERE step.state = 'ready' AND model IS NOT NULL GROUP BY model, step.priority
""")
_PENDING = text("""
    SELECT model, priority, count(*) AS steps, min(before) AS before FROM (
        SELECT step.model, step.priority,
               (SELECT count(*) FROM step AS other WHERE other.run_id = step.run_id AND other.position < step.position
                   AND other.state IN ('ready', 'running', 'waiting', 'pending')) AS before
        FROM step WHERE step.state = 'pending' AND step.model IS NOT NULL AND step.run_id IN (
            SELECT id FROM run WHERE state = 'running' ORDER BY id DESC LIMIT :limit
        )
    ) AS ahead GROUP BY model, priority
""")
# An attempt that neither failed nor was lost with its worker was handed back.
_RUNNING = text("""
    SELECT owner, model, max(attempt - 1 - failures - losses) AS preemptions
    FROM step WHERE state IN ('running', 'cancelling') AND model IS NOT NULL GROUP BY owner, model
""")
_LATE = text("""
    SELECT model, priority, count(*) AS steps,
           sum(extract(epoch FROM finished_at - started_at)) FILTER (WHERE state = 'succeeded') AS work,
           count(*) FILTER (WHERE state = 'succeeded') AS succeeded
    FROM step WHERE id > CAST(:since AS uuid) AND model IS NOT NULL GROUP BY model, priority
""")


def asked(database: Database, catalog: Catalog, kept_up: Iterable[str]) -> Asked:
    """What is asked of the fleet now. `kept_up` are the models that the settings want to be served always."""
    with database.work() as work:
        now: datetime = work.rows(text("SELECT now() AS now"))[0].now
        late = work.rows(_LATE, {"since": _first_id(now - _LATELY)})
        ready, pending = work.rows(_READY), work.rows(_PENDING, {"limit": _AHEAD})
        running = work.rows(_RUNNING)
    usage: dict[str, dict[Priority, float]] = {}
    for row in late:
        usage.setdefault(row.model, {})[Priority(row.priority)] = row.steps / _LATELY.total_seconds()
    lengths = _lengths(late)
    waiting = [
        Waiting(
            row.model,
            Priority(row.priority),
            row.steps,
            row.oldest,
            row.mean,
            deadline=row.deadline and row.deadline - lengths.get(row.model, _USUAL),
            work=lengths.get(row.model, _USUAL),
        )
        for row in ready
    ]
    for row in pending:
        length = lengths.get(row.model, _USUAL)
        expected = now + length * max(row.before, 1)
        waiting.append(Waiting(row.model, Priority(row.priority), row.steps, expected, work=length, ready=expected))
    wishes = {name: Wish(pools=1, pinned=True) for name in kept_up}
    in_flight = {
        row.owner.partition("@")[0]: InFlight(lengths.get(row.model, _USUAL), max(row.preemptions, 0))
        for row in running
        if row.owner
    }
    return Asked(catalog.models, waiting, usage, wishes, in_flight)


def model_of(database: Database, step_id: UUID) -> str:
    """The model that a step needs. Raises NotFound when there is no such step, or it needs none."""
    with database.work() as work:
        row = work.row(text("SELECT model FROM step WHERE id = :id AND model IS NOT NULL"), {"id": step_id})
    if row is None:
        raise NotFound("step with a model", str(step_id))
    model: str = row.model
    return model


def _lengths(late: Iterable[Any]) -> dict[str, timedelta]:
    """How long a step keeps a slot, by model."""
    work: dict[str, float] = {}
    ended: dict[str, int] = {}
    for row in late:
        work[row.model] = work.get(row.model, 0.0) + float(row.work or 0)
        ended[row.model] = ended.get(row.model, 0) + row.succeeded
    return {model: timedelta(seconds=work[model] / count) for model, count in ended.items() if count}


def _first_id(instant: datetime) -> UUID:
    """Smaller than every id that was made since (RFC 9562, section 5.7)."""
    return UUID(int=int(instant.timestamp() * 1000) << 80)
