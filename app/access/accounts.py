"""
Accounts of namespaces: the limits of each, the bytes that its pools hold, and the device time that its steps used.

The devices of a pool are charged to the namespaces of the steps that it executes, in proportion to their steps; an
idle pool is charged to the namespace for which it was granted.
Every namespace that uses devices has an account. An account without limits is deleted when its usage has faded.

Every function runs in a transaction of its caller, which holds the lock of the ledger.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import text

from app.kernel.database import UnitOfWork

#: Half-life of attained service, in seconds.
_HALF_LIFE_SECONDS = 3600.0
#: Seconds of attained service below which an account without limits is deleted.
_NEGLIGIBLE_SECONDS = 0.5
#: Seconds of attained service that are rounded to 0: Postgres raises an error on numeric underflow.
_ZERO_SECONDS = 1e-6

_HELD_BYTES = """
    SELECT COALESCE(sum(bytes), 0)::bigint FROM reservation_device JOIN reservation ON reservation.id = reservation_id
    WHERE namespace = {} AND state <> 'released'
"""
_SET_LIMITS = text(f"""
    INSERT INTO quota (namespace, weight, max_bytes, held_bytes, max_device_seconds, period_seconds, device_seconds,
                       attained_seconds)
    VALUES (CAST(:namespace AS text), :weight, :bytes, ({_HELD_BYTES.format("CAST(:namespace AS text)")}), :seconds,
            :period, 0, 0)
    ON CONFLICT (namespace) DO UPDATE SET weight = :weight, max_bytes = :bytes, max_device_seconds = :seconds,
        period_seconds = :period
""")
_CREATE = text(f"""
    INSERT INTO quota (namespace, weight, held_bytes, period_seconds, device_seconds, attained_seconds)
    SELECT name, 1, ({_HELD_BYTES.format("name")}), 86400, 0, 0 FROM unnest(CAST(:names AS text[])) AS name
    ON CONFLICT (namespace) DO NOTHING
""")
# After a long absence of the control workers at most one minute is charged, not the whole time.
_RECORD = text("""
    UPDATE quota SET
        device_seconds = CASE WHEN over THEN 0 ELSE device_seconds END + devices * LEAST(passed, 60),
        attained_seconds = CASE WHEN attained_seconds < :nothing THEN 0
                                ELSE attained_seconds * power(0.5, LEAST(passed / :half_life, 100)) END
                         + devices * LEAST(passed, 60),
        period_began = CASE WHEN over THEN now() ELSE period_began END,
        counted_at = now()
    FROM (
        SELECT namespace AS name, COALESCE((CAST(:devices AS jsonb) ->> namespace)::float, 0) AS devices,
               GREATEST(extract(epoch FROM now() - counted_at), 0)::float AS passed,
               now() >= period_began + period_seconds * interval '1 s' AS over
        FROM quota
    ) AS usage WHERE quota.namespace = usage.name
""")
_DELETE_FADED = text("""
    DELETE FROM quota WHERE max_bytes IS NULL AND max_device_seconds IS NULL AND weight = 1 AND held_bytes = 0
        AND attained_seconds < :faded AND namespace <> ALL(:known)
""")
_WORKERS = text("""
    SELECT pool_id::text, worker FROM pool_report JOIN reservation ON reservation.id = pool_id
    WHERE state <> 'released' AND worker <> ''
""")
_RAM = text("SELECT id FROM device WHERE kind = 'cpu'")
_LIST = text("""
    SELECT namespace, weight, max_bytes, held_bytes, max_device_seconds, period_seconds, period_began, device_seconds,
           attained_seconds, CASE
               WHEN device_seconds >= max_device_seconds THEN period_began + period_seconds * interval '1 s'
           END AS exhausted_until
    FROM quota ORDER BY namespace
""")


@dataclass(frozen=True, slots=True)
class NamespaceLimits:
    """The limits of a namespace. None means no limit."""

    #: Its weight in the fair share among namespaces with demand.
    weight: float = 1.0
    #: Maximum bytes that its pools hold at the same time.
    max_bytes: int | None = None
    #: Maximum device time in a period.
    max_device_time: timedelta | None = None
    period: timedelta = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class NamespaceAccount:
    """The limits and the usage of a namespace."""

    namespace: str
    limits: NamespaceLimits
    held_bytes: int
    #: Device time since the period began.
    used: timedelta
    period_began: datetime
    #: Attained service for fair sharing: device time with a half-life of one hour.
    attained: timedelta
    #: Set when the device time of the period is used up.
    exhausted_until: datetime | None

    @classmethod
    def fresh(cls, namespace: str, limits: NamespaceLimits, now: datetime) -> NamespaceAccount:
        """Returns an account without usage."""
        return cls(namespace, limits, 0, timedelta(), now, timedelta(), None)


def set_limits(work: UnitOfWork, namespace: str, limits: NamespaceLimits) -> None:
    """Sets the limits of a namespace; they replace the previous ones."""
    seconds = None if limits.max_device_time is None else limits.max_device_time.total_seconds()
    values = {
        "namespace": namespace,
        "weight": limits.weight,
        "bytes": limits.max_bytes,
        "seconds": seconds,
        "period": round(limits.period.total_seconds()),
    }
    work.run(_SET_LIMITS, values)


def list_accounts(work: UnitOfWork) -> list[NamespaceAccount]:
    """Returns all accounts, ordered by name."""
    return [_account(row) for row in work.rows(_LIST)]


@dataclass(frozen=True, slots=True)
class HeldDevices:
    """The devices of a pool, and the namespace for which it was granted."""

    pool: str
    #: Ids of devices.
    devices: frozenset[str]
    namespace: str


def record_usage(
    work: UnitOfWork, pools: Iterable[HeldDevices], working: Mapping[str, Mapping[str, int]], waiting: Iterable[str]
) -> None:
    """
    Charges each namespace for the devices that it uses now, for the time since the last call.

    `working` has for each worker the number of running steps by namespace; `waiting` are the namespaces of waiting
    steps.
    """
    workers = {row.pool_id: row.worker for row in work.rows(_WORKERS)} if working else {}
    ram = {row.id for row in work.rows(_RAM)}
    devices: dict[str, float] = defaultdict(float)
    for one in pools:
        held = len(one.devices - ram) or 1  # the RAM of a pool on GPUs does not count as a device
        steps = working.get(workers.get(one.pool, ""), {})
        busy = sum(steps.values())
        if busy:
            for namespace, some in steps.items():
                devices[namespace] += held * some / busy
        elif one.namespace:
            devices[one.namespace] += held
    known = sorted({*devices, *waiting})
    if known:
        work.run(_CREATE, {"names": known})
    work.run(_RECORD, {"devices": json.dumps(devices), "half_life": _HALF_LIFE_SECONDS, "nothing": _ZERO_SECONDS})
    work.run(_DELETE_FADED, {"faded": _NEGLIGIBLE_SECONDS, "known": known})


def _account(row: Any) -> NamespaceAccount:
    max_seconds = row.max_device_seconds
    period = timedelta(seconds=row.period_seconds)
    limits = NamespaceLimits(
        row.weight, row.max_bytes, None if max_seconds is None else timedelta(seconds=max_seconds), period
    )
    return NamespaceAccount(
        namespace=row.namespace,
        limits=limits,
        held_bytes=row.held_bytes,
        used=timedelta(seconds=row.device_seconds),
        period_began=row.period_began,
        attained=timedelta(seconds=row.attained_seconds),
        exhausted_until=row.exhausted_until,
    )
