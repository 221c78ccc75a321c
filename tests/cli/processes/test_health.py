"""`arriero health PROGRAM`, the health check of containers: what is asked, and what an orchestrator is told."""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from app.cli import app
from app.fleet.hosts import Hosts
from app.governance.health import signs
from app.kernel.database import Database
from tests.fleet.granting import LEASE, cpu_report

Asked = Callable[..., tuple[int, str]]


@pytest.fixture
def asked(tmp_path: Path, database_url: str, redis_url: str) -> Asked:
    values = {"data_dir": tmp_path, "database_url": database_url, "redis_url": redis_url, "fleet.host": "here"}

    def ask(program: str, *arguments: str, **more: object) -> tuple[int, str]:
        options = [part for key, value in (values | more).items() for part in ("--set", f"{key}={value}")]
        result = CliRunner().invoke(app, [*options, "health", program, *arguments])
        return result.exit_code, result.output

    return ask


def test_an_agent_works_while_its_heartbeats_are_fresh(asked: Asked, database: Database) -> None:
    assert asked("agent")[0] == 1
    assert "has not joined the fleet" in asked("agent")[1]
    Hosts(database, timedelta(minutes=5), LEASE).join("here", "here", 8, [cpu_report("here/cpu")], {})
    assert asked("agent") == (0, "agent works\n")
    with database.work() as work:
        work.run(text("UPDATE host SET agent_until = now() - interval '1 s'"))
    assert asked("agent")[0] == 1
    assert "no heartbeat" in asked("agent")[1]


def test_a_control_worker_is_known_by_its_own_name_and_host(asked: Asked, valkey: Any) -> None:
    valkey.set(signs.key("control@elsewhere:1:abc"), "0.5")
    assert asked("control")[0] == 1
    valkey.set(signs.key(f"control@{socket.gethostname()}:1:abc"), "0.5")
    assert asked("control")[0] == 0
    assert asked("control", "--name", "other")[0] == 1
    valkey.set(signs.key(f"control@{socket.gethostname()}:1:abc"), "600")
    assert "no scheduled job for 600 s" in asked("control")[1]


def test_beat_works_while_some_beat_is_elected(asked: Asked, valkey: Any) -> None:
    assert asked("beat") == (1, "no beat is elected\n")
    valkey.set("redbeat::lock", "other", px=60_000)
    assert asked("beat")[0] == 0


def test_what_does_not_answer_is_told_and_no_traceback(asked: Asked) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    nothing = f"postgresql://user:hidden@127.0.0.1:{port}/x"
    for program, more in (
        ("api", {"api.port": port, "api.url": "http://127.0.0.1:1"}),
        ("flower", {"flower.port": port}),
        ("control", {"redis_url": f"redis://127.0.0.1:{port}/0"}),
        ("beat", {"redis_url": f"redis://127.0.0.1:{port}/0"}),
        ("agent", {"database_url": nothing}),
    ):
        code, output = asked(program, **more)
        assert code == 1, output
        assert "hidden" not in output
        assert len(output) > 10
    assert asked("no-such-program")[0] == 2
