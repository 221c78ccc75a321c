"""
The holder of a reservation: the operations of a pool on its grant.

Each call is one transaction and names the grant's epoch.
LeaseLost means that the reservation was released or the epoch is stale: the pool must free its memory and end.
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

#: Most characters of a sentence for operators: an error of a library may have any length.
_SENTENCE = 4_000

_TAKE = text("""
    SELECT pool.id::text, epoch, revision, host, pool.configuration, pool.model, slots, COALESCE(threads, 1) AS threads
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
_REPLY = text("""
    SELECT desired, threads FROM pool LEFT JOIN pool_process ON pool_id = pool.id WHERE pool.id = CAST(:id AS uuid)
""")
_STORE_LAYOUT = text("""
    UPDATE layout SET parts = CAST(:parts AS jsonb), ram_bytes = :ram, source = :source, measured_at = now()
    WHERE configuration = :configuration AND type = :type AND devices = :devices
""")
_STORE_LOAD_TIME = text("""
    UPDATE layout SET load_seconds = :load
    WHERE configuration = :configuration AND type = :type AND devices = :devices
""")


@dataclass(frozen=True, slots=True)
class DevicePart:
    """A device of a grant, and the bytes of it that may be used."""

    id: str
    name: str
    type: str
    #: Pins the process to the device; empty when it is not a GPU.
    uuid: str
    simulated: bool
    speed: float
    bandwidth: int | None
    bytes: int


@dataclass(frozen=True, slots=True)
class Grant:
    """A grant: the model that a pool may load, and the bytes of devices that it may use."""

    id: str
    epoch: int
    revision: int
    host: str
    configuration: str
    model: str
    slots: int
    #: Its share of the host's cores.
    threads: int
    parts: tuple[DevicePart, ...]

    @property
    def simulated(self) -> bool:
        """Whether it is on simulated devices."""
        return any(part.simulated for part in self.parts)

    @property
    def gpus(self) -> tuple[DevicePart, ...]:
        """Its GPUs, to which the process is pinned."""
        return tuple(part for part in self.parts if part.uuid)

    @property
    def computing(self) -> tuple[DevicePart, ...]:
        """The devices that it computes on: its GPUs without their RAM, or the RAM if it has no GPU."""
        return self.gpus or self.parts

    @property
    def type(self) -> str:
        """The type of the devices that it computes on; they are of one type."""
        return self.computing[0].type


@dataclass(frozen=True, slots=True)
class HeartbeatReport:
    """The report of a pool with its heartbeat."""

    phase: PoolPhase
    #: Of the load, 0 to 1.
    progress: float = 0.0
    detail: str = ""
    worker: str = ""
    busy: int = 0
    #: It has worked since the last report, maybe on steps that have ended.
    used: bool = False
    urgent: Priority | None = None
    stalled: timedelta = timedelta(0)


@dataclass(frozen=True, slots=True)
class HeartbeatReply:
    """The reply to a heartbeat."""

    desired: Desired
    #: Its current share of the host's cores.
    threads: int


@dataclass(frozen=True, slots=True)
class ReservationHolder:
    """The operations of pools."""

    database: Database
    #: How long a pool without a heartbeat counts as alive.
    lease: timedelta

    def take(self, id_: str, epoch: int) -> Grant:
        """Return the grant and renew its lease. Raises LeaseLost when it was released, or the epoch is stale."""
        with self.database.work() as work:
            row = work.row(_TAKE, {"id": id_, "epoch": epoch})
            if row is None:
                raise LeaseLost(f"pool {id_} of epoch {epoch} holds no reservation")
            session.renew(work, id_, epoch, self.lease)
            parts = work.rows_of(DevicePart, _DEVICES, {"id": id_})
        return Grant(**row._asdict(), parts=tuple(parts))

    def renew(self, id_: str, epoch: int, report: HeartbeatReport) -> HeartbeatReply:
        """Renew the lease, store the report and return the desired state. Raises LeaseLost."""
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
            "used": report.used or report.busy > 0,
        }
        with self.database.work() as work:
            session.renew(work, id_, epoch, self.lease)
            work.run(_REPORT, values)
            row = work.row(_REPLY, {"id": id_})
        assert row is not None, "a report refers to its pool"
        return HeartbeatReply(Desired(row.desired), row.threads or 1)

    def adjust(self, grant: Grant, wanted: Mapping[str, int]) -> int | ReservationRefused:
        """
        Change the bytes of each device, by its id. Returns the new revision, or the reason of the refusal.

        Raises LeaseLost.
        """
        with self.database.work() as work:
            open_ = session.open_session(work, grant.host)
            refused = open_.change(lambda found: rules.adjust(found, grant.id, grant.epoch, grant.revision, wanted))
            if refused is not None:
                return refused
            open_.write()
            return open_.ledger.reservations[grant.id].revision

    def store_layout(self, grant: Grant, wanted: Mapping[str, int], source: str) -> None:
        """Store the bytes that the configuration needs, by id of the device: the planner uses them from now on."""
        parts = sorted((wanted[part.id] for part in grant.computing), reverse=True)
        ram = sum(wanted.values()) - sum(parts)
        values = self._of(grant) | {"parts": json.dumps(parts), "ram": ram, "source": source}
        with self.database.work() as work:
            work.run(_STORE_LAYOUT, values)

    def store_load_time(self, grant: Grant, load: timedelta) -> None:
        """Store the time from the start of the process until the model could serve."""
        with self.database.work() as work:
            work.run(_STORE_LOAD_TIME, self._of(grant) | {"load": load.total_seconds()})

    @staticmethod
    def _of(grant: Grant) -> dict[str, Any]:
        return {"configuration": grant.configuration, "type": grant.type, "devices": len(grant.computing)}
