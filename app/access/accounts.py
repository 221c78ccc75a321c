"""
The accounts of namespaces: what each may hold and use, what its pools hold, and what its steps have used of devices.

A device that a pool holds is used by the namespaces of the steps that it works on, each for its part; while it works on
none, by the namespace that it was granted for.
Whoever uses devices has an account. One without limits is forgotten when what it used has faded.

Every function is part of a transaction of its caller, who holds the lock of the books.
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

#: Seconds in which attained service fades by half.
_HALF_LIFE = 3600.0
#: Seconds of attained service that matter to nobody any more.
_FADED = 0.5
#: Seconds below which it is nothing: Postgres raises an error where a number becomes too small.
_NOTHING = 1e-6

_HELD = """
    SELECT COALESCE(sum(bytes), 0)::bigint FROM reservation_device JOIN reservation ON reservation.id = reservation_id
    WHERE namespace = {} AND state <> 'released'
"""
_LIMIT = text(f"""
    INSERT INTO quota (namespace, weight, max_bytes, held_bytes, max_device_seconds, period_seconds, device_seconds,
                       attained_seconds)
    VALUES (CAST(:namespace AS text), :weight, :bytes, ({_HELD.format("CAST(:namespace AS text)")}), :seconds, :period,
            0, 0)
    ON CONFLICT (namespace) DO UPDATE SET weight = :weight, max_bytes = :bytes, max_device_seconds = :seconds,
        period_seconds = :period
""")
_OPEN = text(f"""
    INSERT INTO quota (namespace, weight, held_bytes, period_seconds, device_seconds, attained_seconds)
    SELECT name, 1, ({_HELD.format("name")}), 86400, 0, 0 FROM unnest(CAST(:names AS text[])) AS name
    ON CONFLICT (namespace) DO NOTHING
""")
# A control worker that was away for long counts a minute, not all of the time in which nobody looked.
_COUNT = text("""
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
    ) AS turn WHERE quota.namespace = turn.name
""")
_FORGET = text("""
    DELETE FROM quota WHERE max_bytes IS NULL AND max_device_seconds IS NULL AND weight = 1 AND held_bytes = 0
        AND attained_seconds < :faded AND namespace <> ALL(:asking)
""")
_WORKERS = text("""
    SELECT pool_id::text, worker FROM pool_report JOIN reservation ON reservation.id = pool_id
    WHERE state <> 'released' AND worker <> ''
""")
_RAM = text("SELECT id FROM device WHERE kind = 'cpu'")
_LISTED = text("""
    SELECT namespace, weight, max_bytes, held_bytes, max_device_seconds, period_seconds, period_began, device_seconds,
           attained_seconds, CASE
               WHEN device_seconds >= max_device_seconds THEN period_began + period_seconds * interval '1 s'
           END AS exhausted_until
    FROM quota ORDER BY namespace
""")


@dataclass(frozen=True, slots=True)
class NamespaceLimits:
    """What a namespace may have. None is no limit."""

    #: Its share beside others that ask.
    weight: float = 1.0
    #: Bytes that pools granted for it may hold at a time.
    max_bytes: int | None = None
    #: Time of devices that it may use in a period.
    max_device_time: timedelta | None = None
    period: timedelta = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class NamespaceAccount:
    """What a namespace may have, has and had."""

    namespace: str
    limits: NamespaceLimits
    held_bytes: int
    #: Since the period began.
    used: timedelta
    period_began: datetime
    #: What fairness counts: faded by half each hour.
    attained: timedelta
    #: Set when its time of devices is used up.
    exhausted_until: datetime | None

    @classmethod
    def fresh(cls, namespace: str, limits: NamespaceLimits, now: datetime) -> NamespaceAccount:
        """One that has and had nothing."""
        return cls(namespace, limits, 0, timedelta(), now, timedelta(), None)


def limit(work: UnitOfWork, namespace: str, limits: NamespaceLimits) -> None:
    """Set the limits of a namespace, in the place of those that it had."""
    seconds = None if limits.max_device_time is None else limits.max_device_time.total_seconds()
    values = {
        "namespace": namespace,
        "weight": limits.weight,
        "bytes": limits.max_bytes,
        "seconds": seconds,
        "period": round(limits.period.total_seconds()),
    }
    work.run(_LIMIT, values)


def listed(work: UnitOfWork) -> list[NamespaceAccount]:
    """Every account, by name."""
    return [_account(row) for row in work.rows(_LISTED)]


@dataclass(frozen=True, slots=True)
class HeldDevices:
    """The devices that a pool holds, and the namespace that it was granted for."""

    pool: str
    #: Ids.
    devices: frozenset[str]
    namespace: str


def count(
    work: UnitOfWork, pools: Iterable[HeldDevices], working: Mapping[str, Mapping[str, int]], asking: Iterable[str]
) -> None:
    """
    Count the devices that each namespace uses now, for the time since the last count.

    `working` says by worker how many steps of each namespace it works on; `asking` are the namespaces whose steps wait.
    """
    workers = {row.pool_id: row.worker for row in work.rows(_WORKERS)} if working else {}
    ram = {row.id for row in work.rows(_RAM)}
    devices: dict[str, float] = defaultdict(float)
    for one in pools:
        held = len(one.devices - ram) or 1  # the RAM beside GPUs is no device more
        steps = working.get(workers.get(one.pool, ""), {})
        busy = sum(steps.values())
        if busy:
            for namespace, some in steps.items():
                devices[namespace] += held * some / busy
        elif one.namespace:
            devices[one.namespace] += held
    known = sorted({*devices, *asking})
    if known:
        work.run(_OPEN, {"names": known})
    work.run(_COUNT, {"devices": json.dumps(devices), "half_life": _HALF_LIFE, "nothing": _NOTHING})
    work.run(_FORGET, {"faded": _FADED, "asking": known})


def _account(row: Any) -> NamespaceAccount:
    most = row.max_device_seconds
    period = timedelta(seconds=row.period_seconds)
    limits = NamespaceLimits(row.weight, row.max_bytes, None if most is None else timedelta(seconds=most), period)
    return NamespaceAccount(
        namespace=row.namespace,
        limits=limits,
        held_bytes=row.held_bytes,
        used=timedelta(seconds=row.device_seconds),
        period_began=row.period_began,
        attained=timedelta(seconds=row.attained_seconds),
        exhausted_until=row.exhausted_until,
    )
