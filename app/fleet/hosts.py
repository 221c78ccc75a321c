"""
Hosts: the operations of agents on the database. Each call is one transaction.

An agent that joins speaks for its host from then on, under its own epoch. An agent with a stale epoch, or of a host
that was declared lost, gets LeaseLost and must join again.
Before it joins, an agent ends every process without a reservation. The reservations of the processes that it adopts
are checked again as it joins.
A reservation is released only when its agent has seen the process dead and its memory free.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import text

from app.devices.device import MeasuredDevice
from app.fleet.ledger import rules, session
from app.fleet.ledger.reservation import ReservationState
from app.fleet.pool import Desired, PoolPhase, ProcessState
from app.footprint.layout import KnownLayout
from app.kernel import ids, log
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import Conflict, LeaseLost
from app.kernel.security import texts

_log = log.get(__name__)

#: Between the name of a model and the reason, in the problem of a host.
_NOT_SERVED = " is not served here: "

#: Most characters of a sentence for operators: an error of a library may have any length.
_SENTENCE = 4_000

_JOIN = text("""
    INSERT INTO host (name, state, identity, agent_epoch, agent_until, cores, files, problems)
    VALUES (:host, 'schedulable', :identity, :epoch, now() + :lease, :cores, '[]', '[]')
    ON CONFLICT (name) DO UPDATE SET agent_epoch = :epoch, agent_until = now() + :lease, joined_at = now(),
        identity = :identity, cores = :cores, lost_at = NULL, problems = '[]'
""")
_KNOWN = text("""
    SELECT agent_until > now() AS alive,
           (SELECT count(*) FROM reservation WHERE host = host.name AND reservation.state <> 'released') AS held
    FROM host WHERE name = :host AND identity <> :identity
""")
_PUT_DEVICE = text("""
    INSERT INTO device (id, host, name, kind, type, uuid, simulated, present, speed, bandwidth, total_bytes,
                        capacity_bytes, charged_bytes, non_preemptible_bytes, used_bytes, unmanaged_bytes)
    VALUES (:id, :host, :name, :kind, :type, :uuid, :simulated, true, :speed, :bandwidth, :total, 0, 0, 0, 0, 0)
    ON CONFLICT (id) DO UPDATE SET name = :name, kind = :kind, type = :type, uuid = :uuid, simulated = :simulated,
        present = true, speed = :speed, bandwidth = :bandwidth, total_bytes = :total
    WHERE device.host = :host
""")
_HIDE_DEVICES = text("UPDATE device SET present = false WHERE host = :host AND id <> ALL(:ids)")
_HEARTBEAT = text("""
    UPDATE host SET agent_until = now() + :lease, files = CAST(:files AS jsonb), problems = CAST(:problems AS jsonb)
    WHERE name = :host AND agent_epoch = :epoch AND lost_at IS NULL
""")
_LEAVE = text("UPDATE host SET agent_until = now() WHERE name = :host AND agent_epoch = :epoch AND agent_until > now()")
# The measured time of a load is kept, except for a simulated device.
_DECLARE = text("""
    INSERT INTO layout (configuration, type, devices, parts, ram_bytes, source, load_seconds, tokens_per_second)
    VALUES (:configuration, :type, :devices, CAST(:parts AS jsonb), :ram, :source, :load, :pace)
    ON CONFLICT (configuration, type, devices) DO UPDATE SET parts = CAST(:parts AS jsonb), ram_bytes = :ram,
        source = :source,
        load_seconds = CASE WHEN :source = 'catalogue' THEN :load ELSE layout.load_seconds END,
        tokens_per_second = CASE WHEN :source = 'catalogue' THEN :pace ELSE layout.tokens_per_second END
""")
_MEASURE = text("""
    UPDATE device SET used_bytes = :used, unmanaged_bytes = :unmanaged, temperature = :temperature,
        utilisation = :utilisation
    WHERE id = :id AND host = :host
""")
_POOLS = text("""
    SELECT reservation.id::text, reservation.epoch, reservation.state,
           EXISTS (SELECT FROM promise WHERE reservation_id = reservation.id) AS waits,
           pool.configuration, pool.model, pool.desired, pool.stop_reason,
           COALESCE((SELECT jsonb_object_agg(device_id, bytes) FROM reservation_device
                     WHERE reservation_id = reservation.id), '{}') AS bytes,
           phase, LEAST(COALESCE(stalled_ms, 0), 1e12) AS stalled_ms, detail,
           LEAST(extract(epoch FROM now() - COALESCE(heartbeat_at, reservation.granted_at)), 1e9) AS silent
    FROM reservation JOIN pool ON pool.id = reservation.id LEFT JOIN pool_report ON pool_report.pool_id = pool.id
    WHERE reservation.host = :host AND reservation.state <> 'released' ORDER BY reservation.granted_at
""")
_BEGIN = text("""
    INSERT INTO pool_process (pool_id, state, threads, failed) VALUES (CAST(:id AS uuid), 'running', :threads, false)
    ON CONFLICT (pool_id) DO NOTHING
""")
_OBSERVE = text("""
    UPDATE pool_process SET state = :state, pid = :pid, threads = :threads, log_tail = :tail,
        used = CAST(:used AS jsonb), peak = CAST(:peak AS jsonb)
    WHERE pool_id = CAST(:id AS uuid)
""")
_END = text("""
    INSERT INTO pool_process (pool_id, state, ended_at, returncode, failed, ending, log_tail)
    VALUES (CAST(:id AS uuid), 'ended', now(), :returncode, :failed, :ending, :tail)
    ON CONFLICT (pool_id) DO UPDATE SET state = 'ended', ended_at = now(), returncode = :returncode,
        failed = :failed, ending = :ending, log_tail = :tail
""")
_END_ORPHAN = text("""
    UPDATE pool_process SET state = 'ended', ended_at = now(), failed = true, ending = :ending, log_tail = :tail
    WHERE pool_id = CAST(:id AS uuid) AND state <> 'ended'
""")
# An agent that joins has ended every process without a reservation.
_END_REST = text("""
    UPDATE pool_process SET state = 'ended', ended_at = now(), failed = true,
        ending = 'its process was gone when the agent of its host joined again'
    WHERE state <> 'ended' AND pool_id IN (SELECT id FROM reservation WHERE host = :host AND state = 'released')
""")
# Failures before a start command do not count.
_FORGET_FAILURES = text("""
    INSERT INTO pool_command (id, command, model, reason, created_at, done_at)
    VALUES (:id, 'start', :model, 'its file was replaced', :at, now())
""")


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """A device of a host, as its agent reports it."""

    #: Its id in the fleet.
    id: str
    #: The key of its layouts: `cpu`, `NVIDIA H200`, `simulated`.
    type: str
    #: Most bytes that all reservations together may have.
    capacity: int
    measured: MeasuredDevice
    #: Bytes of the capacity that processes without a reservation use.
    unmanaged: int = 0


@dataclass(frozen=True, slots=True)
class AssignedPool:
    """A pool that is assigned to a host: its reservation, its desired state and its last report."""

    id: str
    epoch: int
    state: ReservationState
    #: It waits for bytes of other pools.
    waits: bool
    configuration: str
    model: str
    desired: Desired
    stop_reason: str
    bytes: Mapping[str, int]
    #: None before its first heartbeat.
    phase: PoolPhase | None
    #: How long its engine has had work without progress.
    stalled: timedelta
    #: Since its last heartbeat, or since its grant.
    silent: timedelta
    detail: str


@dataclass(frozen=True, slots=True)
class ObservedProcess:
    """A process of a pool, as its agent observes it."""

    id: str
    state: ProcessState
    pid: int | None
    threads: int
    used: Mapping[str, int]
    peak: Mapping[str, int]
    log_tail: str


@dataclass(frozen=True, slots=True)
class PoolEnded:
    """The end of a pool: its process is dead, and its memory is free."""

    id: str
    returncode: int | None
    #: It ended in another way than requested.
    failed: bool
    ending: str
    log_tail: str


@dataclass(frozen=True, slots=True)
class Hosts:
    """The operations of agents."""

    database: Database
    #: How long an agent without a heartbeat counts as alive.
    agent_lease: timedelta
    #: How long a pool without a heartbeat counts as alive.
    pool_lease: timedelta

    def join(
        self, host: str, identity: str, cores: int, devices: Sequence[DeviceReport], adopted: Mapping[str, int]
    ) -> int:
        """
        Make this agent the one that speaks for a host. Returns its epoch.

        `identity` names the data directory in which the agent, and those before it, know the host's processes.
        `adopted` are the pools whose processes are alive there, with their epochs.

        Raises LeaseLost when a reservation of them was released: its process must be ended first. Raises Conflict when
        an agent with another identity speaks for the host, or left reservations there.
        """
        with self.database.work() as work:
            epoch = session.next_epoch(work)
            open_ = session.open_session(work, host)
            self._require_own(work, host, identity)
            values = {"host": host, "identity": identity, "epoch": epoch, "lease": self.agent_lease, "cores": cores}
            work.run(_JOIN, values)
            for id_, of in adopted.items():
                held = open_.ledger.reservations.get(id_)
                if held is None or held.epoch != of:
                    raise LeaseLost(f"pool {id_} of epoch {of} was released while its process was alive")
            for device in devices:
                self._put(work, host, device)
            work.run(_HIDE_DEVICES, {"host": host, "ids": [device.id for device in devices]})
            work.run(_END_REST, {"host": host})
            capacities = {device.id: device.capacity for device in devices}
            open_.change(lambda found: rules.join(found, host, epoch, capacities))
            open_.write()
        _log.info("host_joined", host=host, epoch=epoch, devices=len(devices), adopted=len(adopted))
        return epoch

    def heartbeat(
        self, host: str, epoch: int, devices: Sequence[DeviceReport], files: Sequence[str], problems: Sequence[str]
    ) -> list[AssignedPool]:
        """
        Renew the lease of the agent and store its measurements. Returns the pools of the host.

        Raises LeaseLost when another agent speaks for the host, or the host was declared lost.
        """
        with self.database.work() as work:
            sentences = [texts.printable(problem, _SENTENCE) for problem in problems]
            values = {"host": host, "epoch": epoch, "lease": self.agent_lease}
            if not work.run(_HEARTBEAT, values | {"files": _json(list(files)), "problems": _json(sentences)}):
                raise LeaseLost(f"agent {epoch} does not speak for host {host} any more")
            for device in devices:
                work.run(_MEASURE, _columns(host, device))
            return _pools(work, host)

    def leave(self, host: str, epoch: int) -> None:
        """End the lease of an agent: no pool is placed on its host any more. A stale epoch changes nothing."""
        with self.database.work() as work:
            work.run(_LEAVE, {"host": host, "epoch": epoch})

    def declare_layouts(self, known: Iterable[KnownLayout]) -> None:
        """Store the layouts of configurations. A measured time of a load is kept."""
        rows = [
            {
                "configuration": one.configuration,
                "type": one.type,
                "devices": len(one.parts),
                "parts": _json(list(one.parts)),
                "ram": one.ram,
                "source": one.source,
                "load": one.load.total_seconds(),
                "pace": one.tokens_per_second,
            }
            for one in known
        ]
        if rows:
            with self.database.work() as work:
                work.run(_DECLARE, rows)

    def forget_failures(self, model: str, before: datetime) -> None:
        """Let pools of the model that failed before this instant not count: its file was another one."""
        with self.database.work() as work:
            work.run(_FORGET_FAILURES, {"id": ids.new_id(), "model": model, "at": before})

    def pools(self, host: str) -> list[AssignedPool]:
        """Return the pools of a host that have a reservation, the oldest first."""
        with self.database.work() as work:
            return _pools(work, host)

    def activate(self, host: str, epoch: int, pool: str, threads: int) -> None:
        """
        Allow a process of the pool to use its bytes from now on.

        Raises LeaseLost when the reservation is no longer held or waits for other pools, and for a stale epoch.
        """
        with self.database.work() as work:
            open_ = session.open_session(work, host)
            until = open_.now + self.pool_lease
            open_.change(lambda found: rules.activate(found, pool, epoch, until))
            open_.write()
            work.run(_BEGIN, {"id": pool, "threads": threads})

    def record_processes(self, processes: Sequence[ObservedProcess]) -> None:
        """Store the observations of running processes."""
        rows = [
            {
                "id": one.id,
                "state": one.state,
                "pid": one.pid,
                "threads": one.threads,
                "tail": texts.printable(one.log_tail),
                "used": _json(dict(one.used)),
                "peak": _json(dict(one.peak)),
            }
            for one in processes
        ]
        if rows:
            with self.database.work() as work:
                work.run(_OBSERVE, rows)

    def release(self, host: str, epoch: int, ended: PoolEnded) -> None:
        """
        Release the reservation of a pool whose process is dead, with its memory free, or was never started.

        A reservation that was released already stays as it is. Raises LeaseLost for a stale epoch.
        """
        ending = texts.printable(ended.ending, _SENTENCE)
        with self.database.work() as work:
            open_ = session.open_session(work, host)
            if ended.id not in open_.ledger.reservations:
                return
            open_.change(lambda found: rules.release(found, ended.id, epoch), ending)
            open_.write()
            values = {
                "id": ended.id,
                "returncode": ended.returncode,
                "failed": ended.failed,
                "ending": ending,
                "tail": texts.printable(ended.log_tail),
            }
            work.run(_END, values)
        _log.info("pool_released", pool=ended.id, failed=ended.failed, ending=ending)

    def record_orphan_end(self, pool: str, log_tail: str) -> None:
        """Store the end of an orphan: a process whose reservation was released while it was alive."""
        ending = "its reservation was released while its process was alive; its agent ended it"
        with self.database.work() as work:
            work.run(_END_ORPHAN, {"id": pool, "ending": ending, "tail": texts.printable(log_tail)})

    def _require_own(self, work: UnitOfWork, host: str, identity: str) -> None:
        other = work.row(_KNOWN, {"host": host, "identity": identity})
        if other is None:
            return
        if other.alive:
            raise Conflict(f"another agent speaks for host {host}; give each host its own name (setting fleet.host)")
        if other.held:
            raise Conflict(
                f"host {host} holds {other.held} reservations of an agent with another data directory; start that "
                f"agent, or if the machine is gone, run `arriero hosts remove {host} --lost`"
            )

    def _put(self, work: UnitOfWork, host: str, device: DeviceReport) -> None:
        if not work.run(_PUT_DEVICE, _columns(host, device)):
            raise Conflict(
                f"device {device.id} belongs to another host; give each host its own name (setting fleet.host)"
            )


def _columns(host: str, device: DeviceReport) -> dict[str, Any]:
    """The columns of a device's row, and fields of its measurement that are not stored."""
    own = {"id": device.id, "host": host, "type": device.type, "unmanaged": device.unmanaged}
    derived = {"used": device.measured.used, "simulated": device.measured.simulated}
    return asdict(device.measured) | own | derived


def not_served(model: str, reason: str) -> str:
    """Return the problem of a host on which a model's file cannot be served."""
    return f"{model}{_NOT_SERVED}{reason}"


def unserved_model(problem: str) -> tuple[str, str] | None:
    """Return the model and the reason of such a problem of a host, and None for any other problem."""
    model, found, reason = problem.partition(_NOT_SERVED)
    return (model, reason) if found else None


def _pools(work: UnitOfWork, host: str) -> list[AssignedPool]:
    return [
        AssignedPool(
            id=row.id,
            epoch=row.epoch,
            state=ReservationState(row.state),
            waits=row.waits,
            configuration=row.configuration,
            model=row.model,
            desired=Desired(row.desired),
            stop_reason=row.stop_reason or "",
            bytes=row.bytes,
            phase=None if row.phase is None else PoolPhase(row.phase),
            stalled=timedelta(milliseconds=int(row.stalled_ms)),
            silent=timedelta(seconds=float(row.silent)),
            detail=row.detail or "",
        )
        for row in work.rows(_POOLS, {"host": host})
    ]


def _json(value: Any) -> str:
    return json.dumps(value)
