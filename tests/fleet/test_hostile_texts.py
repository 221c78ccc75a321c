"""Texts of other programs that agents and pools report: none of them prevents a write to the database."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from app.fleet import views
from app.fleet.holder import HeartbeatReport, ReservationHolder
from app.fleet.hosts import Hosts, ObservedProcess, PoolEnded
from app.fleet.pool import PoolPhase, ProcessState
from app.kernel.database import Database
from tests.fleet.granting import LEASE, begun, device_reports, granted

HOSTILE = ["a\0b", "half \ud83e", "\x1b[2Jgone\a", "long " * 100_000]
IDS = ["nul", "surrogate", "terminal", "long"]


@pytest.fixture
def hosts(database: Database) -> Hosts:
    return Hosts(database, LEASE, LEASE)


@pytest.mark.parametrize("hostile", HOSTILE, ids=IDS)
def test_a_reservation_is_released_whatever_its_pool_wrote(database: Database, hosts: Hosts, hostile: str) -> None:
    agent = hosts.join("h", "h", 8, device_reports("d"), {})
    hosts.heartbeat("h", agent, [], [], [hostile])
    pool = granted(database, "h", {"d": 100})
    assert isinstance(pool, str)
    epoch = begun(hosts, "h", agent, pool)
    ReservationHolder(database, LEASE).renew(
        pool, epoch, HeartbeatReport(PoolPhase.SERVING, detail=hostile, worker="pool@h")
    )
    hosts.record_processes([ObservedProcess(pool, ProcessState.RUNNING, 1, 1, {}, {}, hostile)])

    hosts.release("h", agent, PoolEnded(pool, 1, failed=True, ending=hostile, log_tail=hostile))

    (device,) = views.hosts(database)[0].devices
    assert device.reserved == 0
    (problem,) = views.hosts(database)[0].problems
    seen = views.pool(database, pool)
    with database.work() as work:
        (reservation,) = work.rows(text("SELECT release_reason FROM reservation"))
    for kept in (problem, seen.detail, str(seen.ending), reservation.release_reason):
        assert len(kept) <= 4_000
        assert not any(character in kept for character in "\0\x1b\a\ud83e")


@pytest.mark.parametrize("hostile", HOSTILE, ids=IDS)
def test_the_end_of_an_orphan_is_stored_whatever_it_wrote(database: Database, hosts: Hosts, hostile: str) -> None:
    agent = hosts.join("h", "h", 8, device_reports("d"), {})
    pool = granted(database, "h", {"d": 100})
    assert isinstance(pool, str)
    begun(hosts, "h", agent, pool)
    hosts.record_orphan_end(pool, hostile)
    with database.work() as work:
        row = work.row(text("SELECT state FROM pool_process"))
    assert row is not None
    assert row.state == "ended"
