"""
Reconcile: observe, plan, apply, in one transaction and by one of all control workers at a time.

It writes what is desired of pools and what the ledger grants; it asks no agent and no pool, and touches no device.
A plan that the ledger refuses in part is applied without that part, and the refusal is kept with its reason.
Agents hear of it at the commit, by a notification of Postgres, and find it at their next beat if that was lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy import text

from app.fleet import explanation, ledger, observation, placement
from app.fleet.books import Books, next_epoch, open_books
from app.fleet.explanation import Explanation
from app.fleet.fleet import COMING, Demand, Priority, SetAside
from app.fleet.model import Model
from app.fleet.needs import Wish
from app.fleet.observation import Observation
from app.fleet.placement import Action, DropReserve, GrantReserve, MovePool, Plan, Refusal, StartPool, Stop, StopPool
from app.fleet.pool import Desired
from app.fleet.reservation import Claim, State
from app.kernel import ids, log
from app.kernel.database import Database, Work

_log = log.get(__name__)

#: The task that workers listen for.
RECONCILE = "workers.jobs.run_reconcile"
#: The channel on which agents hear that something is desired; the payload is the host's name.
CHANNEL = "arriero_fleet"

#: Held by the one that reconciles.
_LEADER = 7_205_759_403_793
#: How long ended pools are kept to be looked at.
_KEPT = timedelta(days=1)
#: Time in which the attained seconds of a namespace fade by half.
_HALF_LIFE = 3600.0

_LEAD = text("SELECT pg_try_advisory_xact_lock(:key) AS leads")
_INSERT_POOL = text("""
    INSERT INTO pool (id, configuration, model, slots, purpose, reason, desired, estimate_seconds)
    VALUES (CAST(:id AS uuid), :configuration, :model, :slots, :purpose, :reason, 'run', :estimate)
""")
_STOP_POOL = text("""
    UPDATE pool SET desired = :desired, stop_reason = COALESCE(stop_reason, :reason), stop_at = COALESCE(stop_at, now())
    WHERE id = CAST(:id AS uuid) AND desired <> 'preempt'
""")
_SILENT = text("SELECT name FROM host WHERE state <> 'lost' AND agent_until < now() - :age ORDER BY name")
_LOSE_HOST = text("UPDATE host SET state = 'lost', agent_epoch = 0 WHERE name = :host")
_REFUSE = text("""
    INSERT INTO refusal (configuration, model, reason, needs_bytes, estimate_seconds)
    VALUES (:configuration, :model, :reason, :needs, :estimate)
    ON CONFLICT (configuration) DO UPDATE SET model = :model, reason = :reason, needs_bytes = :needs,
        estimate_seconds = :estimate, at = now()
""")
_FORGET_REFUSALS = text("DELETE FROM refusal WHERE configuration <> ALL(:refused)")
_STOPS = text("""
    SELECT id::text, model, pool_id, reason FROM pool_order WHERE what = 'stop' AND done_at IS NULL ORDER BY created_at
""")
_OF_ORDER = text("""
    SELECT pool.id::text FROM pool JOIN reservation ON reservation.id = pool.id
    WHERE reservation.state <> 'released' AND CASE
        WHEN CAST(:pool AS uuid) IS NULL THEN pool.model = :model ELSE pool.id = CAST(:pool AS uuid)
    END
""")
_ANSWER = text("UPDATE pool_order SET done_at = now() WHERE id = CAST(:id AS uuid)")
_NOTIFY = text("SELECT pg_notify(:channel, :host)")
_FORGET = text("""
    DELETE FROM reservation WHERE id IN (
        SELECT id FROM reservation WHERE state = 'released' AND released_at < now() - :age LIMIT 200
    )
""")
_FORGET_ORDERS = text("DELETE FROM pool_order WHERE done_at < now() - :age")
# A control worker that was away for long counts a minute, not all of the time in which nobody looked.
_COUNT_SECONDS = text("""
    WITH turn AS (
        SELECT namespace, LEAST(extract(epoch FROM now() - counted_at), 60) AS passed,
               now() >= period_began + period_seconds * interval '1 s' AS over
        FROM quota WHERE namespace = :namespace
    )
    UPDATE quota SET
        device_seconds = CASE WHEN over THEN 0 ELSE device_seconds END + :devices * passed,
        attained_seconds = attained_seconds * power(0.5, passed / :half_life) + :devices * passed,
        period_began = CASE WHEN over THEN now() ELSE period_began END,
        counted_at = now()
    FROM turn WHERE quota.namespace = turn.namespace
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
class Terms:
    """How long who has for what."""

    #: An agent has that long to begin a pool that was granted.
    hold: timedelta
    #: A pool that makes room has that long to finish its steps, before it hands them back.
    drain: timedelta
    #: A host of which nobody heard for that long, neither agent nor pools, is declared lost.
    lost_after: timedelta


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What a turn did."""

    plan: Plan
    #: Claims that the ledger refused though they were planned, by configuration.
    refused: Mapping[str, str]
    #: Hosts that were declared lost.
    lost: tuple[str, ...]


@dataclass(slots=True)
class _Turn:
    """One turn, as far as it has come."""

    books: Books
    terms: Terms
    #: By configuration, the claims that the ledger refused though they were planned.
    refused: dict[str, str] = field(default_factory=dict)
    #: Hosts whose agents have something to do.
    nudged: set[str] = field(default_factory=set)

    @property
    def work(self) -> Work:
        """The transaction."""
        return self.books.work


def reconcile(
    database: Database,
    models: Sequence[Model],
    waiting: Sequence[Waiting],
    usage: Mapping[str, Mapping[Priority, float]],
    wishes: Mapping[str, Wish],
    terms: Terms,
) -> Reconciled | None:
    """
    One turn; None when another control worker is at it.

    `usage` says by model and class how many steps a second ask for it, `wishes` by model what the settings want.
    """
    with database.work() as work:
        row = work.row(_LEAD, {"key": _LEADER})
        if row is None or not row.leads:
            return None
        turn = _Turn(open_books(work), terms)
        turn.books.change(lambda found: ledger.expire(found, turn.books.now), "no agent began it in time")
        lost = _lose_silent_hosts(turn)
        _follow_stops(turn)
        seen = observation.observe(turn.books, models, usage, wishes)
        plan = placement.plan(seen.fleet, _demand(seen, waiting), seen.now)
        _retire_changed(turn, seen)
        for action in plan.actions:
            _apply(turn, seen, action)
        turn.books.close()
        _note_refusals(turn, seen, plan, waiting)
        _answer_starts(turn, seen)
        _count_seconds(turn)
        work.run(_FORGET, {"age": _KEPT})
        work.run(_FORGET_ORDERS, {"age": _KEPT})
        for host in sorted(turn.nudged):
            work.run(_NOTIFY, {"channel": CHANNEL, "host": host})
    for action in plan.actions:
        _log.info("planned", action=type(action).__name__, **_told(action))
    return Reconciled(plan, turn.refused, lost)


def explain(
    database: Database,
    models: Sequence[Model],
    waiting: Sequence[Waiting],
    usage: Mapping[str, Mapping[Priority, float]],
    wishes: Mapping[str, Wish],
    model: str,
) -> Explanation:
    """How a model of the catalogue stands, and what a turn would do for it now. Nothing is changed or locked."""
    with database.work() as work:
        work.run(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
        seen = observation.observe(open_books(work, to_read=True), models, usage, wishes)
    demand = _demand(seen, waiting)
    plan = placement.plan(seen.fleet, demand, seen.now)
    return explanation.explain(seen.fleet, demand, plan, seen.now, seen.configurations[model])


def _lose_silent_hosts(turn: _Turn) -> tuple[str, ...]:
    """A host is lost when nobody was heard of it for long: neither its agent nor any of its pools."""
    lost = []
    for row in turn.work.rows(_SILENT, {"age": turn.terms.lost_after}):
        host: str = row.name
        held = [one for one in turn.books.ledger.reservations.values() if one.host == host]
        if not any(one.state is State.ACTIVE for one in held):
            lose(turn.books, host, "its host was declared lost")
            lost.append(host)
    return tuple(lost)


def lose(books: Books, host: str, why: str) -> None:
    """Declare a host lost: its bytes are given back, and nothing is granted there before its agent joins anew."""
    books.change(lambda found: ledger.lose(found, host), why)
    books.work.run(_LOSE_HOST, {"host": host})
    _log.warning("host_lost", host=host, why=why)


def _follow_stops(turn: _Turn) -> None:
    """Do what operators ask to be stopped. It comes first: the plan sees it done."""
    for order in turn.work.rows(_STOPS):
        for pool in turn.work.rows(_OF_ORDER, {"pool": order.pool_id, "model": order.model}):
            _stop(turn, pool.id, Desired.DRAIN, order.reason)
        turn.work.run(_ANSWER, {"id": order.id})


def _retire_changed(turn: _Turn, seen: Observation) -> None:
    """Stop pools whose entry has changed, or is gone: what they load nobody asks for any more."""
    known = {configuration.id for configuration in seen.fleet.configurations}
    for pool in seen.fleet.pools:
        if pool.configuration not in known and pool.state in COMING:
            _stop(turn, pool.id, Desired.DRAIN, "its entry in the catalogue has changed")


def _apply(turn: _Turn, seen: Observation, action: Action) -> None:
    match action:
        case StartPool():
            reason = action.reason
            _start(turn, seen, action, action.configuration, action.bytes, str(action.purpose), reason, action.after)
        case StopPool():
            desired = Desired.PREEMPT if action.how is Stop.PREEMPT else Desired.DRAIN
            _stop(turn, action.pool, desired, action.reason)
        case MovePool():
            moved = next(pool for pool in seen.fleet.pools if pool.id == action.pool)
            if _start(turn, seen, action, moved.configuration, action.bytes, "move", action.reason, frozenset()):
                _stop(turn, action.pool, Desired.DRAIN, action.reason)
        case GrantReserve():
            aside = SetAside(str(ids.new_id()), action.configuration, action.bytes)
            refused = turn.books.change(lambda found: ledger.set_aside(found, aside))
            if refused is not None:
                turn.refused[action.configuration] = refused.reason
        case DropReserve():
            turn.books.change(lambda found: ledger.drop_reserve(found, action.reserve))


def _start(
    turn: _Turn,
    seen: Observation,
    action: StartPool | MovePool,
    configuration_id: str,
    sizes: Mapping[str, int],
    purpose: str,
    reason: str,
    after: frozenset[str],
) -> bool:
    """Grant a pool; False when the ledger refuses."""
    configuration = next(one for one in seen.fleet.configurations if one.id == configuration_id)
    hosts = {device.id: device.host for device in seen.fleet.devices}
    host = hosts[next(iter(sizes))]
    wait = turn.terms.hold + (turn.terms.drain + turn.terms.hold if after else timedelta(0))
    wanted = Claim(
        id=str(ids.new_id()),
        epoch=next_epoch(turn.work),
        host=host,
        configuration=configuration.id,
        bytes=sizes,
        lease_until=turn.books.now + wait,
        after=after,
        pinned=configuration.pinned,
        namespace=action.namespace if isinstance(action, StartPool) else "",
    )
    refused = turn.books.change(lambda found: ledger.claim(found, wanted))
    if refused is not None:
        turn.refused[configuration.id] = refused.reason
        _log.warning("claim_refused", configuration=configuration.id, host=host, reason=refused.reason)
        return False
    turn.books.close()
    values = {
        "id": wanted.id,
        "configuration": configuration.id,
        "model": configuration.model,
        "slots": configuration.slots,
        "purpose": purpose,
        "reason": reason,
        "estimate": action.estimate.total_seconds(),
    }
    turn.work.run(_INSERT_POOL, values)
    turn.nudged.add(host)
    return True


def _stop(turn: _Turn, pool: str, desired: Desired, reason: str) -> None:
    """Let a pool end. One that no process was begun for is given back at once."""
    held = turn.books.ledger.reservations.get(pool)
    if held is None:
        return
    if held.state is State.HELD:
        turn.books.change(lambda found: ledger.cancel(found, pool), reason)
    else:
        turn.books.change(lambda found: ledger.drain(found, pool))
    turn.work.run(_STOP_POOL, {"id": pool, "desired": desired, "reason": reason})
    turn.nudged.add(held.host)


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


def _note_refusals(turn: _Turn, seen: Observation, plan: Plan, waiting: Iterable[Waiting]) -> None:
    """Keep every refusal of this turn, and no other."""
    found = {one.configuration: one for one in plan.refusals}
    models = {one.id: one.model for one in seen.fleet.configurations}
    for configuration, reason in turn.refused.items():
        found[configuration] = Refusal(configuration, models[configuration], reason, 0)
    for model in {one.model for one in waiting} - seen.configurations.keys():
        found[model] = Refusal(model, model, "it is not in the catalogue of the control workers (catalog.files)", 0)
    for refusal in found.values():
        values = {
            "configuration": refusal.configuration,
            "model": refusal.model,
            "reason": refusal.reason,
            "needs": refusal.needs_bytes,
            "estimate": None if refusal.estimate is None else refusal.estimate.total_seconds(),
        }
        turn.work.run(_REFUSE, values)
    turn.work.run(_FORGET_REFUSALS, {"refused": list(found)})


def _answer_starts(turn: _Turn, seen: Observation) -> None:
    """An order to start is done once a pool of the model is there, or on its way."""
    there = {one.configuration for one in turn.books.ledger.reservations.values() if not one.draining}
    for order in seen.starts:
        configuration = seen.configurations.get(order.model)
        if configuration is None or configuration.id in there:
            turn.work.run(_ANSWER, {"id": order.id})


def _count_seconds(turn: _Turn) -> None:
    """Count the devices that each namespace with a quota has."""
    for namespace in turn.books.ledger.quotas:
        held = [one for one in turn.books.ledger.reservations.values() if one.namespace == namespace]
        devices = sum(len(one.bytes) for one in held if one.state is not State.HELD)
        turn.work.run(_COUNT_SECONDS, {"namespace": namespace, "devices": devices, "half_life": _HALF_LIFE})


def _told(action: Action) -> dict[str, object]:
    """What the log says of an action."""
    match action:
        case StartPool():
            return {"configuration": action.configuration, "devices": sorted(action.bytes), "reason": action.reason}
        case StopPool() | MovePool():
            return {"pool": action.pool, "reason": action.reason}
        case GrantReserve():
            return {"configuration": action.configuration, "devices": sorted(action.bytes), "reason": action.reason}
        case DropReserve():
            return {"reserve": action.reserve, "reason": action.reason}
