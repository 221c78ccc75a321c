"""
Demand: the steps that wait for each model, read from the steps of runs.

Steps that are ready wait now. Steps that wait for other steps of their run count too, so that their model can be loaded
in time. Steps of paused runs do not count.
Request rates are averages over the last minutes. The time that a step keeps a slot is the mean over the last successful
attempts, however old they are.

The rows read grow with the steps that wait or run, and with the steps that arrived in the last minutes; never with the
items of a map that have not begun, nor with the ended runs that are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import text

from app.access import namespaces
from app.catalog.catalog import Catalog
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import NotFound
from app.kernel.priority import Priority
from app.scheduler.needs import OperatorTarget
from app.scheduler.observation import FleetDemand, InFlight
from app.scheduler.planner.demand import WaitingSteps
from app.workflows.state_machine.states import StepState

#: The time over which request rates are averaged.
_RATE_WINDOW = timedelta(minutes=3)
#: The time that a step is expected to keep a slot while no attempt with its model has succeeded.
_DEFAULT_TIME = timedelta(seconds=5)
#: Number of attempts of a model, the last ones, of which the mean is taken.
_ATTEMPTS = 50
#: Pending steps are read from this number of runs, the newest, and this number of steps in each, the next.
_AHEAD, _NEXT = 2_000, 20
#: A pending step is expected after this number of other steps at most.
_FAR = 10_000

_NAMESPACE = f"COALESCE(run.labels ->> '{namespaces.LABEL}', '{namespaces.DEFAULT}')"
#: Redundant in the join, but it makes Postgres use the index of these runs and not read the ended ones.
_NOT_FINISHED = "run.finished_at IS NULL"
_READY_STEPS = text(f"""
    SELECT step.model, step.priority, {_NAMESPACE} AS namespace, count(*) AS steps,
           min(COALESCE(step.ready_at, published_at, now())) AS oldest,
           to_timestamp(avg(extract(epoch FROM COALESCE(step.ready_at, published_at, now())))) AS mean,
           min(LEAST(step.deadline_at, run.deadline_at)) AS deadline
    FROM step JOIN run ON run.id = step.run_id AND {_NOT_FINISHED}
    WHERE step.state = 'ready' AND step.model IS NOT NULL AND NOT run.paused AND NOT run.workflow_paused
    GROUP BY step.model, step.priority, namespace
""")
_OPEN_RUNS = f"""
    SELECT id, {_NAMESPACE} AS namespace FROM run
    WHERE state = 'running' AND NOT paused AND NOT workflow_paused ORDER BY id DESC LIMIT :runs
"""
# The items of a map begin in their order, a few at a time; what follows a map waits for all of them.
_MAPS = """
    SELECT step.id, step.run_id, waiting, stopping, waiting / GREATEST(in_flight, 1) + 1 AS rounds
    FROM step JOIN fan_out ON step_id = step.id
    WHERE step.run_id = open_run.id AND step.kind = 'map' AND step.state = 'awaiting'
"""
_PENDING_STEPS = text(f"""
    WITH open_run AS MATERIALIZED ({_OPEN_RUNS})
    SELECT model, priority, namespace, count(*) AS steps, min(before) AS before FROM (
        SELECT coming.model, coming.priority, open_run.namespace, place + COALESCE(maps.rounds, 0) AS before
        FROM open_run
        CROSS JOIN LATERAL (
            SELECT model, priority, row_number() OVER (ORDER BY position) AS place FROM (
                SELECT model, priority, position FROM step
                WHERE run_id = open_run.id AND parent_id IS NULL AND state = 'pending' ORDER BY position LIMIT :next
            ) AS next
        ) AS coming
        LEFT JOIN LATERAL (SELECT sum(rounds) AS rounds FROM ({_MAPS}) AS map) AS maps ON true
        WHERE coming.model IS NOT NULL
    ) AS ahead GROUP BY model, priority, namespace
""")
_PENDING_ITEMS = text(f"""
    WITH open_run AS MATERIALIZED ({_OPEN_RUNS})
    SELECT item.model, item.priority, open_run.namespace, sum(map.waiting)::bigint AS steps, 1 AS before
    FROM open_run
    CROSS JOIN LATERAL ({_MAPS} AND waiting > 0 AND NOT stopping) AS map
    CROSS JOIN LATERAL (
        SELECT model, priority FROM step WHERE parent_id = map.id AND state = 'pending' ORDER BY item LIMIT 1
    ) AS item
    WHERE item.model IS NOT NULL GROUP BY item.model, item.priority, open_run.namespace
""")
# An attempt that neither failed nor was lost with its worker was preempted.
_IN_FLIGHT = text(f"""
    SELECT split_part(step.owner, '@', 1) AS worker, {_NAMESPACE} AS namespace, count(*) AS steps,
           min(step.model) AS model, max(step.attempt - 1 - step.failures - step.losses) AS preemptions
    FROM step JOIN run ON run.id = step.run_id AND {_NOT_FINISHED}
    WHERE step.state IN ('running', 'cancelling') AND step.model IS NOT NULL AND step.owner IS NOT NULL
    GROUP BY worker, namespace
""")
_ARRIVALS = text("""
    SELECT model, priority, count(*) AS steps FROM step
    WHERE ready_at > now() - CAST(:window AS interval) AND model IS NOT NULL GROUP BY model, priority
""")
_STEP_TIMES = text("""
    SELECT needed.model, avg(took) AS time FROM unnest(CAST(:models AS text[])) AS needed (model)
    CROSS JOIN LATERAL (
        SELECT finished_at - started_at AS took FROM attempt
        WHERE attempt.model = needed.model AND outcome = 'succeeded' ORDER BY finished_at DESC LIMIT :attempts
    ) AS last GROUP BY needed.model
""")
_MODEL_STEP = text("""
    SELECT step.id, step.run_id, step.key, step.model, step.state, split_part(step.owner, '@', 1) AS worker,
           GREATEST(extract(epoch FROM step.not_before - now()), 0)::float AS delay,
           run.paused OR run.workflow_paused AS paused
    FROM step JOIN run ON run.id = step.run_id WHERE step.id = :id AND step.model IS NOT NULL
""")


@dataclass(frozen=True, slots=True)
class ModelStep:
    """A step that needs a model, and its state."""

    id: UUID
    run_id: UUID
    key: str
    model: str
    state: str
    #: The worker that executes it.
    worker: str | None
    #: Seconds until its next attempt.
    delay: float | None
    #: Its run is paused.
    paused: bool

    @property
    def detail(self) -> str:
        """A sentence: whether it waits for its model, or for something else."""
        state = StepState(self.state)
        if self.paused and state in {StepState.READY, StepState.PENDING, StepState.WAITING}:
            return f"its run is paused, and continues with `arriero runs resume {self.run_id}`"
        match state:
            case StepState.READY:
                return "it waits for a slot of its model"
            case StepState.PENDING:
                return "it waits for the steps that it needs, and then for its model"
            case StepState.WAITING:
                return f"an attempt failed; the next one begins in {self.delay or 0:.0f} s"
            case StepState.RUNNING | StepState.CANCELLING:
                return f"it is {state}, on {self.worker}"
            case StepState.AWAITING:
                return "its work is delegated to its items or to a called run"
            case _:
                return f"it has ended: {state}"


def current(database: Database, catalog: Catalog, kept_running: Iterable[str]) -> FleetDemand:
    """The demand on the fleet now. `kept_running` are the models that the settings keep running."""
    with database.work() as work:
        return read(work, catalog, kept_running)


def read(work: UnitOfWork, catalog: Catalog, kept_running: Iterable[str]) -> FleetDemand:
    """The demand on the fleet now, read in a transaction of the caller."""
    now: datetime = work.rows(text("SELECT now() AS now"))[0].now
    ahead = {"runs": _AHEAD, "next": _NEXT}
    arrivals, working = work.rows(_ARRIVALS, {"window": _RATE_WINDOW}), work.rows(_IN_FLIGHT)
    ready = work.rows(_READY_STEPS)
    pending = [*work.rows(_PENDING_STEPS, ahead), *work.rows(_PENDING_ITEMS, ahead)]
    times = _step_times(work, {row.model for rows in (working, ready, pending) for row in rows})
    waiting = [
        WaitingSteps(
            model=row.model,
            priority=Priority(row.priority),
            steps=row.steps,
            oldest=row.oldest,
            mean=row.mean,
            namespace=row.namespace,
            # A deadline is for the end of a step; the step must begin before that.
            deadline=None if row.deadline is None else row.deadline - times[row.model],
            work=times[row.model],
        )
        for row in ready
    ]
    for row in pending:
        time = times[row.model]
        expected = now + time * min(int(row.before), _FAR)
        waiting.append(
            WaitingSteps(
                model=row.model,
                priority=Priority(row.priority),
                steps=row.steps,
                oldest=expected,
                namespace=row.namespace,
                work=time,
                ready=expected,
            )
        )
    rates: dict[str, dict[Priority, float]] = {}
    for row in arrivals:
        rates.setdefault(row.model, {})[Priority(row.priority)] = row.steps / _RATE_WINDOW.total_seconds()
    in_flight: dict[str, InFlight] = {}
    for row in working:
        before = in_flight.get(row.worker, InFlight(_DEFAULT_TIME))
        steps = {**before.steps, row.namespace: row.steps}
        in_flight[row.worker] = InFlight(times[row.model], steps, max(row.preemptions, before.preemptions))
    targets = {name: OperatorTarget(pools=1, pinned=True) for name in kept_running}
    return FleetDemand(catalog.models, waiting, rates, targets, in_flight)


def find_step(database: Database, step_id: UUID) -> ModelStep:
    """A step that needs a model. Raises NotFound when there is no such step, or it needs none."""
    with database.work() as work:
        found = work.row_of(ModelStep, _MODEL_STEP, {"id": step_id})
    if found is None:
        raise NotFound("step with a model", str(step_id))
    return found


def _step_times(work: UnitOfWork, models: Collection[str]) -> dict[str, timedelta]:
    """The time that a step keeps a slot, by model."""
    found = work.rows(_STEP_TIMES, {"models": sorted(models), "attempts": _ATTEMPTS}) if models else []
    return dict.fromkeys(models, _DEFAULT_TIME) | {row.model: row.time for row in found}
