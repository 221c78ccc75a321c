"""`arriero backup` and `arriero restore` as programs: errors, output, and an embedded database that does not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from app import cli
from app.kernel.database import Database
from app.kernel.errors import Conflict, InvalidInput, InvalidSettings, NotFound


def run(*arguments: Any) -> str:
    """The output of a command; its errors are raised, as in the console script."""
    result = CliRunner().invoke(cli.app, [str(one) for one in arguments], standalone_mode=True, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_backup_is_made_verified_and_restored(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an external database into an embedded one, which is started for it and stopped again."""
    monkeypatch.setenv("ARRIERO_DATABASE_URL", database.url)
    monkeypatch.setenv("ARRIERO_API__KEY", "arr_" + "s" * 40)
    with psycopg.connect(database.conninfo()) as connection:
        connection.execute("INSERT INTO payload (sha256, bytes, body) VALUES (repeat('b', 64), 2, '{}')")
    home, backup = tmp_path / "home", tmp_path / "b.tar"

    made = json.loads(run("--data-dir", home, "--set", "runs.lease=17s", "backup", backup, "--json"))
    assert made["rows"] == 1
    assert database.url not in (text := backup.read_bytes().decode("latin-1"))
    assert "ssssssss" not in text
    assert '"runs.lease": "17s"' in text
    entries = "SELECT action FROM audit_entry"
    with psycopg.connect(database.conninfo()) as connection:
        assert connection.execute(entries).fetchall() == [("arriero backup",)]
    assert json.loads(run("backup", "verify", backup, "--digest", made["digest"], "--json"))["rows"] == 1
    with pytest.raises(Conflict):
        run("backup", backup)
    with pytest.raises(InvalidInput):
        run("backup", "verify", backup, "--digest", "0" * 64)
    with pytest.raises(NotFound):
        run("restore", tmp_path / "other")

    monkeypatch.delenv("ARRIERO_DATABASE_URL")
    with pytest.raises(InvalidSettings, match="has no embedded one"):
        run("--data-dir", home, "backup", tmp_path / "c")
    done = json.loads(run("--data-dir", home, "restore", backup, "--json"))
    assert done["settings_that_differ"] == {"runs.lease": "17s"}
    assert done["open_runs"] == {}
    with pytest.raises(Conflict, match="not empty"):
        run("--data-dir", home, "restore", backup)
    again = json.loads(run("--data-dir", home, "backup", tmp_path / "c", "--json"))
    assert again["rows"] == 2, "the payload, and the audit entry of the restore"
