"""The model files of a host: hostile ones do not hide others, and are reported with a reason."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

from app.catalog import catalog
from app.devices.device import HardwareKind, Inventory, MeasuredDevice
from app.fleet import views
from app.fleet.hosts import Hosts
from app.kernel import settings
from app.kernel.database import Database
from app.kernel.settings import Settings
from app.scheduler import needs
from tests.catalog.hostile_gguf import heads, model, tokens
from tests.fleet.granting import LEASE, device_reports
from workers.agent.model_files import ModelFiles

GIB = 2**30
INVENTORY = Inventory((MeasuredDevice("cpu", HardwareKind.CPU, "processor", 64 * GIB, 40 * GIB),))
ENTRY = '[[models]]\nname = "{name}:1"\nuse_cases = ["chat"]\nsource = {{ path = "{path}" }}\n'


@pytest.fixture
def host(tmp_path: Path) -> Settings:
    return settings.load(environment={"ARRIERO_DATA_DIR": str(tmp_path), "ARRIERO_FLEET__HOST": "h"}).settings


def found(host: Settings, database: Database, **paths: Path) -> tuple[ModelFiles, catalog.Catalog]:
    entries = "".join(ENTRY.format(name=name, path=path) for name, path in paths.items())
    known = catalog.parse(entries, "catalog.toml")
    return ModelFiles(host, known, database, Hosts(database, LEASE, LEASE)), known


def test_a_hostile_file_is_unusable_and_hides_no_other(host: Settings, database: Database, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    checked, known = found(
        host,
        database,
        a=model(tmp_path / "heads.gguf", heads(-1, 0)),
        b=model(tmp_path / "doubled.gguf", tokens("a", "a")),
        c=tmp_path / "pipe.gguf",
        d=tmp_path / "nowhere.gguf",
        good=model(tmp_path / "good.gguf"),
    )
    with capture_logs() as logs:
        checked.refresh(INVENTORY)
        checked.invalidate()
        checked.refresh(INVENTORY)

    assert checked.configurations == [needs.configuration_id(known.get("good:1"))]
    problems = "\n".join(checked.problems)
    assert "a:1 is not served here" in problems
    assert "head_count is -1" in problems
    assert "tokens 0 and 1 are the same" in problems
    assert "it is a pipe, not a regular file; replace the file, or correct `path`" in problems
    assert len(checked.problems) == 3, "a missing file is not a problem"
    assert [entry["model"] for entry in logs if entry["event"] == "model_unusable"] == ["a:1", "b:1", "c:1"]

    hosts = Hosts(database, LEASE, LEASE)
    agent = hosts.join("h", "h", 8, device_reports("d"), {})
    hosts.heartbeat("h", agent, [], checked.configurations, checked.problems)
    assert list(views.hosts(database)[0].problems) == checked.problems


def test_a_repaired_file_is_served(host: Settings, database: Database, tmp_path: Path) -> None:
    path = model(tmp_path / "m.gguf", tokens("a", "a"))
    checked, _ = found(host, database, a=path)
    checked.refresh(INVENTORY)
    assert checked.configurations == []
    model(path, tokens("a", "b"))
    await_check(checked)
    assert len(checked.configurations) == 1
    assert checked.problems == []


def await_check(checked: ModelFiles) -> None:
    """Run the next check that is due by time, without the layouts being declared for another reason."""
    checked._next_check = float("-inf")
    checked.refresh(INVENTORY)


@pytest.mark.parametrize("damage", ["truncated", "removed", "replaced by a folder"])
def test_a_file_that_is_damaged_and_repaired_while_the_agent_runs_is_noticed_both_times(
    host: Settings, database: Database, tmp_path: Path, damage: str
) -> None:
    path = model(tmp_path / "m.gguf")
    checked, _ = found(host, database, a=path)
    checked.refresh(INVENTORY)
    assert len(checked.configurations) == 1
    whole = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[:60])
    else:
        path.unlink()
    if damage == "replaced by a folder":
        path.mkdir()
    await_check(checked)
    assert checked.configurations == []
    assert bool(checked.problems) == (damage != "removed")
    if path.is_dir():
        path.rmdir()
    path.write_bytes(whole)
    await_check(checked)
    assert len(checked.configurations) == 1
    assert checked.problems == []


def starts(database: Database) -> list[datetime]:
    with database.work() as work:
        found = work.rows(text("SELECT created_at FROM pool_command WHERE done_at IS NOT NULL ORDER BY created_at"))
        return [row.created_at for row in found]


def test_a_new_version_of_a_file_clears_the_failures_before_it(
    host: Settings, database: Database, tmp_path: Path
) -> None:
    path = model(tmp_path / "m.gguf")
    checked, _ = found(host, database, a=path)
    checked.refresh(INVENTORY)
    (first,) = starts(database)
    assert abs(first.timestamp() - path.stat().st_ctime) < 0.001, "failures since then count"
    await_check(checked)
    assert len(starts(database)) == 1, "nothing has changed"
    path.write_bytes(path.read_bytes())
    await_check(checked)
    assert len(starts(database)) == 2


def test_a_large_catalogue_is_checked_less_often(
    host: Settings, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are looked at in every pass of the agent, so this must not cost much."""
    times = iter([1000.0, 1004.0, 1100.0, 1300.0, 1300.001])
    checked, _ = found(host, database, a=model(tmp_path / "m.gguf"))
    monkeypatch.setattr("workers.agent.model_files.time", SimpleNamespace(monotonic=lambda: next(times)))
    checked.refresh(INVENTORY)  # takes 4 s: the next is due at 1204
    checked._usable = {}
    checked.refresh(INVENTORY)
    assert checked.configurations == []
    checked.refresh(INVENTORY)
    assert len(checked.configurations) == 1


def test_a_model_whose_layout_cannot_be_stored_hides_no_other(
    host: Settings, database: Database, tmp_path: Path
) -> None:
    """One model meets a defect of the code or the database: here a constraint that refuses its row."""
    checked, known = found(host, database, a=model(tmp_path / "a.gguf"), good=model(tmp_path / "good.gguf"))
    refuses = f"ALTER TABLE layout ADD CONSTRAINT refuses CHECK (configuration NOT LIKE '{known.get('a:1').slug}.%')"
    with database.work() as work:
        work.run(text(refuses))
    try:
        checked.refresh(INVENTORY)
    finally:
        with database.work() as work:
            work.run(text("ALTER TABLE layout DROP CONSTRAINT refuses"))
    assert checked.configurations == [needs.configuration_id(known.get("good:1"))]
    assert "CheckViolation" in checked.problems[0]
