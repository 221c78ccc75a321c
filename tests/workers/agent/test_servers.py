"""Models of servers on a host: served with permission and a key, by a process without a device."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text

from app.catalog import catalog
from app.fleet.hosts import Hosts
from app.kernel import settings
from app.kernel.database import Database
from app.scheduler import needs
from tests.fleet.granting import LEASE
from tests.workers.agent.test_model_files import INVENTORY
from workers.agent.model_files import ModelFiles

ENTRY = """
[[models]]
name = "cloud:x"
use_cases = ["chat"]
[models.remote]
url = "https://api.example.com/v1"
model = "x"
api_key = "cloud_key"
allowed = {allowed}
"""


def checked(database: Database, folder: Path, allowed: str) -> ModelFiles:
    host = settings.load(environment={"ARRIERO_DATA_DIR": str(folder), "ARRIERO_FLEET__HOST": "h"}).settings
    known = catalog.parse(ENTRY.format(allowed=allowed), "catalog.toml")
    found = ModelFiles(host, known, database, Hosts(database, LEASE, LEASE))
    found.refresh(INVENTORY)
    return found


def test_a_server_needs_permission_and_its_key(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (problem,) = checked(database, tmp_path, "true").problems
    assert "cloud:x is not served here: the key of https://api.example.com/v1: there is no secret" in problem
    monkeypatch.setenv("ARRIERO_SECRET_CLOUD_KEY", "sk-secret")
    (problem,) = checked(database, tmp_path, "false").problems
    assert "its entry does not allow that" in problem
    served = checked(database, tmp_path, "true")
    assert served.problems == []
    entry = catalog.parse(ENTRY.format(allowed="true"), "catalog.toml").get("cloud:x")
    assert served.configurations == [needs.configuration_id(entry)]
    with database.work() as work:
        (row,) = work.rows(text("SELECT type, parts, ram_bytes, source FROM layout"))
    assert (row.type, row.parts, row.source) == ("cpu", [needs.SERVER_POOL_BYTES], "server")
