"""
Reconcile: observe, plan, apply, in one transaction and by one of all control workers at a time.

It writes what is desired of pools and what the ledger grants; it asks no agent and no pool, and touches no device.
Only the one that plans asks what waits. A pool, a model or an order that cannot be planned for is logged, refused with
the reason where it is asked for, and stops none of the others.
A plan that the ledger refuses in part is applied without that part, and the refusal is kept with its reason.
Agents hear of it at the commit, by a notification of Postgres, and find it at their next beat if that was lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import psycopg
from sqlalchemy import text

from app.access import accounts
from app.catalog.model import Model
from app.fleet.hosts import not_served
from app.fleet.ledger import rules
from app.fleet.ledger.reservation import ReservationState
from app.fleet.ledger.session import open_session
from app.fleet.pool import COMING, Desired
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import DatabaseUnreachable
from app.kernel.loop_guard import LoopGuard
from app.kernel.priority import Priority
from app.kernel.security import texts
from app.scheduler import defragmentation as defragmenting
from app.scheduler import explanation, observation, placement
from app.scheduler.cluster import Cluster, Demand
from app.scheduler.defragmentation import Defragmentation
from app.scheduler.explanation import Condition, Explanation
from app.scheduler.isolation import isolated
from app.scheduler.needs import OperatorTarget
from app.scheduler.observation import InFlight, Observation
from app.scheduler.placement import Action, GrantReserve, Plan, Refusal, StartPool
from app.scheduler.reconcile_pass import ReconcilePass, ReconcileTimes

#: Held by the one that reconciles.
_LEADER = 7_205_759_403_793
#: How long ended pools are kept to be looked at.
_KEPT = timedelta(days=1)

#: Characters of a reason, and of what names an action in the log.
_SENTENCE, _NAMED = 1_000, 300
#: What breaks for one pool or one model is logged, and stops none of the others.
_GUARD = LoopGuard(psycopg.Error, DatabaseUnreachable)

_TRY_TO_LEAD = text("SELECT pg_try_advisory_xact_lock(:key) AS leads")
_LEAD = text("SELECT pg_advisory_xact_lock(:key)")
_SILENT = text("SELECT name FROM host WHERE lost_at IS NULL AND agent_until < now() - :age ORDER BY name")
_REFUSE = text("""
    INSERT INTO refusal (configuration, model, reason, needs_bytes, estimate_seconds)
    VALUES (:configuration, :model, :reason, :needs, :estimate)
    ON CONFLICT (configuration) DO UPDATE SET model = :model, reason = :reason, needs_bytes = :needs,
        estimate_seconds = :estimate, at = now()
""")
_NOT_SERVED = text("""
    SELECT name, problem FROM host, jsonb_array_elements_text(problems) AS problem
    WHERE starts_with(problem, :start) ORDER BY name LIMIT 1
""")
_FORGET_REFUSALS = text("DELETE FROM refusal WHERE configuration <> ALL(:refused)")
_STOPS = text("""
    SELECT id::text, model, pool_id, reason FROM pool_command
    WHERE command = 'stop' AND done_at IS NULL ORDER BY created_at
""")
_OF_ORDER = text("""
    SELECT pool.id::text FROM pool JOIN reservation ON reservation.id = pool.id
    WHERE reservation.state <> 'released' AND CASE
        WHEN CAST(:pool AS uuid) IS NULL THEN pool.model = :model ELSE pool.id = CAST(:pool AS uuid)
    END
""")
_ANSWER = text("UPDATE pool_command SET done_at = now() WHERE id = CAST(:id AS uuid)")
# An array of ids is looked up one by one; a subquery may be joined with all that is kept.
_FORGET = text("""
    DELETE FROM reservation WHERE id = ANY(ARRAY(
        SELECT id FROM reservation WHERE state = 'released' AND released_at < now() - :age
        ORDER BY released_at LIMIT 200
    ))
""")
_FORGET_ORDERS = text("""
    DELETE FROM pool_command WHERE id = ANY(ARRAY(
        SELECT id FROM pool_command WHERE done_at < now() - :age ORDER BY done_at LIMIT 1000
    ))
""")
_FORGET_DEFRAGMENTATIONS = text("DELETE FROM defragmentation WHERE at < now() - 30 * CAST(:age AS interval)")
_KEEP_DEFRAGMENTATION = text("""
    INSERT INTO defragmentation (moves, gains, stuck)
    VALUES (CAST(:moves AS jsonb), CAST(:gains AS jsonb), CAST(:stuck AS jsonb))
""")


@dataclass(frozen=True, slots=True)
class Waiting:
    """Steps of one model, class and namespace that wait, or will. As `Demand`, by the name of the model."""

    model: str
    priority: Priority
    steps: int
    oldest: datetime
    mean: datetime | None = None
    namespace: str = ""
    deadline: datetime | None = None
    work: timedelta = timedelta(seconds=5)
    ready: datetime | None = None


@dataclass(frozen=True, slots=True)
class FleetDemand:
    """What is asked of the fleet."""

    #: The catalogue.
    models: Sequence[Model]
    waiting: Sequence[Waiting]
    #: By model and class, steps a second.
    usage: Mapping[str, Mapping[Priority, float]]
    #: By model, what the settings want.
    wishes: Mapping[str, OperatorTarget]
    #: By worker, how many steps of each namespace it works on.
    working: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    #: By worker, how long that will take.
    in_flight: Mapping[str, InFlight] = field(default_factory=dict)


#: Finds out what is asked, in the transaction of the one that plans.
ReadDemand = Callable[[UnitOfWork], FleetDemand]


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What a turn did."""

    plan: Plan
    #: Claims that the ledger refused though they were planned, by configuration.
    refused: Mapping[str, str]
    #: Hosts that were declared lost.
    lost: tuple[str, ...]


def reconcile(database: Database, ask: ReadDemand, terms: ReconcileTimes) -> Reconciled | None:
    """One turn; None when another control worker is at it, which then is the one that asks."""
    with database.work() as work:
        row = work.row(_TRY_TO_LEAD, {"key": _LEADER})
        if row is None or not row.leads:
            return None
        asked = ask(work)
        turn = ReconcilePass(open_session(work), terms)
        turn.books.change(lambda found: rules.expire(found, turn.books.now), "no agent began it in time")
        lost = _lose_silent_hosts(turn)
        _follow_stops(turn)
        turn.books.close()
        seen = observation.observe(turn.books, asked.models, asked.usage, asked.wishes, asked.in_flight)
        planned = isolated(
            seen.fleet, _demand(seen, asked.waiting), lambda fleet, demand: placement.plan(fleet, demand, seen.now)
        )
        plan = planned.result
        _note_broken(turn, planned.broken)
        _retire_changed(turn, seen)
        for action in plan.actions:
            _apply(turn, seen.fleet, action)
        turn.close()
        _note_refusals(turn, seen, plan, asked.waiting)
        _answer_starts(turn, seen)
        asking = {one.namespace for one in asked.waiting if one.namespace}
        held = [
            accounts.HeldDevices(one.id, frozenset(one.bytes), one.namespace)
            for one in turn.books.ledger.reservations.values()
            if one.state is not ReservationState.HELD  # no process touches its bytes yet
        ]
        accounts.record_usage(work, held, asked.working, asking)
        for statement in (_FORGET, _FORGET_ORDERS, _FORGET_DEFRAGMENTATIONS):
            work.run(statement, {"age": _KEPT})
    return Reconciled(plan, turn.refused, lost)


def explain(database: Database, asked: FleetDemand, model: str) -> Explanation:
    """
    How a model of the catalogue stands, and what a turn would do for it now. Nothing is changed or locked.

    Of a model that nobody waits for, it is said what would be done for a first step.
    """
    seen = _look(database, asked)
    demand = _demand(seen, asked.waiting)
    configuration = seen.configurations[model]

    def explained(demand: Sequence[Demand]) -> Explanation:
        plan = isolated(seen.fleet, demand, lambda fleet, demand: placement.plan(fleet, demand, seen.now)).result
        return explanation.explain(seen.fleet, demand, plan, seen.now, configuration)

    found = explained(demand)
    if found.condition is not Condition.UNASKED:
        return found
    first = Demand(configuration.id, Priority.STANDARD, 1, seen.now)
    return explanation.unasked(explained([*demand, first]))


def preview_defragmentation(database: Database, asked: FleetDemand) -> Defragmentation:
    """What `defragment` would do now. Nothing is changed or locked."""
    seen = _look(database, asked)
    return defragmenting.defragment(seen.fleet, _demand(seen, asked.waiting), seen.now)


def defragment(database: Database, ask: ReadDemand, terms: ReconcileTimes) -> Defragmentation:
    """Move idle pools so that models fit that fit nowhere, within what may be disturbed; what it gains is kept."""
    with database.work() as work:
        work.run(_LEAD, {"key": _LEADER})
        asked = ask(work)
        turn = ReconcilePass(open_session(work), terms)
        seen = observation.observe(turn.books, asked.models, asked.usage, asked.wishes, asked.in_flight)
        made = isolated(
            seen.fleet,
            _demand(seen, asked.waiting),
            lambda fleet, demand: defragmenting.defragment(fleet, demand, seen.now),
        )
        found = made.result
        _note_broken(turn, made.broken)
        for move in found.moves:
            _apply(turn, seen.fleet, move)
        turn.close()
        if found.moves:
            values = {
                "moves": json.dumps([{"pool": one.pool, "reason": one.reason} for one in found.moves]),
                "gains": json.dumps([{"model": one.model, "reason": one.reason} for one in found.gains]),
                "stuck": json.dumps([{"model": one.model, "reason": one.reason} for one in found.stuck]),
            }
            work.run(_KEEP_DEFRAGMENTATION, values)
    return found


def _look(database: Database, asked: FleetDemand) -> Observation:
    with database.work() as work:
        work.run(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
        books = open_session(work, to_read=True)
        return observation.observe(books, asked.models, asked.usage, asked.wishes, asked.in_flight)


def _lose_silent_hosts(turn: ReconcilePass) -> tuple[str, ...]:
    """A host is lost when nobody was heard of it for long: neither its agent nor any of its pools."""
    lost = []
    for row in turn.work.rows(_SILENT, {"age": turn.terms.lost_after}):
        host: str = row.name
        held = [one for one in turn.books.ledger.reservations.values() if one.host == host]
        if not any(one.state is ReservationState.ACTIVE for one in held):
            turn.lose_host(host, "its host was declared lost")
            lost.append(host)
    return tuple(lost)


def _follow_stops(turn: ReconcilePass) -> None:
    """Do what operators ask to be stopped. It comes first: the plan sees it done."""
    for order in turn.work.rows(_STOPS):
        for pool in turn.work.rows(_OF_ORDER, {"pool": order.pool_id, "model": order.model}):
            with _GUARD.item("pool", pool.id):
                turn.stop(pool.id, Desired.DRAIN, order.reason)
        turn.work.run(_ANSWER, {"id": order.id})


def _apply(turn: ReconcilePass, fleet: Cluster, action: Action) -> None:
    """Do one thing of a plan; one that breaks is refused with the reason, and stops none of the others."""
    with _GUARD.item("action", str(action)[:_NAMED]) as failed:
        turn.apply(fleet, action)
    if failed and isinstance(action, StartPool | GrantReserve):
        turn.refused[action.configuration] = f"it could not be granted: {_said(failed[0])}"


def _note_broken(turn: ReconcilePass, broken: Mapping[str, Exception]) -> None:
    """Say of the configurations that no plan could be made for why that is."""
    for configuration, error in broken.items():
        with _GUARD.item("configuration", configuration):
            turn.refused[configuration] = f"no plan could be made for it: {_said(error)}"
            raise error


def _said(error: Exception) -> str:
    return texts.printable(f"{type(error).__name__}: {error}", _SENTENCE)


def _retire_changed(turn: ReconcilePass, seen: Observation) -> None:
    """Stop pools whose entry has changed, or is gone: what they load nobody asks for any more."""
    known = {configuration.id for configuration in seen.fleet.configurations}
    for pool in seen.fleet.pools:
        if pool.configuration not in known and pool.state in COMING:
            with _GUARD.item("pool", pool.id):
                turn.stop(pool.id, Desired.DRAIN, "its entry in the catalogue has changed")


def _demand(seen: Observation, waiting: Iterable[Waiting]) -> list[Demand]:
    """What waits, by configuration. What waits for a model that is not in the catalogue is refused elsewhere."""
    return [
        Demand(
            configuration=seen.configurations[one.model].id,
            priority=one.priority,
            steps=one.steps,
            oldest=one.oldest,
            mean=one.mean,
            namespace=one.namespace,
            deadline=one.deadline,
            work=one.work,
            ready=one.ready,
        )
        for one in waiting
        if one.model in seen.configurations
    ]


def _note_refusals(turn: ReconcilePass, seen: Observation, plan: Plan, waiting: Iterable[Waiting]) -> None:
    """Keep every refusal of this turn, and no other."""
    found = {one.configuration: one for one in plan.refusals}
    models = {one.id: one.model for one in seen.fleet.configurations}
    for configuration, reason in turn.refused.items():
        found[configuration] = Refusal(configuration, models[configuration], reason, 0)
    for model in {one.model for one in waiting} - seen.configurations.keys():
        found[model] = Refusal(model, model, "it is not in the catalogue of the control workers (catalog.files)", 0)
    nowhere = {one.id for one in seen.fleet.configurations if not one.files}
    for refusal in found.values():
        reason = refusal.reason
        if refusal.configuration in nowhere:
            told = turn.work.row(_NOT_SERVED, {"start": not_served(refusal.model, "")})
            reason = reason if told is None else f"{reason}; on {told.name}: {told.problem}"
        values = {
            "configuration": refusal.configuration,
            "model": refusal.model,
            "reason": reason,
            "needs": refusal.needs_bytes,
            "estimate": None if refusal.estimate is None else refusal.estimate.total_seconds(),
        }
        turn.work.run(_REFUSE, values)
    turn.work.run(_FORGET_REFUSALS, {"refused": list(found)})


def _answer_starts(turn: ReconcilePass, seen: Observation) -> None:
    """An order to start is done once a pool of the model has begun."""
    held = turn.books.ledger.reservations.values()
    there = {one.configuration for one in held if one.state is ReservationState.ACTIVE and not one.draining}
    for order in seen.starts:
        configuration = seen.configurations.get(order.model)
        if configuration is None or configuration.id in there:
            turn.work.run(_ANSWER, {"id": order.id})
