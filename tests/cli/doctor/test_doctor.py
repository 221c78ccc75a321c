"""`arriero doctor` on real servers, and on none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from app.cli import app
from app.cli.doctor import doctor
from app.fleet.hosts import Hosts
from app.governance.health import signs
from app.governance.jobs import store
from app.governance.jobs.job import JobPass, PassOutcome
from app.governance.jobs.store import PassTotals
from app.kernel.database import Database
from tests.fleet.granting import LEASE, cpu_report


def examined(*options: str, exits: int) -> dict[str, list[dict[str, Any]]]:
    """The findings by check."""
    result = CliRunner().invoke(app, [*options, "doctor", "--json"])
    assert result.exit_code == exits, result.output
    found: dict[str, list[dict[str, Any]]] = {}
    for one in json.loads(result.stdout)["findings"]:
        assert one["remedy"] if one["severity"] in ("problem", "warning") else one["detail"]
        found.setdefault(one["check"], []).append(one)
    return found


def bad(found: dict[str, list[dict[str, Any]]]) -> list[tuple[str, str]]:
    return [(one["check"], one["detail"]) for of in found.values() for one in of if one["severity"] == "problem"]


@pytest.fixture
def options(tmp_path: Path, database_url: str, redis_url: str) -> list[str]:
    values = {"data_dir": tmp_path, "database_url": database_url, "redis_url": redis_url, "pools.models": "[]"}
    values["api.port"] = "0"
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def test_it_names_each_part_that_is_wrong_and_what_to_do(
    database: Database, valkey: Any, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_servers = {name: check for name, check in doctor.CHECKS.items() if name in ("database", "broker", "components")}
    monkeypatch.setattr(doctor, "CHECKS", of_servers)  # a machine may have problems of its own
    Hosts(database, LEASE, LEASE).join("here", "here", 8, [cpu_report("here/cpu")], {})
    valkey.set("redbeat::lock", "beat", px=60_000)
    valkey.set(signs.key("control@here"), "0.5")
    assert bad(examined(*options, exits=0)) == []

    valkey.delete("redbeat::lock")
    one = JobPass("sweep", 0.0, 0.1, PassOutcome.FAILED, {"error": "by zero"})
    with database.work() as work:
        store.record(work, [PassTotals(one, 1, 1, 0.1, None, 0.0)], {}, "worker")
        store.pause(work, "expire", "we look at old runs")
    found = examined(*options, exits=1)
    assert [check for check, _ in bad(found)] == ["components", "jobs"]
    assert "by zero" in bad(found)[1][1]
    assert next(one["remedy"] for one in found["jobs"]) == "arriero jobs resume expire"


def test_it_tells_of_notifications_that_are_not_delivered_and_names_hosts_that_are_gone(
    database: Database, valkey: Any, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", {"components": doctor.CHECKS["components"]})
    for name in ("here", "there"):
        Hosts(database, LEASE, LEASE).join(name, name, 8, [cpu_report(f"{name}/cpu")], {})
    valkey.set("redbeat::lock", "beat", px=60_000)
    valkey.set(signs.key("control@here"), "0.5")
    with database.work() as work:
        work.run(text("UPDATE host SET agent_until = now() - interval '1 minute' WHERE name = 'there'"))
        work.run(
            text("""
                INSERT INTO alert_notification
                    (id, namespace, channel, kind, group_key, document, state, attempts, error)
                VALUES (gen_random_uuid(), '', 'ops', 'firing', '{}', '{}', 'pending', 2, 'it is not listed')
            """)
        )
    found = examined(*options, exits=1)
    assert [one["detail"] for one in found["components"] if one["severity"] == "warning"] == [
        "agents: 1 of 2 agents are not alive: there"
    ]
    assert "the channel ops has 1 notifications" in found["alerts"][0]["detail"]


def test_it_works_while_everything_is_down(tmp_path: Path) -> None:
    """Each outage is one finding; the other checks go on."""
    nowhere = {"database_url": "postgresql://a@127.0.0.1:1/a", "redis_url": "redis://127.0.0.1:1"}
    options = [part for key, value in nowhere.items() for part in ("--set", f"{key}={value}")]
    found = examined(*options, "--set", f"data_dir={tmp_path}", "--set", "api.port=0", exits=1)
    assert {check for check, _ in bad(found)} >= {"database", "broker"}
    assert "is unreachable" in found["broker"][0]["detail"]
    assert found["disk"][0]["severity"] in ("ok", "warning")


def test_a_check_that_breaks_hides_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(_: Any) -> Any:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(doctor, "CHECKS", {"disk": broken, "ports": lambda _: iter(())})
    found = examined("--set", f"data_dir={tmp_path}", exits=1)
    assert "the check itself failed: ZeroDivisionError" in found["disk"][0]["detail"]
