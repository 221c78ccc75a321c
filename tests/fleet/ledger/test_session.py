"""The ledger on the real Postgres: concurrent agents, pools and planners, and the constraints of the database."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import psycopg
import pytest
from sqlalchemy import text

from app.fleet.holder import HeartbeatReport, ReservationHolder
from app.fleet.hosts import Hosts, PoolEnded
from app.fleet.ledger import rules, session
from app.fleet.ledger.reservation import ReservationRefused, ReservationState
from app.fleet.pool import Desired, PoolPhase
from app.footprint.layout import KnownLayout
from app.kernel.database import Database
from app.kernel.errors import Conflict, LeaseLost
from tests.fleet.granting import LEASE, audit, begun, cpu_report, device_report, device_reports, granted


@pytest.fixture
def hosts(database: Database) -> Hosts:
    return Hosts(database, agent_lease=LEASE, pool_lease=LEASE)


@pytest.fixture
def holder(database: Database) -> ReservationHolder:
    return ReservationHolder(database, LEASE)


def drained(database: Database, host: str, id_: str) -> None:
    with database.work() as work:
        open_ = session.open_session(work, host)
        open_.change(lambda found: rules.drain(found, id_))
        open_.write()


def charged(database: Database, device: str) -> int:
    with database.work() as work:
        row = work.row(text("SELECT charged_bytes FROM device WHERE id = :id"), {"id": device})
        assert row is not None
        return int(row.charged_bytes)


def gone(id_: str) -> PoolEnded:
    return PoolEnded(id_, 0, failed=False, ending="asked to", log_tail="bye")


def test_a_pool_from_its_grant_to_its_end(database: Database, hosts: Hosts, holder: ReservationHolder) -> None:
    agent = hosts.join("h", "here", 8, device_reports("a", "b"), {})
    id_ = granted(database, "h", {"a": 600, "b": 300})
    assert isinstance(id_, str)
    (pool,) = hosts.pools("h")
    assert (pool.state, pool.waits, pool.desired, dict(pool.bytes)) == (
        ReservationState.HELD,
        False,
        Desired.RUN,
        {"a": 600, "b": 300},
    )
    with pytest.raises(LeaseLost):
        holder.take(id_, pool.epoch)

    hosts.activate("h", agent, id_, threads=3)
    grant = holder.take(id_, pool.epoch)
    assert ([part.bytes for part in grant.parts], grant.threads) == ([600, 300], 3)
    assert holder.adjust(grant, {"a": 700, "b": 200}) == 1
    assert (charged(database, "a"), charged(database, "b")) == (700, 200)
    assert isinstance(holder.adjust(holder.take(id_, pool.epoch), {"a": 1001, "b": 200}), ReservationRefused)

    reply = holder.renew(id_, grant.epoch, HeartbeatReport(PoolPhase.SERVING, busy=2))
    assert reply.desired is Desired.RUN
    assert hosts.heartbeat("h", agent, [device_report("a", used=650)], ["m.1"], [])[0].phase is PoolPhase.SERVING

    hosts.release("h", agent, gone(id_))
    hosts.release("h", agent, gone(id_))
    assert (charged(database, "a"), hosts.pools("h")) == (0, [])
    with pytest.raises(LeaseLost, match="was released"):
        holder.renew(id_, grant.epoch, HeartbeatReport(PoolPhase.SERVING))


def test_a_pool_on_gpus_stores_its_layout_of_gpus_and_ram(
    database: Database, hosts: Hosts, holder: ReservationHolder
) -> None:
    devices = [
        *(device_report(id_, uuid=f"GPU-{id_}") for id_ in ("g0", "g1")),
        cpu_report("h/cpu"),
    ]
    agent = hosts.join("h", "here", 8, devices, {})
    hosts.declare_layouts([KnownLayout("m-1.x", "L4", (600, 300), "closed form", timedelta(seconds=9), 10.0, 50)])
    id_ = granted(database, "h", {"g0": 600, "g1": 300, "h/cpu": 50})
    assert isinstance(id_, str)
    grant = holder.take(id_, begun(hosts, "h", agent, id_))

    assert ([part.id for part in grant.computing], grant.type) == (["g0", "g1"], "L4")
    holder.store_layout(grant, {"g0": 310, "g1": 620, "h/cpu": 70}, "dry run")
    with database.work() as work:
        (row,) = work.rows(text("SELECT type, devices, parts, ram_bytes, source FROM layout"))
    assert tuple(row) == ("L4", 2, [620, 310], 70, "dry run")


def test_bytes_pass_from_a_victim_to_the_pool_that_waits_for_it(database: Database, hosts: Hosts) -> None:
    agent = hosts.join("h", "here", 8, device_reports("a"), {})
    victim = granted(database, "h", {"a": 900})
    assert isinstance(victim, str)
    hosts.activate("h", agent, victim, 1)
    assert isinstance(granted(database, "h", {"a": 500}, frozenset({victim})), ReservationRefused)

    drained(database, "h", victim)
    waiting = granted(database, "h", {"a": 500}, frozenset({victim}))
    assert isinstance(waiting, str)
    assert hosts.pools("h")[1].waits
    with pytest.raises(LeaseLost, match="waits"):
        hosts.activate("h", agent, waiting, 1)

    hosts.release("h", agent, gone(victim))
    assert charged(database, "a") == 500
    assert not hosts.pools("h")[0].waits
    hosts.activate("h", agent, waiting, 1)


def test_a_renewal_outlasts_a_session_that_read_the_older_lease(
    database: Database, hosts: Hosts, holder: ReservationHolder
) -> None:
    agent = hosts.join("h", "here", 8, device_reports("a"), {})
    id_ = granted(database, "h", {"a": 600})
    assert isinstance(id_, str)
    epoch = begun(hosts, "h", agent, id_)
    lease = text("SELECT lease_until, draining FROM reservation")
    with database.work() as work:
        open_ = session.open_session(work, "h")
        holder.renew(id_, epoch, HeartbeatReport(PoolPhase.SERVING))
        with database.work() as other:
            renewed = other.rows(lease)[0].lease_until
        assert renewed > open_.ledger.reservations[id_].lease_until
        assert open_.change(lambda found: rules.drain(found, id_)) is None
        open_.write()

    with database.work() as work:
        assert tuple(work.rows(lease)[0]) == (renewed, True)


def test_a_pool_that_is_slow_to_start_still_has_its_bytes(
    database: Database, hosts: Hosts, holder: ReservationHolder
) -> None:
    agent = hosts.join("h", "here", 8, device_reports("a"), {})
    id_ = granted(database, "h", {"a": 600})
    assert isinstance(id_, str)
    hosts.activate("h", agent, id_, 1)
    with database.work() as work:
        work.run(text("UPDATE reservation SET state = 'suspect', lease_until = now() - interval '1 s'"))
    (pool,) = hosts.pools("h")

    holder.take(id_, pool.epoch)
    assert hosts.pools("h")[0].state is ReservationState.ACTIVE


def test_the_stale_epoch_of_a_replaced_agent_is_rejected(database: Database, hosts: Hosts) -> None:
    old = hosts.join("h", "here", 8, device_reports("a"), {})
    id_ = granted(database, "h", {"a": 900})
    assert isinstance(id_, str)
    new = hosts.join("h", "here", 8, device_reports("a"), {})

    for act in (
        lambda: hosts.activate("h", old, id_, 1),
        lambda: hosts.release("h", old, gone(id_)),
        lambda: hosts.heartbeat("h", old, [], [], []),
    ):
        with pytest.raises(LeaseLost):
            act()
    hosts.activate("h", new, id_, 1)


def test_an_agent_that_adopts_a_process_with_a_released_reservation_cannot_join(
    database: Database, hosts: Hosts
) -> None:
    agent = hosts.join("h", "here", 8, device_reports("a"), {})
    id_ = granted(database, "h", {"a": 900})
    assert isinstance(id_, str)
    hosts.release("h", agent, gone(id_))

    with pytest.raises(LeaseLost, match="was released while its process was alive"):
        hosts.join("h", "here", 8, device_reports("a"), {id_: 1})


def test_an_agent_that_does_not_know_the_processes_of_a_host_cannot_join(database: Database, hosts: Hosts) -> None:
    """It would count them as dead, and release twaiting bytes."""
    hosts.join("h", "here", 8, device_reports("a"), {})
    with pytest.raises(Conflict, match="another agent speaks for host h"):
        hosts.join("h", "there", 8, device_reports("a"), {})

    assert isinstance(granted(database, "h", {"a": 900}), str)
    with database.work() as work:
        work.run(text("UPDATE host SET agent_until = now() - interval '1 s'"))
    with pytest.raises(Conflict, match="holds 1 reservations"):
        hosts.join("h", "there", 8, device_reports("a"), {})
    assert hosts.join("h", "here", 8, device_reports("a"), {})


def test_postgres_refuses_more_than_the_capacity_of_a_device(database: Database, hosts: Hosts) -> None:
    """The constraint holds whatever a defect of the rules would write."""
    hosts.join("h", "here", 8, device_reports("a"), {})
    for column in ("charged_bytes", "non_preemptible_bytes"):
        with pytest.raises(psycopg.errors.CheckViolation), database.work() as work:
            work.run(text(f"UPDATE device SET {column} = capacity_bytes + 1"))


def test_concurrent_claims_never_exceed_a_device(database: Database, hosts: Hosts, holder: ReservationHolder) -> None:
    """Planners, agents and pools of two hosts run at once, with crashes; the ledger is correct after every commit."""
    agents = {host: hosts.join(host, "here", 8, device_reports(f"{host}1", f"{host}2"), {}) for host in "gh"}

    def acts(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(25):
            with contextlib.suppress(LeaseLost):
                act(chance)
            audit(database)

    def act(chance: random.Random) -> None:
        host = chance.choice("gh")
        pools = hosts.pools(host)
        pool = chance.choice(pools) if pools else None
        if pool is None or chance.random() < 0.4:
            victims = frozenset({pool.id}) if pool and chance.random() < 0.7 else frozenset()
            devices = chance.sample([f"{host}1", f"{host}2"], chance.randint(1, 2))
            granted(database, host, {device: chance.randint(1, 700) for device in devices}, victims)
            return
        sizes = {device: chance.randint(1, 700) for device in pool.bytes}
        with_pool: list[Callable[[], object]] = [
            lambda: drained(database, host, pool.id),
            lambda: hosts.activate(host, agents[host], pool.id, 1),
            lambda: hosts.release(host, agents[host], gone(pool.id)),
            lambda: holder.renew(pool.id, pool.epoch, HeartbeatReport(PoolPhase.SERVING)),
            lambda: holder.adjust(holder.take(pool.id, pool.epoch), sizes),
        ]
        chance.choice(with_pool)()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(acts, range(4)))
