"""
Demand: what waits for each model, read from the steps of runs.

Steps that are ready wait now; those that wait for other steps of their run will, and are told so that their model can
be there in time. Of runs that are paused nothing waits. How often a model is asked for, and how long a step keeps a
slot, are seen from the steps of the last minutes: ids sort by time, so that only those are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.fleet import namespaces
from app.fleet.catalog import Catalog
from app.fleet.fleet import Priority
from app.fleet.needs import Wish
from app.fleet.observation import InFlight
from app.fleet.reconcile import Asked, Waiting
from app.kernel.database import Database
from app.kernel.errors import NotFound
from app.workflows.states import StepState

#: The last minutes.
_LATELY = timedelta(minutes=3)
#: How long a step is expected to keep a slot when none of its model has ended lately.
_USUAL = timedelta(seconds=5)
#: A step that did not begin is looked for among runs no older than that; the sweep finds what is.
_AHEAD = 2_000

_NAMESPACE = f"COALESCE(run.labels ->> '{namespaces.LABEL}', '{namespaces.DEFAULT}')"
_READY = text(f"""
    SELECT step.model, step.priority, {_NAMESPACE} AS namespace, count(*) AS steps,
           min(COALESCE(step.ready_at, published_at, now())) AS oldest,
           to_timestamp(avg(extract(epoch FROM COALESCE(step.ready_at, published_at, now())))) AS mean,
           min(LEAST(step.deadline_at, run.deadline_at)) AS deadline
    FROM step JOIN run ON run.id = step.run_id
    WHERE step.state = 'ready' AND step.model IS NOT NULL AND NOT run.paused AND NOT run.workflow_paused
    GROUP BY step.model, step.priority, namespace
""")
_PENDING = text(f"""
    SELECT model, priority, namespace, count(*) AS steps, min(before) AS before FROM (
        SELECT step.model, step.priority, {_NAMESPACE} AS namespace,
               (SELECT count(*) FROM step AS other WHERE other.run_id = step.run_id AND other.position < step.position
                   AND other.state IN ('ready', 'running', 'waiting', 'pending')) AS before
        FROM step JOIN run ON run.id = step.run_id
        WHERE step.state = 'pending' AND step.model IS NOT NULL AND NOT run.paused AND NOT run.workflow_paused
          AND run.id IN (SELECT id FROM run WHERE state = 'running' ORDER BY id DESC LIMIT :limit)
    ) AS ahead GROUP BY model, priority, namespace
""")
# An attempt that neither failed nor was lost with its worker was handed back.
_WORKING = text(f"""
    SELECT split_part(step.owner, '@', 1) AS worker, {_NAMESPACE} AS namespace, count(*) AS steps,
           min(step.model) AS model, max(step.attempt - 1 - step.failures - step.losses) AS preemptions
    FROM step JOIN run ON run.id = step.run_id
    WHERE step.state IN ('running', 'cancelling') AND step.model IS NOT NULL AND step.owner IS NOT NULL
    GROUP BY worker, namespace
""")
_LATE = text("""
    SELECT model, priority, count(*) AS steps,
           sum(extract(epoch FROM finished_at - started_at)) FILTER (WHERE state = 'succeeded') AS work,
           count(*) FILTER (WHERE state = 'succeeded') AS succeeded
    FROM step WHERE id > CAST(:since AS uuid) AND model IS NOT NULL GROUP BY model, priority
""")
_STEP = text("""
    SELECT step.id, step.run_id, step.key, step.model, step.state, split_part(step.owner, '@', 1) AS worker,
           GREATEST(extract(epoch FROM step.not_before - now()), 0) AS pause,
           run.paused OR run.workflow_paused AS paused
    FROM step JOIN run ON run.id = step.run_id WHERE step.id = :id AND step.model IS NOT NULL
""")


@dataclass(frozen=True, slots=True)
class Asker:
    """A step that needs a model, and where it stands."""

    id: UUID
    run_id: UUID
    key: str
    model: str
    state: StepState
    #: In a sentence: whether it waits for its model, or for something else.
    told: str


def asked(database: Database, catalog: Catalog, kept_up: Iterable[str]) -> Asked:
    """What is asked of the fleet now. `kept_up` are the models that the settings want to be served always."""
    with database.work() as work:
        now: datetime = work.rows(text("SELECT now() AS now"))[0].now
        late = work.rows(_LATE, {"since": _first_id(now - _LATELY)})
        ready, pending = work.rows(_READY), work.rows(_PENDING, {"limit": _AHEAD})
        held = work.rows(_WORKING)
    usage: dict[str, dict[Priority, float]] = {}
    for row in late:
        usage.setdefault(row.model, {})[Priority(row.priority)] = row.steps / _LATELY.total_seconds()
    working: dict[str, dict[str, int]] = {}
    for row in held:
        working.setdefault(row.worker, {})[row.namespace] = row.steps
    lengths = _lengths(late)
    waiting = [_waiting(row, lengths.get(row.model, _USUAL)) for row in ready]
    waiting += [_coming(row, lengths.get(row.model, _USUAL), now) for row in pending]
    wishes = {name: Wish(pools=1, pinned=True) for name in kept_up}
    return Asked(catalog.models, waiting, usage, wishes, working, _in_flight(held, lengths))


def find_step(database: Database, step_id: UUID) -> Asker:
    """A step that needs a model. Raises NotFound when there is no such step, or it needs none."""
    with database.work() as work:
        row = work.row(_STEP, {"id": step_id})
    if row is None:
        raise NotFound("step with a model", str(step_id))
    return Asker(row.id, row.run_id, row.key, row.model, StepState(row.state), _told(row))


def _waiting(row: Any, length: timedelta) -> Waiting:
    return Waiting(
        row.model,
        Priority(row.priority),
        row.steps,
        row.oldest,
        row.mean,
        namespace=row.namespace,
        # A deadline is for the end; a step must begin before that.
        deadline=None if row.deadline is None else row.deadline - length,
        work=length,
    )


def _coming(row: Any, length: timedelta, now: datetime) -> Waiting:
    expected = now + length * max(row.before, 1)
    return Waiting(
        row.model,
        Priority(row.priority),
        row.steps,
        expected,
        namespace=row.namespace,
        work=length,
        ready=expected,
    )


def _told(row: Any) -> str:
    state = StepState(row.state)
    if row.paused and state in {StepState.READY, StepState.PENDING, StepState.WAITING}:
        return f"its run is paused, and goes on with `arriero runs resume {row.run_id}`"
    match state:
        case StepState.READY:
            return "it waits for a slot of its model"
        case StepState.PENDING:
            return "it waits for the steps that it needs, and then for its model"
        case StepState.WAITING:
            return f"an attempt failed; the next one begins in {float(row.pause or 0):.0f} s"
        case StepState.RUNNING | StepState.CANCELLING:
            return f"it is {state}, on {row.worker}"
        case StepState.AWAITING:
            return "its work goes on elsewhere"
        case _:
            return f"it has ended: {state}"


def _in_flight(held: Iterable[Any], lengths: Mapping[str, timedelta]) -> dict[str, InFlight]:
    found: dict[str, InFlight] = {}
    for row in held:
        most = max(row.preemptions, found[row.worker].preemptions if row.worker in found else 0)
        found[row.worker] = InFlight(lengths.get(row.model, _USUAL), most)
    return found


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
