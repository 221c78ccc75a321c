"""`arriero version`: what a bug report needs, and nothing secret."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app import __version__
from app.cli import app


def test_it_names_what_a_bug_report_needs_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARRIERO_DATABASE_URL", "postgresql://me:hidden-1@db.internal/x")
    monkeypatch.setenv("ARRIERO_CATALOG__HUB_TOKEN", "hidden-2")
    options = ["--data-dir", str(tmp_path)]
    result = CliRunner().invoke(app, [*options, "version", "--json"], catch_exceptions=False)
    found = json.loads(result.stdout)

    assert found["arriero"] == __version__
    assert found["python"].startswith("CPython 3.")
    assert found["llama.cpp"]["build"].startswith(metadata.version("llama-cpp-python"))
    assert found["llama.cpp"]["features"], "read from the library itself"
    assert "PostgreSQL" in found["postgres"]
    assert "Valkey" in found["valkey"]
    assert found["packages"]["celery"] == metadata.version("celery")
    assert found["devices"][0]["name"] == "cpu"
    people = CliRunner().invoke(app, [*options, "version"], catch_exceptions=False).stdout
    assert people.startswith(f"arriero {__version__}\n")
    for text in (result.stdout, people):
        assert "hidden" not in text
        assert "db.internal" not in text
        assert str(tmp_path) not in text


def test_the_usual_option_says_it_too_and_needs_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARRIERO_API__PORT", "none")
    result = CliRunner().invoke(app, ["--version"], catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (0, f"arriero {__version__}\n")
