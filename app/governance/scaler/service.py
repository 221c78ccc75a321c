"""
The scaler: decides in one transaction how many hosts of each class are wanted, and keeps each request until it was
accepted.

One worker at a time decides, under an advisory lock; one at a time sends, under a lease. A request is stored before it
is sent and keeps its id, so that a receiver can tell a repetition. A newer one replaces one that was not accepted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import text

from app.fleet.host import HostState
from app.fleet.pool import COMING
from app.governance.scaler import desired
from app.governance.scaler.desired import ModelLoad, ScaledHost, ScalerDecision, ScalerLimits, ScalerState
from app.kernel.database import Database, UnitOfWork
from app.kernel.sections.scaler import ScaledClass, ScalerSettings
from app.scheduler.observation import FleetDemand, Observation

#: Key of the advisory lock of the worker that decides.
_LOCK = 7_205_759_403_836
#: Seconds beyond the time limit of a request for which its sender has it, and those after a failure, at most.
_GRACE, _MOST_RETRY = 5.0, 600.0
#: Most characters of an error.
_SENTENCE = 1_000

_TRY_LOCK = text("SELECT pg_try_advisory_xact_lock(:key) AS leads")
_ALL = text("""
    SELECT name, state, decision, pending, sending_until, attempts, error, asked_at, updated_at FROM scaler_class
    ORDER BY name
""")
_STORE = text("""
    INSERT INTO scaler_class (name, state, decision, attempts, error)
    VALUES (:name, CAST(:state AS jsonb), CAST(:decision AS jsonb), 0, '')
    ON CONFLICT (name) DO UPDATE SET state = excluded.state, decision = excluded.decision, updated_at = now()
""")
_ASK = text("""
    UPDATE scaler_class SET attempts = 0, error = '', sending_until = NULL, pending = CAST(:pending AS jsonb)
    WHERE name = :name
""")
_CLAIM = text("""
    UPDATE scaler_class SET sending_until = now() + :lease
    WHERE name = :name AND pending IS NOT NULL AND (sending_until IS NULL OR sending_until < now())
    RETURNING pending
""")
_ACCEPTED = text("""
    UPDATE scaler_class SET pending = NULL, sending_until = NULL, attempts = 0, error = '', asked_at = now()
    WHERE name = :name AND pending ->> 'id' = :id
""")
_FAILED = text("""
    UPDATE scaler_class SET attempts = attempts + 1, error = :error,
        sending_until = now() + least(:most, 2 ^ least(attempts, 16)) * interval '1 s'
    WHERE name = :name AND pending ->> 'id' = :id
""")
_FORGET = text("DELETE FROM scaler_class WHERE name <> ALL(:names)")


@dataclass(frozen=True, slots=True)
class ScalerView:
    """A class, what is decided of it now, and what was asked for."""

    scaled: ScaledClass
    hosts: Sequence[ScaledHost]
    decision: ScalerDecision
    #: The request that is not accepted yet, with its failed attempts and the last error.
    pending: Mapping[str, Any] | None = None
    attempts: int = 0
    error: str = ""
    #: When a receiver last accepted a request.
    asked_at: datetime | None = None


def limits_of(settings: ScalerSettings) -> ScalerLimits:
    """The limits that the settings give."""
    return ScalerLimits(settings.target_wait, settings.up_cooldown, settings.down_cooldown)


def loads_of(classes: Sequence[ScaledClass], seen: Observation, demand: FleetDemand) -> dict[str, list[ModelLoad]]:
    """
    The demand by name of the class. A model counts for the first class on whose hosts it can be placed.

    One that fits nowhere counts for the first class of a type that it has a layout for, which says so.
    """
    found: dict[str, list[ModelLoad]] = {one.name: [] for one in classes}
    waiting: dict[str, list[Any]] = {}
    for group in demand.served:
        if group.ready is None:
            waiting.setdefault(group.model, []).append(group)
    for model, configuration in seen.configurations.items():
        groups = waiting.get(model, [])
        pools = [pool for pool in seen.cluster.pools if pool.configuration == configuration.id]
        busy = sum(pool.busy for pool in pools)
        if not groups and not busy:
            continue
        by_type = {layout.type: layout for layout in reversed(configuration.layouts) if len(layout.parts) == 1}
        known = [one for one in classes if one.type in by_type]
        fitting = [one for one in known if by_type[one.type].total_bytes <= one.bytes]
        for scaled in (fitting or known)[:1]:
            found[scaled.name].append(
                ModelLoad(
                    model=model,
                    bytes=by_type[scaled.type].total_bytes,
                    slots=configuration.slots,
                    steps=sum(group.steps for group in groups),
                    work=sum(group.steps * group.work.total_seconds() for group in groups),
                    oldest=max(((seen.now - group.oldest).total_seconds() for group in groups), default=0.0),
                    busy=busy,
                    is_placed=any(pool.state in COMING for pool in pools),
                )
            )
    return found


def hosts_of(scaled: ScaledClass, seen: Observation) -> list[ScaledHost]:
    """The hosts with a device of the type of the class, and what they hold."""
    states: dict[str, HostState] = {}
    on: dict[str, str] = {}
    for device in seen.cluster.devices:
        on[device.id] = device.host
        if device.type == scaled.type:
            states[device.host] = device.state
    pools: dict[str, list[int]] = {name: [] for name in states}
    for pool in seen.cluster.pools:
        for host in {on[device] for device in pool.bytes if device in on} & states.keys():
            pools[host].append(pool.busy)
    return [ScaledHost(name, state, len(pools[name]), sum(pools[name])) for name, state in sorted(states.items())]


def plan(database: Database, settings: ScalerSettings, seen: Observation, demand: FleetDemand) -> list[ScalerView]:
    """What would be decided now. Changes nothing."""
    with database.work() as work:
        rows = {row.name: row for row in work.rows(_ALL)}
        return [_view(one, rows.get(one.name), settings, seen, demand) for one in settings.classes]


def advance(
    database: Database, settings: ScalerSettings, seen: Observation, demand: FleetDemand
) -> list[ScalerView] | None:
    """Decide, and store the decisions with their requests; None while another worker does."""
    with database.work() as work:
        row = work.row(_TRY_LOCK, {"key": _LOCK})
        if row is None or not row.leads:
            return None
        rows = {one.name: one for one in work.rows(_ALL)}
        views = [_view(one, rows.get(one.name), settings, seen, demand) for one in settings.classes]
        for view in views:
            _store(work, view, seen.now)
        work.run(_FORGET, {"names": [one.name for one in settings.classes]})
    return views


def claim(database: Database, name: str, timeout: timedelta) -> dict[str, Any] | None:
    """Take the pending request of a class for sending; None when there is none, or another worker has it."""
    with database.work() as work:
        row = work.row(_CLAIM, {"name": name, "lease": timeout + timedelta(seconds=_GRACE)})
        return None if row is None else dict(row.pending)


def accepted(database: Database, name: str, id_: str) -> None:
    """The receiver has accepted a request."""
    with database.work() as work:
        work.run(_ACCEPTED, {"name": name, "id": id_})


def failed(database: Database, name: str, id_: str, error: str) -> None:
    """A request was not accepted: it is sent again, after 1, 2, 4 … 600 s."""
    with database.work() as work:
        work.run(_FAILED, {"name": name, "id": id_, "error": error[:_SENTENCE], "most": _MOST_RETRY})


def _view(
    scaled: ScaledClass, row: Any, settings: ScalerSettings, seen: Observation, demand: FleetDemand
) -> ScalerView:
    hosts = hosts_of(scaled, seen)
    state = ScalerState() if row is None else _state_of(row.state)
    loads = loads_of(settings.classes, seen, demand)[scaled.name]
    decision = desired.decide(scaled, loads, hosts, state, limits_of(settings), seen.now)
    if row is None:
        return ScalerView(scaled, hosts, decision)
    return ScalerView(scaled, hosts, decision, row.pending, row.attempts, row.error, row.asked_at)


def _store(work: UnitOfWork, view: ScalerView, now: datetime) -> None:
    name, decision = view.scaled.name, view.decision
    shown = {"needed": decision.needed, "hosts": decision.hosts, "reasons": decision.reasons}
    work.run(_STORE, {"name": name, "state": json.dumps(_document(decision.state)), "decision": json.dumps(shown)})
    if decision.is_asked:
        # Hosts of a request that was not accepted are given up with this one.
        earlier = list((view.pending or {}).get("release", ()))
        pending = {
            "id": f"{name}-{decision.state.number}",
            "class": name,
            "hosts": decision.hosts,
            "release": sorted({*earlier, *decision.release} - {one.name for one in view.hosts if one.pools}),
            "reasons": list(decision.reasons),
            "at": now.isoformat(),
        }
        work.run(_ASK, {"name": name, "pending": json.dumps(pending)})


def _document(state: ScalerState) -> dict[str, Any]:
    document = asdict(state)
    for name in ("raised_at", "below_since"):
        if document[name] is not None:
            document[name] = document[name].isoformat()
    return document


def _state_of(document: Mapping[str, Any]) -> ScalerState:
    instants = {
        name: document[name] and datetime.fromisoformat(document[name]) for name in ("raised_at", "below_since")
    }
    return ScalerState(document["hosts"], document["number"], **instants, draining=tuple(document["draining"]))
