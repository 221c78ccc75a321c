"""Accounts of namespaces: which namespace is charged for the devices of a pool."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import text

from app.access import accounts
from app.access.accounts import NamespaceAccount, NamespaceLimits
from app.fleet.holder import HeartbeatReport, ReservationHolder
from app.fleet.hosts import Hosts
from app.fleet.ledger import session
from app.fleet.ledger.reservation import ReservationState
from app.fleet.pool import PoolPhase
from app.kernel.database import Database
from tests.fleet.granting import LEASE, begun, cpu_report, device_reports, granted


@pytest.fixture
def pool(database: Database) -> str:
    """A pool on two GPUs and some RAM, with the worker w; granted for the namespace `owner`."""
    hosts = Hosts(database, LEASE, LEASE)
    agent = hosts.join("h", "h", 8, [*device_reports("a", "b"), cpu_report("ram")], {})
    id_ = granted(database, "h", {"a": 600, "b": 300, "ram": 100})
    assert isinstance(id_, str)
    epoch = begun(hosts, "h", agent, id_)
    ReservationHolder(database, LEASE).renew(id_, epoch, HeartbeatReport(PoolPhase.SERVING, worker="w"))
    with database.work() as work:
        work.run(text("UPDATE reservation SET namespace = 'owner'"))
    return id_


def record(
    database: Database, working: dict[str, dict[str, int]], waiting: tuple[str, ...] = ()
) -> dict[str, NamespaceAccount]:
    with database.work() as work:
        ledger = session.open_session(work).ledger
        held = [
            accounts.HeldDevices(one.id, frozenset(one.bytes), one.namespace)
            for one in ledger.reservations.values()
            if one.state is not ReservationState.HELD
        ]
        accounts.record_usage(work, held, working, waiting)
    with database.work() as work:
        return {one.namespace: one for one in accounts.list_accounts(work)}


def pass_time(database: Database, seconds: float) -> None:
    with database.work() as work:
        work.run(
            text(
                "UPDATE quota SET counted_at = counted_at - :s * interval '1 s',"
                " period_began = period_began - :s * interval '1 s'"
            ),
            {"s": seconds},
        )


def used(found: dict[str, NamespaceAccount]) -> dict[str, int]:
    return {name: round(one.used.total_seconds()) for name, one in found.items()}


def test_devices_are_charged_to_the_running_namespaces_and_when_idle_to_the_owner(
    database: Database, pool: str
) -> None:
    found = record(database, {"w": {"x": 3, "y": 1}})
    assert {name: one.held_bytes for name, one in found.items()} == {"x": 0, "y": 0}
    pass_time(database, 10)
    found = record(database, {"w": {"x": 3, "y": 1}})
    assert used(found) == {"x": 15, "y": 5}, "two devices for ten seconds"

    pass_time(database, 10)
    assert used(record(database, {}))["owner"] == 0, "its account was created now"
    pass_time(database, 10)
    found = record(database, {})
    assert (used(found)["owner"], found["owner"].held_bytes) == (20, 1000)
    assert used(found)["x"] == 15


def test_after_a_long_gap_at_most_a_minute_is_charged(database: Database, pool: str) -> None:
    record(database, {"w": {"x": 1}})
    pass_time(database, 3600)
    assert used(record(database, {"w": {"x": 1}})) == {"x": 120}, "two devices for a minute"


def test_attained_service_fades_and_accounts_without_limits_are_deleted(database: Database, pool: str) -> None:
    record(database, {"w": {"x": 1, "y": 1}})
    with database.work() as work:
        accounts.set_limits(work, "y", NamespaceLimits(max_device_time=timedelta(hours=1)))
        work.run(text("UPDATE quota SET attained_seconds = 100"))
    pass_time(database, 3600)
    found = record(database, {"other": {"x": 1}}, waiting=("x",))
    assert round(found["x"].attained.total_seconds()) == 50

    pass_time(database, 24 * 3600)
    assert record(database, {"other": {"z": 1}}).keys() == {"owner", "y"}


def test_usage_is_reset_when_a_period_ends(database: Database, pool: str) -> None:
    with database.work() as work:
        accounts.set_limits(
            work, "x", NamespaceLimits(max_device_time=timedelta(seconds=30), period=timedelta(minutes=5))
        )
    record(database, {"w": {"x": 1}})
    pass_time(database, 20)
    assert record(database, {"w": {"x": 1}})["x"].exhausted_until is not None
    pass_time(database, 300)
    found = record(database, {})
    assert (found["x"].exhausted_until, used(found)["x"]) == (None, 0)
