"""Reports of devices, and grants without a planner: the tests act as the reconciler and the agent."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from sqlalchemy import text

from app.devices.device import HardwareKind, MeasuredDevice
from app.fleet.hosts import DeviceReport, Hosts
from app.fleet.ledger import rules, session
from app.fleet.ledger.reservation import ReservationRefused, ReservationRequest
from app.kernel import ids
from app.kernel.database import Database

LEASE = timedelta(minutes=1)


def device_report(
    id_: str,
    name: str = "",
    *,
    kind: HardwareKind = HardwareKind.GPU,
    type_: str = "L4",
    total: int = 1000,
    capacity: int | None = None,
    used: int = 0,
    unmanaged: int = 0,
    uuid: str = "",
) -> DeviceReport:
    """A report of a device; without a `capacity` all of it may be reserved."""
    bandwidth = 10**9 if kind is HardwareKind.SIMULATED else None
    measured = MeasuredDevice(name or id_, kind, type_, total, total - used, uuid=uuid, bandwidth=bandwidth)
    return DeviceReport(id_, type_, total if capacity is None else capacity, measured, unmanaged)


def device_reports(*ids: str) -> list[DeviceReport]:
    """Reports of GPUs with 1,000 bytes each."""
    return [device_report(id_) for id_ in ids]


def cpu_report(id_: str, *, total: int = 1000) -> DeviceReport:
    """A report of the RAM of a host."""
    return device_report(id_, kind=HardwareKind.CPU, type_="cpu", total=total)


def simulated_report(id_: str, name: str) -> DeviceReport:
    """A report of a simulated device with 1,000 bytes."""
    return device_report(id_, name, kind=HardwareKind.SIMULATED, type_="simulated")


def granted(
    database: Database,
    host: str,
    sizes: Mapping[str, int],
    after: frozenset[str] = frozenset(),
    configuration: str = "m-1.x",
    model: str = "m:1",
) -> str | ReservationRefused:
    """Grant a pool, as the reconciler does."""
    with database.work() as work:
        open_ = session.open_session(work, host)
        id_ = str(ids.new_id())
        claim = ReservationRequest(id_, session.next_epoch(work), host, configuration, sizes, open_.now + LEASE, after)
        refused = open_.change(lambda found: rules.claim(found, claim))
        if refused is not None:
            return refused
        open_.write()
        insert = """
            INSERT INTO pool (id, configuration, model, slots, purpose, reason, desired, estimate_seconds)
            VALUES (CAST(:id AS uuid), :configuration, :model, 4, 'demand', '1 step waits', 'run', 0)
        """
        work.run(text(insert), {"id": id_, "configuration": configuration, "model": model})
    return id_


def begun(hosts: Hosts, host: str, agent: int, id_: str) -> int:
    """Activate a pool, as the agent of its host does. Returns the epoch of the grant."""
    hosts.activate(host, agent, id_, 1)
    return next(pool.epoch for pool in hosts.pools(host) if pool.id == id_)


def audit(database: Database) -> None:
    """Check that the sums on the devices are those of the claims without promised bytes, and within the capacities."""
    statement = """
        SELECT device.id, capacity_bytes, charged_bytes,
               COALESCE((SELECT sum(bytes) FROM reservation_device JOIN reservation ON reservation.id = reservation_id
                         WHERE device_id = device.id AND state <> 'released'), 0)
             - COALESCE((SELECT sum(bytes) FROM promise WHERE device_id = device.id), 0) AS counted
        FROM device
    """
    with database.work() as work:
        open_ = session.open_session(work)
        assert rules.problems(open_.ledger) == []
        for row in work.rows(text(statement)):
            assert row.charged_bytes == row.counted <= row.capacity_bytes, row
