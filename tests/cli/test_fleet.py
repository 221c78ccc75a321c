"""`arriero fleet`, `arriero pools` and `arriero hosts`, against an API that serves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from sqlalchemy import text
from typer.testing import CliRunner

from app.cli import app
from app.fleet import files, needs
from app.fleet.holder import Holder, Report
from app.fleet.hosts import Declared, Ended, Hosts
from app.fleet.pool import Stage
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.errors import Conflict, NotFound
from app.kernel.settings import Settings
from app.workflows.service import Runs
from tests.fleet.granting import LEASE, begun, granted
from tests.serving import served, services_of

MODEL = "smollm2:135m"

Arriero = Callable[..., Result]


@pytest.fixture
def arriero(database: Database, publisher: CeleryPublisher, runs: Runs, tmp_path: Path) -> Iterator[Arriero]:
    """The command, with the address of an API."""
    settings = Settings(data_dir=tmp_path)
    with served(services_of(settings, database, publisher, runs)) as url:

        def run(*arguments: str) -> Result:
            result = CliRunner().invoke(app, ["--set", f"api.url={url}", *arguments], env={"COLUMNS": "240"})
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                raise result.exception
            assert result.exit_code == 0, result.output
            return result

        yield run


@pytest.fixture
def hosts(database: Database) -> Hosts:
    return Hosts(database, LEASE, LEASE)


@pytest.fixture
def agent(hosts: Hosts) -> int:
    device = Declared("box/sim-0", "sim-0", "simulated", "simulated", 1000, 1000, simulated=True, bandwidth=10**9)
    return hosts.join("box", "box", 8, [device], {})


@pytest.fixture
def pool(database: Database, hosts: Hosts, agent: int) -> str:
    configuration = needs.configuration_id(files.read_catalog().get(MODEL))
    id_ = granted(database, "box", {"box/sim-0": 600}, configuration=configuration, model=MODEL)
    assert isinstance(id_, str)
    epoch = begun(hosts, "box", agent, id_)
    Holder(database, LEASE).renew(id_, epoch, Report(Stage.SERVING, worker="simulated-pool.x", busy=1))
    return id_


def ordered(database: Database) -> list[tuple[str, str, str | None]]:
    with database.work() as work:
        rows = work.rows(
            text("SELECT what, model, pool_id::text AS pool FROM pool_order ORDER BY created_at, what DESC")
        )
    return [(row.what, row.model, row.pool) for row in rows]


def test_pools_are_started_stopped_and_restarted(arriero: Arriero, database: Database, pool: str) -> None:
    assert f"{MODEL} (simulated)" in arriero("pools", "list").output
    assert "is ordered" in arriero("pools", "start", MODEL, "--pin").output
    arriero("pools", "restart", pool[-6:])
    arriero("pools", "stop", pool)
    arriero("pools", "stop", MODEL)

    assert ordered(database) == [
        ("start", MODEL, None),
        ("stop", MODEL, pool),
        ("start", MODEL, None),
        ("stop", MODEL, pool),
        ("stop", MODEL, None),
    ]
    with database.work() as work:
        assert work.rows(text("SELECT model FROM standing")) == [], "whoever stops a model keeps it up no longer"
    with pytest.raises(NotFound, match="no pool 'ffffff'"):
        arriero("pools", "restart", "ffffff")


def test_the_log_and_the_end_of_a_pool_outlive_it(arriero: Arriero, hosts: Hosts, agent: int, pool: str) -> None:
    hosts.release("box", agent, Ended(pool, -9, failed=True, ending="it was ended by SIGKILL", log_tail="one\ntwo"))

    assert arriero("pools", "logs", pool[-6:]).output == "one\ntwo\n"
    assert "no pools" in arriero("pools", "list").output
    assert "it was ended by SIGKILL" in arriero("pools", "list", "--ended").output
    with pytest.raises(Conflict, match="has ended already"):
        arriero("pools", "stop", pool)


def test_hosts_are_cordoned_drained_opened_and_forgotten(arriero: Arriero, hosts: Hosts, agent: int, pool: str) -> None:
    for command, state in (("cordon", "cordoned"), ("drain", "draining"), ("open", "open")):
        arriero("hosts", command, "box")
        assert json.loads(arriero("hosts", "list", "--json").output)["hosts"][0]["state"] == state
    with pytest.raises(Conflict, match="stop it first"):
        arriero("hosts", "remove", "box")

    hosts.leave("box", agent)
    assert "silent" in arriero("fleet").output
    with pytest.raises(Conflict, match="--lost"):
        arriero("hosts", "remove", "box")
    assert "is forgotten" in arriero("hosts", "remove", "box", "--lost").output
    assert json.loads(arriero("hosts", "list", "--json").output) == {"hosts": []}


def test_why_a_model_is_not_running_is_told_in_a_sentence(arriero: Arriero, agent: int) -> None:
    told = arriero("fleet", "why", MODEL).output
    assert f"{MODEL} is unasked: nobody waits for it" in told
    assert "nothing is to be moved" in arriero("fleet", "defragment", "--dry-run").output
