"""The agent of a host, pass by pass, on the real database; its pools are rows without processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from app.fleet import views
from app.kernel import settings
from app.kernel.database import Database
from app.kernel.errors import ServerNotStarted
from tests.fleet.granting import begun, granted
from workers.agent.agent import Agent


@pytest.fixture
def agent(database: Database, redis_url: str, tmp_path: Path) -> Iterator[Agent]:
    environment = {
        "ARRIERO_DATA_DIR": str(tmp_path),
        "ARRIERO_DATABASE_URL": database.url,
        "ARRIERO_REDIS_URL": redis_url,
        "ARRIERO_FLEET__HOST": "h",
    }
    (tmp_path / "run" / "pools").mkdir(parents=True)
    before = signal.getsignal(signal.SIGCHLD)
    made = Agent(settings.load(environment=environment).settings)
    yield made
    signal.signal(signal.SIGCHLD, before)
    made._devices.close()
    made._database.close()


def charged(database: Database) -> set[str]:
    return {pool.id for pool in views.pools(database)}


def test_a_pool_that_cannot_be_released_does_not_stop_the_others(agent: Agent, database: Database) -> None:
    agent._run_pass()
    assert agent._epoch is not None
    pools = []
    for _ in range(3):
        pool = granted(database, "h", {"h/cpu": 100})
        assert isinstance(pool, str)
        begun(agent._hosts, "h", agent._epoch, pool)
        pools.append(pool)
    with database.work() as work:
        work.run(
            text(f"ALTER TABLE pool_process ADD CONSTRAINT refuses CHECK (state <> 'ended' OR pool_id <> '{pools[0]}')")
        )
    try:
        agent._run_pass()
        assert charged(database) == {pools[0]}
    finally:
        with database.work() as work:
            work.run(text("ALTER TABLE pool_process DROP CONSTRAINT refuses"))
    agent._run_pass()
    assert charged(database) == set()


def test_a_pass_continues_when_a_model_file_crashes_its_reader(
    agent: Agent, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a defect in reading files the host still sends heartbeats, and starts and stops pools."""

    def crashes(*_: object, **__: object) -> None:
        raise ZeroDivisionError("integer division or modulo by zero")

    monkeypatch.setattr("app.footprint.closed_form.closed_form", crashes)
    agent._run_pass()
    (host,) = views.hosts(database)
    assert host.alive
    assert any("smollm2:135m is not served here" in problem for problem in host.problems)
    monkeypatch.undo()
    agent._files.invalidate()
    agent._run_pass()
    assert views.hosts(database)[0].problems == []


def test_pools_do_not_spin_for_long(agent: Agent, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool's threads wait as the agent says, unless the operator says otherwise (app/decisions.md, 84)."""
    started: list[dict[str, str]] = []

    def refused(_: object, environment: dict[str, str]) -> None:
        started.append(environment)
        raise ServerNotStarted("pool", "a test")

    monkeypatch.setattr(agent, "_start_process", refused)
    for own in ({}, {"GOMP_SPINCOUNT": "7"}):
        agent._environment |= own
        agent._run_pass()
        pool = granted(database, "h", {"h/cpu": 100})
        assert isinstance(pool, str)
        agent._run_pass()
    assert [one["GOMP_SPINCOUNT"] for one in started] == ["2000", "7"]
