"""`arriero db`: roles of Postgres for agents, and the user of agents in the broker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import text

from app.access.agents import broker_rules
from app.kernel.database import Database
from app.kernel.errors import DatabaseUnreachable, InvalidInput
from tests.cli.conftest import Arriero


def test_a_role_is_created_used_listed_and_revoked(arriero: Arriero, database: Database, tmp_path: Path) -> None:
    db = ("--set", f"database_url={database.url}", "db")
    file = tmp_path / "gpu-1.url"
    role = json.loads(arriero(*db, "create-agent-role", "gpu-1", "--url-file", file, "--json").stdout)["role"]
    assert file.stat().st_mode & 0o777 == 0o600
    agent = Database(file.read_text().strip(), pool_size=1)
    with agent.work() as work:
        assert work.row(text("SELECT agent_host() AS host")) == ("gpu-1",)
    assert role in arriero(*db, "list-agent-roles").stdout
    assert "is revoked" in arriero(*db, "revoke-agent-role", role).stdout
    assert json.loads(arriero(*db, "list-agent-roles", "--json").stdout) == {"roles": []}
    agent.close()
    with pytest.raises(DatabaseUnreachable), agent.work():
        pass
    audit = arriero(*db[:2], "audit", "--json").stdout
    assert role in audit
    assert "SCRAM" not in audit


def test_passwords_come_from_files_and_are_checked(arriero: Arriero, database: Database, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("hunter2\n")
    with pytest.raises(InvalidInput, match="16 to 200 printable"):
        arriero("--set", f"database_url={database.url}", "db", "create-agent-role", "x", "--password-file", file)
    with pytest.raises(InvalidInput, match="one of both"):
        arriero("--set", f"database_url={database.url}", "db", "create-agent-role")
    file.write_text("a-password-of-agents\n")
    line = arriero("db", "agent-user", "--password-file", file).stdout
    assert line.startswith(f"user {broker_rules.USER} reset on #")
    assert "a-password-of-agents" not in line
