"""A fleet of rows, and a runner of actions over the real database."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from app.catalog import files
from app.fleet.hosts import Hosts
from app.governance.actions import action as actions
from app.governance.actions import service, store
from app.governance.actions.effects.effect import ActionContext
from app.governance.actions.execution import ActionExecution, Cause
from app.governance.actions.runner import ActionRunner
from app.kernel import ids
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.live import live_settings, versions
from app.kernel.sections.governance import ActionSettings
from app.kernel.sections.work import PoolSettings
from app.kernel.settings import Settings
from app.scheduler.planner.defragmentation import Defragmentation
from app.workflows.runs.service import Runs
from tests.fleet.granting import begun, cpu_report, granted

MODEL = "smollm2:135m"
CAUSE = Cause("thrash", "2.1 loads per served step", "warning", labels={"model": MODEL})


@dataclass
class World:
    """A database with what actions act on."""

    database: Database
    runs: Runs
    publisher: CeleryPublisher
    settings: Settings = field(default_factory=lambda: Settings(pools=PoolSettings(models=())))
    moved: Defragmentation = field(default_factory=lambda: Defragmentation((), (), ()))

    def runner(self) -> ActionRunner:
        context = ActionContext(
            self.runs,
            self.publisher,
            self.settings,
            lambda: live_settings.read(self.settings, self.database),
            files.read_catalog,
            lambda: None,
            lambda: self.moved,
        )
        return ActionRunner(context)

    def fire(self, *wanted: Any, cause: Cause = CAUSE) -> Cause:
        """Request actions with a new firing, and carry them out."""
        cause = replace(cause, firing_id=ids.new_id())
        with self.database.work() as work:
            service.fired(work, cause, actions.parse(wanted), self.settings.actions)
        self.run()
        return cause

    def clear(self, cause: Cause) -> None:
        """The firing clears, and what holds of it is taken back."""
        assert cause.firing_id is not None
        with self.database.work() as work:
            service.cleared(work, cause.firing_id)
        self.run()

    def run(self) -> int:
        return self.runner().run_due(lambda: True)

    def executions(self, cause: Cause | None = None) -> list[ActionExecution]:
        with self.database.work() as work:
            found = store.page(work, None, None, None, None, 500)
        return sorted(
            (one for one in found if cause is None or one.firing_id == cause.firing_id), key=lambda one: one.position
        )

    def serving(self) -> Any:
        return live_settings.read(self.settings, self.database).serving

    def history(self) -> list[Any]:
        with self.database.work() as work:
            return versions.history(work, before=10**6, limit=100)

    def row(self, statement: str, **values: Any) -> Any:
        with self.database.work() as work:
            return work.row(text(statement), values)

    def host(self, name: str) -> int:
        hosts = Hosts(self.database, timedelta(minutes=5), timedelta(minutes=5))
        return hosts.join(name, name, 4, [cpu_report(f"{name}/cpu")], {})

    def pool(self, host: str, epoch: int, model: str = MODEL, idle: str = "1 hour", busy: int = 0) -> str:
        hosts = Hosts(self.database, timedelta(minutes=5), timedelta(minutes=5))
        id_ = granted(self.database, host, {f"{host}/cpu": 100}, model=model, configuration=f"{model}.x")
        assert isinstance(id_, str)
        begun(hosts, host, epoch, id_)
        with self.database.work() as work:
            insert = """
                INSERT INTO pool_report
                    (pool_id, phase, progress, detail, stalled_ms, worker, busy, heartbeat_at, serving_at, last_used_at)
                VALUES (CAST(:id AS uuid), 'serving', 1, '', 0, :worker, :busy, now(), now() - interval '2 hours',
                        now() - CAST(:idle AS interval))
            """
            work.run(text(insert), {"id": id_, "worker": f"pool.{id_[-6:]}", "busy": busy, "idle": idle})
        return id_

    def commands(self) -> list[tuple[str, str, str | None]]:
        with self.database.work() as work:
            rows = work.rows(text("SELECT command, model, pool_id::text AS pool FROM pool_command ORDER BY id"))
        return [(row.command, row.model, row.pool) for row in rows]


@pytest.fixture
def world(database: Database, runs: Runs, publisher: CeleryPublisher) -> World:
    return World(database, runs, publisher)


@pytest.fixture
def with_settings(world: World) -> Callable[[ActionSettings], World]:
    def made(settings: ActionSettings) -> World:
        world.settings = world.settings.model_copy(update={"actions": settings})
        return world

    return made
