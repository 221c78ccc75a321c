"""
The state of each component: the database, the broker, beat, the control workers, and the agents of the hosts.

A component is `ok`, `degraded` while a part of it is down, `down` with what is wrong, or `unknown` while what would
show its state is down itself.
Requests are answered while the database and the broker are ok; what the other components do, waits while they are down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import redis
from sqlalchemy import text

from app.governance.health import signs
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.errors import BrokerUnreachable, DatabaseUnreachable, Unavailable

#: The lock that the elected beat holds.
_BEAT_LOCK = "redbeat::lock"
#: Seconds without a scheduled job, while a beat runs, after which a control worker does not count as working. Beat
#: sends some each 10 s at least.
IDLE = 60.0
#: Most control workers that are looked at.
_MOST = 1_000

_AGENTS = text("""
    SELECT count(*) AS hosts, count(*) FILTER (WHERE agent_until > now()) AS alive,
           ARRAY(SELECT name FROM host WHERE agent_until <= now() ORDER BY name LIMIT 20) AS missing
    FROM host
""")


class Component(StrEnum):
    """A part of the installation."""

    DATABASE = "database"
    BROKER = "broker"
    BEAT = "beat"
    CONTROL = "control"
    AGENTS = "agents"


#: Those without which no request is answered.
ESSENTIAL = frozenset({Component.DATABASE, Component.BROKER})


class ComponentCondition(StrEnum):
    """The state of a component."""

    OK = "ok"
    #: A part of it is down, and the rest goes on.
    DEGRADED = "degraded"
    DOWN = "down"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class ComponentState:
    """The state of a component, and why."""

    condition: ComponentCondition
    #: What is wrong; empty when it is ok.
    detail: str = ""
    #: The hosts that it is about, for operators: who asks for readiness may be anybody.
    hosts: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return `ok`, or what is wrong, without hosts."""
        match self.condition:
            case ComponentCondition.OK:
                return "ok"
            case ComponentCondition.DOWN:
                return self.detail
        return f"{self.condition}: {self.detail}"

    @property
    def works(self) -> bool:
        """Whether what needs it goes on, at least with a part of it."""
        return self.condition in (ComponentCondition.OK, ComponentCondition.DEGRADED)


_OK = ComponentState(ComponentCondition.OK)


def _down(detail: str) -> ComponentState:
    return ComponentState(ComponentCondition.DOWN, detail)


def read(database: Database, publisher: CeleryPublisher) -> Mapping[Component, ComponentState]:
    """Return the state of each component."""
    try:
        database.require_head()
        of_database = _OK
    except Unavailable as error:
        of_database = _down(str(error))
    beat, control = _in_broker(publisher)
    broker = _OK
    if isinstance(beat, BrokerUnreachable):
        broker = _down(str(beat))
        beat = control = ComponentState(ComponentCondition.UNKNOWN, "it is seen in the broker, which is unavailable")
    return {
        Component.DATABASE: of_database,
        Component.BROKER: broker,
        Component.BEAT: beat,
        Component.CONTROL: control,
        Component.AGENTS: _agents(database, of_database),
    }


def _in_broker(publisher: CeleryPublisher) -> tuple[ComponentState | BrokerUnreachable, ComponentState]:
    try:
        with publisher.connection() as client:
            client.ping()
            beats = is_elected(client)
            ages = _ages(client)
    except BrokerUnreachable as error:
        return error, _OK
    beat = _OK if beats else _down("no beat runs, so no scheduled job is triggered")
    if not ages:
        return beat, _down("no control worker runs, so no scheduled job is done")
    if beats and min(ages) > IDLE:
        return beat, ComponentState(
            ComponentCondition.DOWN,
            f"no control worker has begun a scheduled job for {min(ages):.0f} s, though beat sends them",
        )
    return beat, _OK


def is_elected(client: redis.Redis) -> bool:
    """Whether some beat holds the lock. Raises redis.RedisError."""
    left: Any = client.pttl(_BEAT_LOCK)
    return bool(left > 0)


def _ages(client: redis.Redis) -> list[float]:
    """Return the seconds since the last scheduled job of each control worker that lives."""
    names = []
    for name in client.scan_iter(signs.ALL, count=1_000):
        names.append(name)
        if len(names) >= _MOST:
            break
    values: Any = client.mget(names) if names else []
    return [found for value in values if (found := signs.age(value)) is not None]


def _agents(database: Database, of_database: ComponentState) -> ComponentState:
    if of_database is not _OK:
        return ComponentState(ComponentCondition.UNKNOWN, "they are seen in the database, which is unavailable")
    try:
        with database.work() as work:
            row = work.row(_AGENTS)
    except DatabaseUnreachable:
        return ComponentState(ComponentCondition.UNKNOWN, "they are seen in the database, which is unavailable")
    assert row is not None
    if not row.hosts:
        return _down("no agent has ever joined, so no pool can run")
    if not row.alive:
        return ComponentState(ComponentCondition.DOWN, "no agent is alive, so no pool is started")
    if row.alive < row.hosts:
        detail = f"{row.hosts - row.alive} of {row.hosts} agents are not alive"
        return ComponentState(ComponentCondition.DEGRADED, detail, tuple(row.missing))
    return _OK
