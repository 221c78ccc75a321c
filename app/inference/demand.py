"""
The reader of demand: the steps that wait for each model, counted by SQL.

Ready steps are current demand. Steps that wait for other steps of their run are future demand, so that their model can
be loaded in time. Steps of paused runs are no demand.
The arrival rate of a model is counted over the last minutes. The time that a step uses a slot is the mean of the last
successful attempts, whatever their age.

The cost grows with the steps that wait or run, and with those that arrived in the last minutes. It does not grow with
the items of a map that have not started, or with the history of ended runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import text

from app.catalog.catalog import Catalog
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import NotFound
from app.kernel.priority import Priority
from app.scheduler.arrival_patterns import LastRequest
from app.scheduler.needs import OperatorTarget
from app.scheduler.observation import FleetDemand, InFlight
from app.scheduler.planner.demand import WaitingSteps
from app.workflows.state_machine.states import StepState

#: The window of the arrival rate.
_RATE_WINDOW = timedelta(minutes=3)
#: The expected time in a slot while no attempt with the model has succeeded.
_DEFAULT_DURATION = timedelta(seconds=5)
#: Number of last successful attempts of a model from which its mean time is computed.
_SAMPLED_ATTEMPTS = 50
#: Future demand is read from at most this many runs, the newest ones, and in each from this many next steps.
_MAX_RUNS, _MAX_NEXT_STEPS = 2_000, 20
#: Maximum preceding steps from which the expected start of a step is computed.
_MAX_PRECEDING = 10_000

#: Redundant, but it selects an index of unfinished runs, so that ended runs are not read for a join.
_OPEN = "run.finished_at IS NULL"
_READY = text(f"""
    SELECT step.model, step.priority, run.namespace, count(*) AS steps,
           min(COALESCE(step.ready_at, published_at, now())) AS oldest,
           to_timestamp(avg(extract(epoch FROM COALESCE(step.ready_at, published_at, now())))) AS mean,
           min(LEAST(step.deadline_at, run.deadline_at)) AS deadline
    FROM step JOIN run ON run.id = step.run_id AND {_OPEN}
    WHERE step.state = 'ready' AND step.model IS NOT NULL AND NOT run.paused AND NOT run.workflow_paused
    GROUP BY step.model, step.priority, run.namespace
""")
_RUNNING_RUNS = """
    SELECT id, namespace FROM run
    WHERE state = 'running' AND NOT paused AND NOT workflow_paused ORDER BY id DESC LIMIT :runs
"""
# The items of a map start in order, a few at a time; the steps after a map wait for all of them.
_MAPS = """
    SELECT step.id, step.run_id, waiting, stopping, waiting / GREATEST(in_flight, 1) + 1 AS rounds
    FROM step JOIN fan_out ON step_id = step.id
    WHERE step.run_id = running_run.id AND step.kind = 'map' AND step.state = 'awaiting'
"""
_PENDING = text(f"""
    WITH running_run AS MATERIALIZED ({_RUNNING_RUNS})
    SELECT model, priority, namespace, count(*) AS steps, min(before) AS before FROM (
        SELECT upcoming.model, upcoming.priority, running_run.namespace, place + COALESCE(maps.rounds, 0) AS before
        FROM running_run
        CROSS JOIN LATERAL (
            SELECT model, priority, row_number() OVER (ORDER BY position) AS place FROM (
                SELECT model, priority, position FROM step
                WHERE run_id = running_run.id AND parent_id IS NULL AND state = 'pending' ORDER BY position LIMIT :next
            ) AS next
        ) AS upcoming
        LEFT JOIN LATERAL (SELECT sum(rounds) AS rounds FROM ({_MAPS}) AS map) AS maps ON true
        WHERE upcoming.model IS NOT NULL
    ) AS ahead GROUP BY model, priority, namespace
""")
_ITEMS = text(f"""
    WITH running_run AS MATERIALIZED ({_RUNNING_RUNS})
    SELECT item.model, item.priority, running_run.namespace, sum(map.waiting)::bigint AS steps, 1 AS before
    FROM running_run
    CROSS JOIN LATERAL ({_MAPS} AND waiting > 0 AND NOT stopping) AS map
    CROSS JOIN LATERAL (
        SELECT model, priority FROM step WHERE parent_id = map.id AND state = 'pending' ORDER BY item LIMIT 1
    ) AS item
    WHERE item.model IS NOT NULL GROUP BY item.model, item.priority, running_run.namespace
""")
# An earlier attempt that neither failed nor was lost with its worker was preempted.
_RUNNING_STEPS = text(f"""
    SELECT split_part(step.owner, '@', 1) AS worker, run.namespace, count(*) AS steps,
           min(step.model) AS model, max(step.attempt - 1 - step.failures - step.losses) AS preemptions
    FROM step JOIN run ON run.id = step.run_id AND {_OPEN}
    WHERE step.state IN ('running', 'cancelling') AND step.model IS NOT NULL AND step.owner IS NOT NULL
    GROUP BY worker, run.namespace
""")
_ARRIVALS = text("""
    SELECT model, priority, count(*) AS steps, max(ready_at) AS last FROM step
    WHERE ready_at > now() - CAST(:window AS interval) AND model IS NOT NULL GROUP BY model, priority
""")
_DURATIONS = text("""
    SELECT wanted.model, avg(took) AS duration FROM unnest(CAST(:models AS text[])) AS wanted (model)
    CROSS JOIN LATERAL (
        SELECT finished_at - started_at AS took FROM attempt
        WHERE attempt.model = wanted.model AND outcome = 'succeeded' ORDER BY finished_at DESC LIMIT :attempts
    ) AS last GROUP BY wanted.model
""")
_STEP = text("""
    SELECT step.id, step.run_id, step.key, step.model, step.state, split_part(step.owner, '@', 1) AS worker,
           GREATEST(extract(epoch FROM step.not_before - now()), 0)::float AS delay,
           run.paused OR run.workflow_paused AS paused
    FROM step JOIN run ON run.id = step.run_id WHERE step.id = :id AND step.model IS NOT NULL
      AND (CAST(:namespace AS text) IS NULL OR run.namespace = :namespace)
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
    #: Whether its run is paused.
    paused: bool

    @property
    def detail(self) -> str:
        """A sentence: whether the step waits for its model, or for something else."""
        state = StepState(self.state)
        if self.paused and state in {StepState.READY, StepState.PENDING, StepState.WAITING}:
            return f"its run is paused; resume it with `arriero runs resume {self.run_id}`"
        match state:
            case StepState.READY:
                return "it waits for a slot of its model"
            case StepState.PENDING:
                return "it waits for the steps that it needs, and then for its model"
            case StepState.WAITING:
                return f"an attempt failed; the next one starts in {self.delay or 0:.0f} s"
            case StepState.RUNNING | StepState.CANCELLING:
                return f"it is {state}, on {self.worker}"
            case StepState.AWAITING:
                return "it waits for a time, an event, its items or a called run"
            case _:
                return f"it has ended: {state}"


def observe(database: Database, catalog: Catalog, always_on: Iterable[str]) -> FleetDemand:
    """Reads the current demand. `always_on` are the models for which the settings require a pool at all times."""
    with database.work() as work:
        return read(work, catalog, always_on)


def read(work: UnitOfWork, catalog: Catalog, always_on: Iterable[str]) -> FleetDemand:
    """Reads the current demand in a transaction of the caller. See `observe`."""
    now: datetime = work.rows(text("SELECT now() AS now"))[0].now
    ahead = {"runs": _MAX_RUNS, "next": _MAX_NEXT_STEPS}
    arrivals, running = work.rows(_ARRIVALS, {"window": _RATE_WINDOW}), work.rows(_RUNNING_STEPS)
    ready = work.rows(_READY)
    upcoming = [*work.rows(_PENDING, ahead), *work.rows(_ITEMS, ahead)]
    durations = mean_durations(work, {row.model for rows in (running, ready, upcoming) for row in rows})
    waiting = [
        WaitingSteps(
            model=row.model,
            priority=Priority(row.priority),
            steps=row.steps,
            oldest=row.oldest,
            mean=row.mean,
            namespace=row.namespace,
            # The deadline is for the end of the step; it must start earlier.
            deadline=None if row.deadline is None else row.deadline - durations[row.model],
            work=durations[row.model],
        )
        for row in ready
    ]
    for row in upcoming:
        duration = durations[row.model]
        expected = now + duration * min(int(row.before), _MAX_PRECEDING)
        waiting.append(
            WaitingSteps(
                model=row.model,
                priority=Priority(row.priority),
                steps=row.steps,
                oldest=expected,
                namespace=row.namespace,
                work=duration,
                ready=expected,
            )
        )
    rates: dict[str, dict[Priority, float]] = {}
    requests: dict[str, LastRequest] = {}
    for row in arrivals:
        rates.setdefault(row.model, {})[Priority(row.priority)] = row.steps / _RATE_WINDOW.total_seconds()
        if row.model not in requests or requests[row.model].at < row.last:
            requests[row.model] = LastRequest(row.last, Priority(row.priority))
    in_flight: dict[str, InFlight] = {}
    for row in running:
        before = in_flight.get(row.worker, InFlight(_DEFAULT_DURATION))
        steps = {**before.steps, row.namespace: row.steps}
        in_flight[row.worker] = InFlight(durations[row.model], steps, max(row.preemptions, before.preemptions))
    targets = {name: OperatorTarget(pools=1, pinned=True) for name in always_on}
    return FleetDemand(catalog.models, waiting, rates, targets, in_flight, paused=catalog.paused, requests=requests)


def find_step(database: Database, step_id: UUID, namespace: str | None = None) -> ModelStep:
    """
    Returns a step that needs a model, of one namespace or of any.

    Raises NotFound when it does not exist, belongs to another namespace, or needs no model.
    """
    with database.work() as work:
        found = work.row_of(ModelStep, _STEP, {"id": step_id, "namespace": namespace})
    if found is None:
        raise NotFound("step with a model", str(step_id))
    return found


def mean_durations(work: UnitOfWork, models: Collection[str]) -> dict[str, timedelta]:
    """Returns the mean time that a step uses a slot, by model."""
    found = work.rows(_DURATIONS, {"models": sorted(models), "attempts": _SAMPLED_ATTEMPTS}) if models else []
    return dict.fromkeys(models, _DEFAULT_DURATION) | {row.model: row.duration for row in found}
