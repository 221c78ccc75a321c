"""`arriero config`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli.config import app
from app.kernel import settings


def test_secrets_are_listed_by_name_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crm-token").write_text("swordfish")
    monkeypatch.setenv("ARRIERO_SECRET_HOOK", "swordfish")
    loaded = settings.load(environment={"ARRIERO_SECRETS_DIR": str(tmp_path)})
    result = CliRunner().invoke(app, ["show", "secrets", "--json"], obj=loaded)
    table = CliRunner().invoke(app, ["show"], obj=loaded, env={"COLUMNS": "200"}).stdout

    assert {row["key"]: (row["value"], row["origin"]) for row in json.loads(result.stdout)} == {
        "secrets.crm_token": ("***", str(tmp_path / "crm-token")),
        "secrets.hook": ("***", "ARRIERO_SECRET_HOOK"),
    }
    assert "secrets.hook" in table
    assert "swordfish" not in result.stdout + table
