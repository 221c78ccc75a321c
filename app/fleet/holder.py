"""
The holder: what a pool does with its grant. Each call is one transaction, and names the grant's epoch.

A grant that was given back, or went to another epoch, is LeaseLost: the pool must let go of its bytes and end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import text

from app.fleet.ledger import rules, session
from app.fleet.ledger.reservation import ReservationRefused
from app.fleet.pool import Desired, PoolPhase
from app.kernel.database import Database
from app.kernel.errors import LeaseLost
from app.kernel.priority import Priority
from app.kernel.security import texts

#: Characters of what a pool says for people: an error of a library may be of any length.
_SENTENCE = 4_000

_TAKE = text("""
    SELECT reservation.revision, host, pool.configuration, pool.model, slots, threads
    FROM reservation JOIN pool ON pool.id = reservation.id LEFT JOIN pool_process ON pool_id = pool.id
    WHERE pool.id = CAST(:id AS uuid) AND epoch = :epoch AND reservation.state IN ('active', 'suspect')
""")
_DEVICES = text("""
    SELECT device.id, name, type, uuid, simulated, speed, bandwidth, reservation_device.bytes
    FROM reservation_device JOIN device ON device.id = device_id WHERE reservation_id = CAST(:id AS uuid)
    ORDER BY length(device.name), device.name
""")
_REPORT = text("""
    INSERT INTO pool_report (pool_id, phase, progress, detail, worker, busy, urgent, stalled_ms, heartbeat_at)
    VALUES (CAST(:id AS uuid), :phase, :progress, :detail, :worker, :busy, :urgent, :stalled_ms, now())
    ON CONFLICT (pool_id) DO UPDATE SET phase = :phase, progress = :progress, detail = :detail, worker = :worker,
        busy = :busy, urgent = :urgent, stalled_ms = :stalled_ms, heartbeat_at = now(),
        serving_at = CASE WHEN :serves THEN COALESCE(pool_report.serving_at, now()) ELSE pool_report.serving_at END,
        last_used_at = CASE WHEN :used THEN now() ELSE pool_report.last_used_at END
""")
_HEAR = text("""
    SELECT desired, threads FROM pool LEFT JOIN pool_process ON pool_id = pool.id WHERE pool.id = CAST(:id AS uuid)
""")
_KEEP_LAYOUT = text("""
    UPDATE layout SET parts = CAST(:parts AS jsonb), ram_bytes = :ram, source = :source, measured_at = now()
    WHERE configuration = :configuration AND type = :type AND devices = :devices
""")
_NOTE_LOAD = text("""
    UPDATE layout SET load_seconds = :load
    WHERE configuration = :configuration AND type = :type AND devices = :devices
""")


@dataclass(frozen=True, slots=True)
class DevicePart:
    """A device of a grant, and the bytes that may be used of it."""

    id: str
    name: str
    type: str
    #: What pins the process to it; empty for what is no GPU.
    uuid: str
    simulated: bool
    speed: float
    bandwidth: int | None
    bytes: int


@dataclass(frozen=True, slots=True)
class Grant:
    """What a pool may load, and where."""

    id: str
    epoch: int
    revision: int
    host: str
    configuration: str
    model: str
    slots: int
    #: Its part of the host's cores.
    threads: int
    parts: tuple[DevicePart, ...]

    @property
    def simulated(self) -> bool:
        """Whether there is no hardware behind it."""
        return any(part.simulated for part in self.parts)

    @property
    def gpus(self) -> tuple[DevicePart, ...]:
        """Those of its devices that a process is pinned to."""
        return tuple(part for part in self.parts if part.uuid)

    @property
    def computing(self) -> tuple[DevicePart, ...]:
        """The devices that it computes on: its GPUs without the RAM beside them, or the RAM."""
        return self.gpus or self.parts

    @property
    def type(self) -> str:
        """The type of those devices, which is one."""
        return self.computing[0].type


@dataclass(frozen=True, slots=True)
class HeartbeatReport:
    """What a pool tells of itself."""

    phase: PoolPhase
    #: Of the loading, 0 to 1.
    progress: float = 0.0
    detail: str = ""
    worker: str = ""
    busy: int = 0
    urgent: Priority | None = None
    stalled: timedelta = timedelta(0)


@dataclass(frozen=True, slots=True)
class HeartbeatReply:
    """The reply to a heartbeat."""

    desired: Desired
    #: Its part of the host's cores, as it is now.
    threads: int


@dataclass(frozen=True, slots=True)
class ReservationHolder:
    """The use cases of pools."""

    database: Database
    #: Until when a pool that does not renew is taken for alive.
    lease: timedelta

    def take(self, id_: str, epoch: int) -> Grant:
        """What was granted; its lease begins anew. Raises LeaseLost when it is granted no longer, or to another."""
        with self.database.work() as work:
            row = work.row(_TAKE, {"id": id_, "epoch": epoch})
            if row is None:
                raise LeaseLost(f"pool {id_} of epoch {epoch} holds no bytes")
            session.renew(work, id_, epoch, self.lease)
            parts = tuple(DevicePart(**found._asdict()) for found in work.rows(_DEVICES, {"id": id_}))
        return Grant(
            id_, epoch, row.revision, row.host, row.configuration, row.model, row.slots, row.threads or 1, parts
        )

    def renew(self, id_: str, epoch: int, report: HeartbeatReport) -> HeartbeatReply:
        """Extend the lease, tell, and hear what is desired. Raises LeaseLost."""
        values = {
            "id": id_,
            "phase": report.phase,
            "progress": report.progress,
            "detail": texts.printable(report.detail, _SENTENCE),
            "worker": report.worker,
            "busy": report.busy,
            "urgent": report.urgent,
            "stalled_ms": round(report.stalled.total_seconds() * 1000),
            "serves": report.phase is PoolPhase.SERVING,
            "used": report.busy > 0,
        }
        with self.database.work() as work:
            session.renew(work, id_, epoch, self.lease)
            work.run(_REPORT, values)
            row = work.row(_HEAR, {"id": id_})
        assert row is not None, "a report needs its pool"
        return HeartbeatReply(Desired(row.desired), row.threads or 1)

    def adjust(self, grant: Grant, wanted: Mapping[str, int]) -> int | ReservationRefused:
        """
        Change the bytes of each device, by its id; gives the new revision, or why they cannot be had.

        Raises LeaseLost.
        """
        with self.database.work() as work:
            open_ = session.open_session(work, grant.host)
            refused = open_.change(lambda found: rules.adjust(found, grant.id, grant.epoch, grant.revision, wanted))
            if refused is not None:
                return refused
            open_.close()
            return open_.ledger.reservations[grant.id].revision

    def keep_layout(self, grant: Grant, wanted: Mapping[str, int], source: str) -> None:
        """Write down what the configuration needs, by id of each device: the planner counts on it from now on."""
        parts = sorted((wanted[part.id] for part in grant.computing), reverse=True)
        ram = sum(wanted.values()) - sum(parts)
        values = self._of(grant) | {"parts": json.dumps(parts), "ram": ram, "source": source}
        with self.database.work() as work:
            work.run(_KEEP_LAYOUT, values)

    def note_load(self, grant: Grant, load: timedelta) -> None:
        """Write down how long it took from the start of the process until the model could serve."""
        with self.database.work() as work:
            work.run(_NOTE_LOAD, self._of(grant) | {"load": load.total_seconds()})

    @staticmethod
    def _of(grant: Grant) -> dict[str, Any]:
        return {"configuration": grant.configuration, "type": grant.type, "devices": len(grant.computing)}
