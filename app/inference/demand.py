"""
Demand: what waits for each model, read from the steps of runs.

Steps that are ready wait now. Steps that wait for other steps of their run are counted too, so that their model can be
loaded in time. Nothing waits in runs that are paused.
How often a model is asked for is counted over the last minutes. How long a step keeps a slot is the mean of the last
attempts that succeeded, however long ago they were.

What is read grows with the steps that wait or run, and with those that arrived in the last minutes; never with the
items of a map that have not begun, nor with what is kept of runs that have ended.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.access import namespaces
from app.catalog.catalog import Catalog
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import NotFound
from app.kernel.priority import Priority
from app.scheduler.needs import OperatorTarget
from app.scheduler.observation import InFlight
from app.scheduler.reconcile import FleetDemand, Waiting
from app.workflows.state_machine.states import StepState

#: The last minutes.
_LATELY = timedelta(minutes=3)
#: How long a step is expected to keep a slot when no attempt with its model has succeeded yet.
_USUAL = timedelta(seconds=5)
#: Attempts of a model from which that is known: the last ones.
_ATTEMPTS = 50
#: Steps to come are looked for in so many runs, the newest, and in each among so many steps, the next ones.
_AHEAD, _NEXT = 2_000, 20
#: No step is expected later than after so many others.
_FAR = 10_000

_NAMESPACE = f"COALESCE(run.labels ->> '{namespaces.LABEL}', '{namespaces.DEFAULT}')"
#: Said though it follows: there is an index of these runs, so that those that have ended are not read for a join.
_OPEN = "run.finished_at IS NULL"
_READY = text(f"""
    SELECT step.model, step.priority, {_NAMESPACE} AS namespace, count(*) AS steps,
           min(COALESCE(step.ready_at, published_at, now())) AS oldest,
           to_timestamp(avg(extract(epoch FROM COALESCE(step.ready_at, published_at, now())))) AS mean,
           min(LEAST(step.deadline_at, run.deadline_at)) AS deadline
    FROM step JOIN run ON run.id = step.run_id AND {_OPEN}
    WHERE step.state = 'ready' AND step.model IS NOT NULL AND NOT run.paused AND NOT run.workflow_paused
    GROUP BY step.model, step.priority, namespace
""")
_GOING_ON = f"""
    SELECT id, {_NAMESPACE} AS namespace FROM run
    WHERE state = 'running' AND NOT paused AND NOT workflow_paused ORDER BY id DESC LIMIT :runs
"""
# The items of a map begin in their order, a few at a time; what follows a map waits for all of them.
_MAPS = """
    SELECT step.id, step.run_id, waiting, stopping, waiting / GREATEST(in_flight, 1) + 1 AS rounds
    FROM step JOIN fan_out ON step_id = step.id
    WHERE step.run_id = going_on.id AND step.kind = 'map' AND step.state = 'awaiting'
"""
_PENDING = text(f"""
    WITH going_on AS MATERIALIZED ({_GOING_ON})
    SELECT model, priority, namespace, count(*) AS steps, min(before) AS before FROM (
        SELECT coming.model, coming.priority, going_on.namespace, place + COALESCE(maps.rounds, 0) AS before
        FROM going_on
        CROSS JOIN LATERAL (
            SELECT model, priority, row_number() OVER (ORDER BY position) AS place FROM (
                SELECT model, priority, position FROM step
                WHERE run_id = going_on.id AND parent_id IS NULL AND state = 'pending' ORDER BY position LIMIT :next
            ) AS next
        ) AS coming
        LEFT JOIN LATERAL (SELECT sum(rounds) AS rounds FROM ({_MAPS}) AS map) AS maps ON true
        WHERE coming.model IS NOT NULL
    ) AS ahead GROUP BY model, priority, namespace
""")
_ITEMS = text(f"""
    WITH going_on AS MATERIALIZED ({_GOING_ON})
    SELECT item.model, item.priority, going_on.namespace, sum(map.waiting)::bigint AS steps, 1 AS before
    FROM going_on
    CROSS JOIN LATERAL ({_MAPS} AND waiting > 0 AND NOT stopping) AS map
    CROSS JOIN LATERAL (
        SELECT model, priority FROM step WHERE parent_id = map.id AND state = 'pending' ORDER BY item LIMIT 1
    ) AS item
    WHERE item.model IS NOT NULL GROUP BY item.model, item.priority, going_on.namespace
""")
# An attempt that neither failed nor was lost with its worker was handed back.
_WORKING = text(f"""
    SELECT split_part(step.owner, '@', 1) AS worker, {_NAMESPACE} AS namespace, count(*) AS steps,
           min(step.model) AS model, max(step.attempt - 1 - step.failures - step.losses) AS preemptions
    FROM step JOIN run ON run.id = step.run_id AND {_OPEN}
    WHERE step.state IN ('running', 'cancelling') AND step.model IS NOT NULL AND step.owner IS NOT NULL
    GROUP BY worker, namespace
""")
_ARRIVED = text("""
    SELECT model, priority, count(*) AS steps FROM step
    WHERE ready_at > now() - CAST(:lately AS interval) AND model IS NOT NULL GROUP BY model, priority
""")
_LENGTHS = text("""
    SELECT asked.model, avg(took) AS length FROM unnest(CAST(:models AS text[])) AS asked (model)
    CROSS JOIN LATERAL (
        SELECT finished_at - started_at AS took FROM attempt
        WHERE attempt.model = asked.model AND outcome = 'succeeded' ORDER BY finished_at DESC LIMIT :attempts
    ) AS last GROUP BY asked.model
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


def asked(database: Database, catalog: Catalog, kept_up: Iterable[str]) -> FleetDemand:
    """What is asked of the fleet now. `kept_up` are the models that the settings want to be served always."""
    with database.work() as work:
        return read(work, catalog, kept_up)


def read(work: UnitOfWork, catalog: Catalog, kept_up: Iterable[str]) -> FleetDemand:
    """The same, in a transaction of the caller."""
    now: datetime = work.rows(text("SELECT now() AS now"))[0].now
    ahead = {"runs": _AHEAD, "next": _NEXT}
    arrived, held, ready = work.rows(_ARRIVED, {"lately": _LATELY}), work.rows(_WORKING), work.rows(_READY)
    coming = [*work.rows(_PENDING, ahead), *work.rows(_ITEMS, ahead)]
    lengths = _lengths(work, {row.model for rows in (held, ready, coming) for row in rows})
    usage: dict[str, dict[Priority, float]] = {}
    for row in arrived:
        usage.setdefault(row.model, {})[Priority(row.priority)] = row.steps / _LATELY.total_seconds()
    working: dict[str, dict[str, int]] = {}
    for row in held:
        working.setdefault(row.worker, {})[row.namespace] = row.steps
    waiting = [_waiting(row, lengths.get(row.model, _USUAL)) for row in ready]
    waiting += [_coming(row, lengths.get(row.model, _USUAL), now) for row in coming]
    wishes = {name: OperatorTarget(pools=1, pinned=True) for name in kept_up}
    return FleetDemand(catalog.models, waiting, usage, wishes, working, _in_flight(held, lengths))


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
    expected = now + length * min(int(row.before), _FAR)
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


def _lengths(work: UnitOfWork, models: Collection[str]) -> dict[str, timedelta]:
    """How long a step keeps a slot, by model."""
    found = work.rows(_LENGTHS, {"models": sorted(models), "attempts": _ATTEMPTS}) if models else []
    return {row.model: row.length for row in found}
