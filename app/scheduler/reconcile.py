"""
Reconcile: observe, plan and apply, in one transaction and by one control worker at a time.

It writes what is desired of pools and what the ledger grants. It calls no agent and no pool, and touches no device.
Only the worker that plans reads the demand. A pool, a model or a command that cannot be planned for is logged, refused
with the reason, and stops none of the others.
A plan that the ledger refuses in part is applied without that part; the refusal is stored with its reason.
The agents are told after the commit. One that is not told finds the change at its next heartbeat.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import psycopg
from sqlalchemy import text

from app.access import accounts
from app.fleet.ledger import rules
from app.fleet.ledger.reservation import ReservationState
from app.fleet.ledger.session import open_session
from app.fleet.pool import COMING, Desired, PoolState
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import DatabaseUnreachable
from app.kernel.loop_guard import LoopGuard
from app.kernel.priority import Priority
from app.kernel.security import texts
from app.scheduler import arrival_patterns, observation
from app.scheduler.isolation import isolated
from app.scheduler.observation import FleetDemand, Observation
from app.scheduler.planner import defragmentation as defragmenting
from app.scheduler.planner import explanation, placement
from app.scheduler.planner.cluster import Cluster
from app.scheduler.planner.defragmentation import Defragmentation
from app.scheduler.planner.demand import WaitingSteps
from app.scheduler.planner.explanation import Condition, Explanation
from app.scheduler.planner.plan import Action, GrantReserve, Plan, Refusal, StartPool
from app.scheduler.reconcile_pass import ReconcilePass, ReconcileTimes

#: Key of the advisory lock of the worker that reconciles.
_LEADER = 7_205_759_403_793
#: How long rows of ended pools and of completed commands are kept.
_KEPT = timedelta(days=1)

#: Why a model is not served that rules or operators have paused.
_PAUSED = "the model is paused (the setting serving.paused)"
#: Characters of a reason, and of an action in the log.
_SENTENCE, _NAMED = 1_000, 300
#: An error in one pool or one model is logged, and stops none of the others.
_GUARD = LoopGuard(psycopg.Error, DatabaseUnreachable)

_TRY_TO_LEAD = text("SELECT pg_try_advisory_xact_lock(:key) AS leads")
_LEAD = text("SELECT pg_advisory_xact_lock(:key)")
_SILENT_HOSTS = text("SELECT name FROM host WHERE lost_at IS NULL AND agent_until < now() - :age ORDER BY name")
_STORE_REFUSALS = text("""
    WITH gone AS (DELETE FROM refusal WHERE configuration <> ALL(CAST(:configurations AS text[])))
    INSERT INTO refusal (configuration, model, reason, needs_bytes, estimate_seconds)
    SELECT * FROM unnest(CAST(:configurations AS text[]), CAST(:models AS text[]), CAST(:reasons AS text[]),
        CAST(:needs AS bigint[]), CAST(:estimates AS double precision[]))
    ON CONFLICT (configuration) DO UPDATE SET model = EXCLUDED.model, reason = EXCLUDED.reason,
        needs_bytes = EXCLUDED.needs_bytes, estimate_seconds = EXCLUDED.estimate_seconds, at = now()
""")
_STOP_COMMANDS = text("""
    SELECT id::text, model, pool_id, reason FROM pool_command
    WHERE command = 'stop' AND done_at IS NULL ORDER BY created_at
""")
_COMMANDED_POOLS = text("""
    SELECT pool.id::text FROM pool JOIN reservation ON reservation.id = pool.id
    WHERE reservation.state <> 'released' AND CASE
        WHEN CAST(:pool AS uuid) IS NULL THEN pool.model = :model ELSE pool.id = CAST(:pool AS uuid)
    END
""")
_COMPLETE_COMMAND = text("UPDATE pool_command SET done_at = now() WHERE id = CAST(:id AS uuid)")
# Postgres looks the ids of an array up one by one; it may join a subquery with the whole table.
_DELETE_RESERVATIONS = text("""
    DELETE FROM reservation WHERE id = ANY(ARRAY(
        SELECT id FROM reservation WHERE state = 'released' AND released_at < now() - :age
        ORDER BY released_at LIMIT 200
    ))
""")
_DELETE_COMMANDS = text("""
    DELETE FROM pool_command WHERE id = ANY(ARRAY(
        SELECT id FROM pool_command WHERE done_at < now() - :age ORDER BY done_at LIMIT 1000
    ))
""")
_DELETE_DEFRAGMENTATIONS = text("DELETE FROM defragmentation WHERE at < now() - 30 * CAST(:age AS interval)")
_STORE_DEFRAGMENTATION = text("""
    INSERT INTO defragmentation (moves, gains, stuck)
    VALUES (CAST(:moves AS jsonb), CAST(:gains AS jsonb), CAST(:stuck AS jsonb))
""")


#: Reads the demand, in the transaction of the worker that plans.
ReadDemand = Callable[[UnitOfWork], FleetDemand]
#: Tells the agents of these hosts, after the commit, that their desired pools have changed.
TellAgents = Callable[[Collection[str]], object]


@dataclass(frozen=True, slots=True)
class Reconciled:
    """The result of a reconcile pass."""

    plan: Plan
    #: By configuration, why the ledger refused a planned claim.
    refused: Mapping[str, str]
    #: Hosts that were declared lost.
    lost: tuple[str, ...]
    #: Nothing waits for a model, everything desired is done, and no pool works or changes.
    quiet: bool


def reconcile(
    database: Database, read_demand: ReadDemand, times: ReconcileTimes, tell_agents: TellAgents = lambda _: None
) -> Reconciled | None:
    """Run one pass; returns None, and does not read the demand, while another control worker runs one."""
    with database.work() as work:
        row = work.row(_TRY_TO_LEAD, {"key": _LEADER})
        if row is None or not row.leads:
            return None
        demand = read_demand(work)
        pass_ = ReconcilePass(open_session(work), times)
        session = pass_.session
        session.change(lambda ledger: rules.expire(ledger, session.now), "no agent began it in time")
        lost = _lose_silent_hosts(pass_)
        _follow_stop_commands(pass_)
        session.write()
        seen = observation.observe(session, demand)
        planned = isolated(
            seen.cluster, demand.served, lambda cluster, waiting: placement.plan(cluster, waiting, seen.now)
        )
        plan = planned.result
        _refuse_broken(pass_, planned.broken)
        _stop_changed(pass_, seen)
        _stop_paused(pass_, seen, demand)
        for action in plan.actions:
            _apply(pass_, seen.cluster, action)
        pass_.write()
        _store_refusals(pass_, seen, plan, demand)
        _complete_start_commands(pass_, seen)
        _count_device_time(pass_, demand)
        arrival_patterns.write(work, seen.patterns)
        for statement in (_DELETE_RESERVATIONS, _DELETE_COMMANDS, _DELETE_DEFRAGMENTATIONS):
            work.run(statement, {"age": _KEPT})
        work.after_commit(lambda: tell_agents(sorted(pass_.hosts_to_notify)))
    at_rest = all(pool.state is PoolState.SERVING and not pool.busy for pool in seen.cluster.pools)
    done = not (plan.actions or plan.refusals or pass_.refused or lost or seen.starts)
    return Reconciled(plan, pass_.refused, lost, quiet=at_rest and done and not demand.waiting)


def explain(database: Database, demand: FleetDemand, models: Sequence[str]) -> dict[str, Explanation]:
    """
    Why models of the catalogue run or do not, and what a pass would do for each now. Changes and locks nothing.

    For a model without demand it explains what would be done for a first step.
    """
    seen = observe_only(database, demand)

    def planned(waiting: Sequence[WaitingSteps]) -> Callable[[str], Explanation]:
        plan = isolated(
            seen.cluster, waiting, lambda cluster, waiting: placement.plan(cluster, waiting, seen.now)
        ).result
        return lambda model: explanation.explain(seen.cluster, waiting, plan, seen.now, seen.configurations[model])

    explained, found = planned(demand.served), {}
    for model in models:
        if model in demand.paused:
            steps = sum(group.steps for group in demand.waiting if group.model == model)
            condition = Condition.REFUSED if steps else Condition.UNASKED
            found[model] = Explanation(seen.configurations[model].id, model, condition, _PAUSED, steps, None)
            continue
        found[model] = explained(model)
        if found[model].condition is Condition.UNASKED:
            first = WaitingSteps(model, Priority.STANDARD, 1, seen.now)
            alone = planned([*demand.served, first])(model)
            found[model] = explanation.without_demand(alone, seen.cluster, seen.now)
    return found


def preview_defragmentation(database: Database, demand: FleetDemand) -> Defragmentation:
    """What `defragment` would do now. Changes and locks nothing."""
    seen = observe_only(database, demand)
    return defragmenting.defragment(seen.cluster, demand.served, seen.now)


def defragment(
    database: Database, read_demand: ReadDemand, times: ReconcileTimes, tell_agents: TellAgents = lambda _: None
) -> Defragmentation:
    """Move idle pools, within a budget, so that models fit that now fit nowhere. What was moved is stored."""
    with database.work() as work:
        work.run(_LEAD, {"key": _LEADER})
        demand = read_demand(work)
        pass_ = ReconcilePass(open_session(work), times)
        seen = observation.observe(pass_.session, demand)
        made = isolated(
            seen.cluster,
            demand.served,
            lambda cluster, waiting: defragmenting.defragment(cluster, waiting, seen.now),
        )
        found = made.result
        _refuse_broken(pass_, made.broken)
        for move in found.moves:
            _apply(pass_, seen.cluster, move)
        pass_.write()
        work.after_commit(lambda: tell_agents(sorted(pass_.hosts_to_notify)))
        if found.moves:
            values = {
                "moves": json.dumps([{"pool": one.pool, "reason": one.reason} for one in found.moves]),
                "gains": json.dumps([{"model": one.model, "reason": one.reason} for one in found.gains]),
                "stuck": json.dumps([{"model": one.model, "reason": one.reason} for one in found.stuck]),
            }
            work.run(_STORE_DEFRAGMENTATION, values)
    return found


def observe_only(database: Database, demand: FleetDemand) -> Observation:
    """The cluster as it is now. Changes and locks nothing."""
    with database.work() as work:
        work.run(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
        return observation.observe(open_session(work, to_read=True), demand)


def _lose_silent_hosts(pass_: ReconcilePass) -> tuple[str, ...]:
    """Declare hosts lost of which neither the agent nor any pool was heard for long."""
    lost = []
    for row in pass_.work.rows(_SILENT_HOSTS, {"age": pass_.times.lost_after}):
        host: str = row.name
        held = [one for one in pass_.session.ledger.reservations.values() if one.host == host]
        if not any(one.state is ReservationState.ACTIVE for one in held):
            pass_.lose_host(host, "its host was declared lost")
            lost.append(host)
    return tuple(lost)


def _follow_stop_commands(pass_: ReconcilePass) -> None:
    """Stop the pools that operators want stopped. This comes first, so that the plan sees it done."""
    for command in pass_.work.rows(_STOP_COMMANDS):
        for pool in pass_.work.rows(_COMMANDED_POOLS, {"pool": command.pool_id, "model": command.model}):
            with _GUARD.item("pool", pool.id):
                pass_.stop(pool.id, Desired.DRAIN, command.reason)
        pass_.work.run(_COMPLETE_COMMAND, {"id": command.id})


def _apply(pass_: ReconcilePass, cluster: Cluster, action: Action) -> None:
    """Apply one action of a plan. One that raises is refused with the reason, and stops none of the others."""
    with _GUARD.item("action", str(action)[:_NAMED]) as failed:
        pass_.apply(cluster, action)
    if failed and isinstance(action, StartPool | GrantReserve):
        pass_.refused[action.configuration] = f"it could not be granted: {_description(failed[0])}"


def _refuse_broken(pass_: ReconcilePass, broken: Mapping[str, Exception]) -> None:
    """Refuse the configurations for which no plan could be made, and log why."""
    for configuration, error in broken.items():
        with _GUARD.item("configuration", configuration):
            pass_.refused[configuration] = f"no plan could be made for it: {_description(error)}"
            raise error


def _description(error: Exception) -> str:
    return texts.printable(f"{type(error).__name__}: {error}", _SENTENCE)


def _stop_changed(pass_: ReconcilePass, seen: Observation) -> None:
    """Stop pools whose entry in the catalogue has changed, or is gone."""
    known = {configuration.id for configuration in seen.cluster.configurations}
    for pool in seen.cluster.pools:
        if pool.configuration not in known and pool.state in COMING:
            with _GUARD.item("pool", pool.id):
                pass_.stop(pool.id, Desired.DRAIN, "its entry in the catalogue has changed")


def _stop_paused(pass_: ReconcilePass, seen: Observation, demand: FleetDemand) -> None:
    """Stop the pools of models that are paused."""
    paused = {configuration.id for name, configuration in seen.configurations.items() if name in demand.paused}
    for pool in seen.cluster.pools:
        if pool.configuration in paused and pool.state in COMING:
            with _GUARD.item("pool", pool.id):
                pass_.stop(pool.id, Desired.DRAIN, _PAUSED)


def _store_refusals(pass_: ReconcilePass, seen: Observation, plan: Plan, demand: FleetDemand) -> None:
    """Store the refusals of this pass, and delete all others."""
    found = {one.configuration: one for one in plan.refusals}
    models = {one.id: one.model for one in seen.cluster.configurations}
    for configuration, reason in pass_.refused.items():
        found[configuration] = Refusal(configuration, models[configuration], reason, 0)
    for model in {group.model for group in demand.waiting} & demand.paused & seen.configurations.keys():
        configuration = seen.configurations[model].id
        found[configuration] = Refusal(configuration, model, _PAUSED, 0)
    for model in {group.model for group in demand.waiting} - seen.configurations.keys():
        found[model] = Refusal(
            model, model, "it is not in the catalogue of the control workers (catalog.files, arriero models pull)", 0
        )
    refusals = list(found.values())
    values = {
        "configurations": [one.configuration for one in refusals],
        "models": [one.model for one in refusals],
        "reasons": [one.reason for one in refusals],
        "needs": [one.needs_bytes for one in refusals],
        "estimates": [None if one.estimate is None else one.estimate.total_seconds() for one in refusals],
    }
    pass_.work.run(_STORE_REFUSALS, values)


def _complete_start_commands(pass_: ReconcilePass, seen: Observation) -> None:
    """A command to start is complete once a pool of the model has begun."""
    reservations = pass_.session.ledger.reservations.values()
    begun = {one.configuration for one in reservations if one.state is ReservationState.ACTIVE and not one.draining}
    for command in seen.starts:
        configuration = seen.configurations.get(command.model)
        if configuration is None or configuration.id in begun:
            pass_.work.run(_COMPLETE_COMMAND, {"id": command.id})


def _count_device_time(pass_: ReconcilePass, demand: FleetDemand) -> None:
    """Count the device time of each namespace since the last pass."""
    held = [
        accounts.HeldDevices(one.id, frozenset(one.bytes), one.namespace)
        for one in pass_.session.ledger.reservations.values()
        if one.state is not ReservationState.HELD  # no process touches its bytes yet
    ]
    working = {worker: in_flight.steps for worker, in_flight in demand.in_flight.items()}
    accounts.record_usage(pass_.work, held, working, {group.namespace for group in demand.waiting if group.namespace})
