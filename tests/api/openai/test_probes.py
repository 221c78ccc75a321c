"""Probes of pools with simulated engines, over a real broker and database."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import redis
from sqlalchemy import text

from app.fleet.holder import HeartbeatReport, ReservationHolder
from app.fleet.hosts import Hosts
from app.fleet.pool import PoolPhase
from app.governance.probes import service
from app.governance.probes.service import Probes
from app.inference import direct
from app.kernel import clock
from app.kernel.database import Database
from app.kernel.errors import FailureReason, StepFailure
from app.kernel.sections.probes import ProbeSettings
from app.scheduler.operator_commands import OperatorCommands
from tests.api.openai.conftest import MODEL, StartPool, catalog
from tests.fleet.granting import LEASE, begun, cpu_report, granted
from workers.engine.simulated import SimulatedEngine

HOST = "here"
SETTINGS = ProbeSettings(timeout=timedelta(seconds=20), every=timedelta(seconds=1), check_every=timedelta(seconds=1))


class Broken(SimulatedEngine):
    """An engine that fails each request."""

    def generate(self, *_: Any, **__: Any) -> Any:
        raise StepFailure(FailureReason.ENGINE_ERROR, "a CUDA error that does not go away")


@pytest.fixture
def grant(database: Database) -> Callable[[], str]:
    """Makes the rows of a pool that serves; returns its id."""
    hosts = Hosts(database, LEASE, LEASE)
    agent = hosts.join(HOST, HOST, 8, [cpu_report(f"{HOST}/cpu", total=10_000)], {})

    def made() -> str:
        id_ = granted(database, HOST, {f"{HOST}/cpu": 100}, model=MODEL)
        assert isinstance(id_, str)
        epoch = begun(hosts, HOST, agent, id_)
        ReservationHolder(database, LEASE).renew(id_, epoch, HeartbeatReport(PoolPhase.SERVING))
        with database.work() as work:
            work.run(text("UPDATE pool_report SET serving_at = now() - interval '1 hour'"))
        return id_

    return made


@pytest.fixture
def probes(database: Database, redis_url: str, valkey: redis.Redis) -> Probes:
    return probes_with(database, redis_url, SETTINGS)


def probes_with(database: Database, redis_url: str, settings: ProbeSettings) -> Probes:
    client = redis.Redis.from_url(redis_url, protocol=2)
    return Probes(database, client, OperatorCommands(database, lambda: None), settings, timedelta(minutes=2))


def serve(start_pool: StartPool, id_: str, engine: SimulatedEngine | None = None) -> None:
    pool = start_pool(engine=engine)
    # Its thread waits for the keys that it had: the next ones are those of the grant.
    pool._probe_key, pool.pool_id = direct.probe_key(id_), id_
    pool._wake()


def pass_time(database: Database) -> None:
    with database.work() as work:
        work.run(text("UPDATE pool_probe SET sent_at = sent_at - interval '1 hour'"))


def commands(database: Database) -> list[tuple[str, UUID | None, str]]:
    with database.work() as work:
        rows = work.rows(text("SELECT command, pool_id, reason FROM pool_command ORDER BY command"))
    return [(row.command, row.pool_id, row.reason) for row in rows]


def test_a_pool_that_serves_writes_a_token(
    probes: Probes, grant: Callable[[], str], start_pool: StartPool, database: Database, redis_url: str
) -> None:
    id_ = grant()
    serve(start_pool, id_)
    assert probes.run(catalog(), clock.now) == {"ok": 1}
    assert probes.run(catalog(), clock.now) == {}, "it is not due again"
    with database.work() as work:
        work.run(text("UPDATE pool_probe SET sent_at = sent_at - interval '2 seconds'"))
    usual = probes_with(database, redis_url, ProbeSettings())
    assert usual.run(catalog(), clock.now) == {}
    assert usual.run(catalog(), clock.now, every_pool=True) == {"ok": 1}, "an operator asks for it"
    (found,) = service.all_probes(database)
    assert (found.pool, found.model, found.outcome, found.failures) == (id_, MODEL, "ok", 0)
    assert found.seconds is not None
    with database.work() as work:
        assert work.rows(text("SELECT 1 FROM run")) == [], "a probe is no run"


def test_a_pool_that_fails_is_drained_and_another_one_started(
    probes: Probes, grant: Callable[[], str], start_pool: StartPool, database: Database
) -> None:
    id_ = grant()
    serve(start_pool, id_, Broken(2, 500.0, timedelta(0)))
    assert probes.run(catalog(), clock.now) == {"failed": 1}
    assert commands(database) == [], "once may be an accident"
    pass_time(database)
    assert probes.run(catalog(), clock.now) == {"failed": 1, "restarted": 1}
    (start, stop) = commands(database)
    assert (start[0], stop[0], str(stop[1])) == ("start", "stop", id_)
    assert "a CUDA error that does not go away" in stop[2]


def test_a_pool_that_does_not_take_its_probe_is_hung_and_a_busy_one_is_slow(
    grant: Callable[[], str], database: Database, redis_url: str, valkey: redis.Redis
) -> None:
    idle, busy, stalled = grant(), grant(), grant()
    with database.work() as work:
        work.run(
            text("UPDATE pool_report SET busy = 1, stalled_ms = :ms WHERE pool_id = CAST(:id AS uuid)"),
            [{"id": busy, "ms": 9_000}, {"id": stalled, "ms": 130_000}],
        )
    impatient = SETTINGS.model_copy(update={"timeout": timedelta(milliseconds=150)})
    assert probes_with(database, redis_url, impatient).run(catalog(), clock.now) == {"hung": 2, "slow": 1}
    found = {one.pool: (one.outcome, one.failures) for one in service.all_probes(database)}
    assert found == {idle: ("hung", 1), busy: ("slow", 0), stalled: ("hung", 1)}
    assert [key for key in valkey.keys("arriero:*") if "probe" in str(key)] == [], "a late pool finds no old probe"


def test_two_control_workers_probe_a_pool_once(
    grant: Callable[[], str], database: Database, redis_url: str, valkey: redis.Redis
) -> None:
    for _ in range(3):
        grant()
    first, second = (probes_with(database, redis_url, SETTINGS) for _ in range(2))
    assert len(first._due(catalog())) == 3
    assert second._due(catalog()) == []


def test_the_broken_pools_of_a_model_are_not_restarted_for_ever(
    probes: Probes, grant: Callable[[], str], start_pool: StartPool, database: Database
) -> None:
    for _ in range(SETTINGS.max_restarts):
        grant()
    with database.work() as work:
        work.run(text("UPDATE pool SET desired = 'drain', stop_reason = 'probe: it failed'"))
    serve(start_pool, grant(), Broken(2, 500.0, timedelta(0)))
    for _ in range(3):
        assert probes.run(catalog(), clock.now) == {"failed": 1}
        pass_time(database)
    assert commands(database) == []


def test_a_probe_that_hangs_in_the_engine_does_not_make_its_pool_busy(
    grant: Callable[[], str], start_pool: StartPool, database: Database, redis_url: str
) -> None:
    id_ = grant()
    serve(start_pool, id_, SimulatedEngine(2, 0.001, timedelta(0)))
    impatient = SETTINGS.model_copy(update={"timeout": timedelta(milliseconds=500)})
    probes = probes_with(database, redis_url, impatient)
    assert probes.run(catalog(), clock.now) == {"hung": 1}
    pass_time(database)
    assert probes.run(catalog(), clock.now) == {"hung": 1, "restarted": 1}
