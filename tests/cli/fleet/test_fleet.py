"""`arriero fleet`, `pools`, `hosts` and `namespaces` with a running API; the tests act as agent and pools."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

from app.catalog import files
from app.fleet.holder import HeartbeatReport, ReservationHolder
from app.fleet.hosts import AssignedPool, Hosts, PoolEnded
from app.fleet.pool import PoolPhase
from app.footprint.layout import KnownLayout
from app.inference import demand
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import Conflict, InvalidInput, NotFound
from app.kernel.sections.catalog import CatalogSettings
from app.kernel.sections.work import PoolSettings
from app.kernel.settings import Settings
from app.scheduler import needs, reconcile
from app.scheduler.observation import FleetDemand
from app.scheduler.reconcile_pass import ReconcileTimes
from tests.cli.conftest import Arriero
from tests.fleet.granting import LEASE, simulated_report

#: Each takes 600 of the 1000 bytes of a device; the second owns such a place on sim-1 before it is loaded.
CATALOG = """
[[models]]
name = "alpha:1"
use_cases = ["chat"]
source = { path = "/nowhere/alpha.gguf" }

[[models]]
name = "beta:1"
use_cases = ["chat"]
source = { path = "/nowhere/beta.gguf" }
pools = { reserve = { devices = 1 }, only = ["h/sim-1"] }
"""
ALPHA, BETA = "alpha:1", "beta:1"


class Fleet:
    """One host with two simulated devices; the test acts as its agent and its pools."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database, self.settings = database, settings
        self.catalog = files.read_catalog(settings.catalog.files)
        self.hosts, self.holder = Hosts(database, LEASE, LEASE), ReservationHolder(database, LEASE)
        devices = [simulated_report(f"h/{name}", name) for name in ("sim-0", "sim-1")]
        self.agent = self.hosts.join("h", "h", 8, devices, {})
        ids = [needs.configuration_id(self.catalog.get(name)) for name in (ALPHA, BETA)]
        second = timedelta(seconds=1)
        self.hosts.declare_layouts(KnownLayout(id_, "simulated", (600,), "catalogue", second, 10.0) for id_ in ids)
        self.hosts.heartbeat("h", self.agent, [], [], [])

    def read_demand(self, work: UnitOfWork) -> FleetDemand:
        return demand.read(work, self.catalog, self.settings.pools.models)

    def turn(self) -> None:
        times = ReconcileTimes(timedelta(seconds=30), timedelta(seconds=20), timedelta(minutes=2))
        assert reconcile.reconcile(self.database, self.read_demand, times) is not None

    def begin(self) -> AssignedPool:
        """Start the pool that was granted last, and let it serve."""
        pool = self.hosts.pools("h")[-1]
        self.hosts.activate("h", self.agent, pool.id, 1)
        self.holder.renew(pool.id, pool.epoch, HeartbeatReport(PoolPhase.SERVING, worker="simulated-pool.x"))
        return pool


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    catalog = tmp_path / "catalog.toml"
    catalog.write_text(CATALOG)
    return Settings(data_dir=tmp_path, catalog=CatalogSettings(files=(catalog,)), pools=PoolSettings(models=()))


@pytest.fixture
def fleet(database: Database, settings: Settings) -> Fleet:
    return Fleet(database, settings)


def plain(output: str) -> str:
    """Return the output as one line with single spaces."""
    return " ".join(output.split())


def test_an_empty_fleet_prints_how_to_start_an_agent(arriero: Arriero) -> None:
    assert "no host has joined: start an agent with `arriero agent`" in arriero("fleet").stdout
    assert "no pools" in arriero("pools", "list").stdout
    assert "no namespace has limits" in arriero("namespaces", "list").stdout
    assert "nothing was moved" in arriero("fleet", "defragment", "--history").stdout


def test_a_pool_from_its_start_command_to_its_log(arriero: Arriero, fleet: Fleet) -> None:
    started = arriero("pools", "start", ALPHA, "--pin").stdout
    assert "alpha:1 is coming: 1 pool is kept running: 600 B on sim-0" in started
    fleet.turn()
    assert "alpha:1 is coming" in arriero("fleet", "why", ALPHA).stdout
    pool = fleet.begin()
    assert "alpha:1 is served: 0 of 4 slots are taken" in arriero("pools", "start", ALPHA, "--wait").stdout

    shown = plain(arriero("fleet").stdout)
    assert "alpha:1 (simulated) serving pinned h sim-0" in shown
    assert "kept alpha:1: a pool, pinned, until it is stopped" in shown
    assert json.loads(arriero("fleet", "--json").stdout)["pools"][0]["simulated"] is True

    assert pool.id[-6:] in arriero("pools", "stop", ALPHA).stdout
    fleet.turn()
    fleet.hosts.release("h", fleet.agent, PoolEnded(pool.id, 0, failed=False, ending="it ended", log_tail="one\ntwo"))
    assert arriero("pools", "logs", pool.id[-6:].upper()).stdout == "one\ntwo\n"
    assert "ended" in arriero("pools", "list", "--ended").stdout
    with pytest.raises(Conflict, match="has ended already: it ended"):
        arriero("pools", "stop", pool.id)
    assert "alpha:1 has no pools; no operator command keeps it running" in arriero("pools", "stop", ALPHA).stdout


def test_a_reserve_is_listed_before_and_after_it_is_used(arriero: Arriero, fleet: Fleet) -> None:
    fleet.turn()
    shown = plain(arriero("fleet").stdout)
    assert "reserve beta:1: 600 B on sim-1 of h, idle, and lent to others" in shown
    assert "sim-1 simulated 1000 B - 600 B 1000 B" in shown, "guaranteed, and free"

    arriero("pools", "start", BETA)
    fleet.turn()
    assert "on sim-1 of h, in use" in arriero("fleet").stdout


def test_orphans_are_listed(arriero: Arriero, fleet: Fleet) -> None:
    arriero("pools", "start", ALPHA)
    fleet.turn()
    pool = fleet.begin()
    with fleet.database.work() as work:
        work.run(text("UPDATE reservation SET state = 'suspect'"))
    assert f"orphan {pool.id[-6:]} (alpha:1) on h: a reservation without a process" in plain(arriero("fleet").stdout)
    with fleet.database.work() as work:
        work.run(text("UPDATE reservation SET state = 'released', released_at = now()"))
    assert f"orphan {pool.id[-6:]} (alpha:1) on h: a process without a reservation" in plain(arriero("fleet").stdout)

    fleet.hosts.record_orphan_end(pool.id, "the end")
    assert "orphan" not in arriero("fleet").stdout
    assert "its agent ended it" in plain(arriero("pools", "list", "--ended").stdout)


def test_a_host_is_cordoned_drained_opened_and_removed(arriero: Arriero, fleet: Fleet) -> None:
    assert "cordoned" in arriero("hosts", "cordon", "h").stdout
    assert "is schedulable" in arriero("pools", "start", ALPHA, exits=4).stdout
    with pytest.raises(Conflict, match="alpha:1 is not started: no device of the type simulated is schedulable"):
        arriero("pools", "start", ALPHA, "--wait")
    assert "draining" in arriero("hosts", "drain", "h").stdout
    assert "schedulable" in arriero("hosts", "uncordon", "h").stdout
    with pytest.raises(Conflict, match="stop it first"):
        arriero("hosts", "remove", "h")
    fleet.hosts.leave("h", fleet.agent)
    assert "silent" in arriero("hosts", "list").stdout
    assert arriero("hosts", "remove", "h").stdout == "h is removed\n"


def test_past_defragmentations_are_listed(arriero: Arriero, database: Database) -> None:
    with database.work() as work:
        moved = """
            INSERT INTO defragmentation (moves, gains, stuck)
            VALUES ('[{"pool": "0123456789", "reason": "leaves sim-1"}]', '[{"model": "m", "reason": "it fits"}]', '[]')
        """
        work.run(text(moved))
    shown = arriero("fleet", "defragment", "--history").stdout
    assert "moved 456789: leaves sim-1" in shown
    assert "gains  m: it fits" in shown
    assert arriero("fleet", "defragment", "--dry-run").stdout == "nothing needs to be moved\n"


def test_a_namespace_is_limited_and_freed(arriero: Arriero) -> None:
    given = ("--bytes", "24GiB", "--device-time", "2h", "--weight", "2")
    shown = plain(arriero("namespaces", "limit", "team", *given).stdout)
    assert "team 2 0 B 24.00 GiB 0.00 s 2h 1d" in shown
    freed = json.loads(arriero("namespaces", "free", "team", "--json").stdout)
    assert (freed["max_bytes"], freed["max_device_s"], freed["weight"]) == (None, None, 1.0)
    with pytest.raises(InvalidInput, match="no limit is set"):
        arriero("namespaces", "limit", "team")
    with pytest.raises(InvalidInput, match="is not a valid name of a namespace"):
        arriero("namespaces", "limit", "Team A", "--bytes", "1GiB")
    with pytest.raises(InvalidInput, match="24 lamas"):
        arriero("namespaces", "limit", "team", "--bytes", "24 lamas")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fleet", "why", "nothing:1"), "no model 'nothing:1'"),
        (("fleet", "why", "01a1fdfa-a906-7e23-898e-3ea034e5d688"), "no step with a model"),
        (("pools", "start", "nothing:1"), "no model 'nothing:1'"),
        (("pools", "stop", "nothing:1"), "no model 'nothing:1'"),
        (("pools", "stop", "ffffff"), "no pool 'ffffff'"),
        (("pools", "restart", "ffffff"), "no pool 'ffffff'"),
        (("pools", "restart", "nothing:1"), "no pool of the model 'nothing:1'"),
        (("pools", "logs", "%"), "no pool '%'"),
        (("hosts", "drain", "nowhere"), "no host 'nowhere'"),
        (("hosts", "remove", "nowhere"), "no host 'nowhere'"),
    ],
)
def test_unknown_names_are_reported(arriero: Arriero, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(NotFound, match=re.escape(message)):
        arriero(*arguments)
