"""A platform in the background, as its user meets it: up -d, status, logs, restart, down, and what is killed."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.cli.lifecycle import installation
from app.cli.processes import records
from app.kernel.processes.pid_file import birth
from tests.faults.conftest import ROOT, assert_nothing_left, processes_of, until
from tests.faults.installation import catalog_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = "alpha:1"


class Platform:
    """The command on one data directory, with a simulated model and free ports."""

    def __init__(self, directory: Path) -> None:
        self.data_dir = directory / "data"
        catalog = directory / "catalog.toml"
        catalog.write_text(catalog_of(MODEL))
        self.settings = {
            "api.port": "0",
            "flower.port": "0",
            "catalog.files": str(catalog),
            "pools.models": MODEL,
            "fleet.simulated": '[{"name": "sim-0", "bytes": "1GiB"}]',
        }

    def command(self, *arguments: str, **settings: str) -> list[str]:
        values = self.settings | {key.replace("_", ".", 1): value for key, value in settings.items()}
        options = [f"--set={key}={value}" for key, value in values.items()]
        return [sys.executable, "-m", "app", "--data-dir", str(self.data_dir), *options, *arguments]

    def run(self, *arguments: str, exits: int = 0, **settings: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(self.command(*arguments, **settings), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == exits, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done

    def status(self, *, exits: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("status", "--json", exits=exits).stdout)
        return found

    def pid_of(self, name: str) -> int:
        return next(record.pid for found, record in installation.pid_records(self.data_dir) if found == name)


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    made = Platform(tmp_path)
    yield made
    subprocess.run(made.command("down", "--timeout", "1s"), cwd=ROOT, capture_output=True)
    assert_nothing_left(made.data_dir)


def test_a_day_of_a_platform_in_the_background(platform: Platform) -> None:
    started = platform.run("up", "-d").stderr.splitlines()
    assert started[0].endswith("is starting")
    phases = [text.split()[1] for text in started if text.startswith("• ") and text.endswith(" s)")]
    assert set(phases) >= {"servers", "schema", "api", "workers", "models"}
    assert any(text.startswith("arriero is up (") for text in started)
    tried = [text.strip() for text in started[started.index("  Try in another terminal:") + 1 :]]
    assert tried[:2] == ["arriero models pull gemma3:270m", tried[1]], "its parts are here, its file is not"
    assert tried[1].startswith("arriero run support-triage")
    assert "it is up already" in platform.run("up", "-d").stderr
    platform.run("up", exits=4)

    status = platform.status()
    assert status["problems"] == []
    assert status["state"] == "running"
    assert {"up", "postgres", "valkey", "api", "agent", "control"} <= {one["name"] for one in status["processes"]}
    assert all(one["memory"] > 0 and one["uptime"] > 0 for one in status["processes"])
    assert [(one["model"], one["states"]) for one in status["models"]] == [(MODEL, {"serving": 1})]
    assert status["runs"] == {}
    assert "queue   0 runs in progress" in platform.run("status").stdout
    platform.run("runs", "list"), "the port that was chosen is found"

    assert "arriero is up" in platform.run("logs", "up").stdout
    assert json.loads(platform.run("logs", "api", "-n", "1").stdout)["timestamp"]
    assert {text.partition(" ")[0] for text in platform.run("logs").stdout.splitlines()} >= {"api", "control", "up"}

    before = platform.pid_of("control")
    assert "control runs again" in platform.run("restart", "control").stderr
    assert platform.pid_of("control") != before
    (control,) = [one for one in platform.status()["processes"] if one["name"] == "control"]
    assert control["restarts"] == 1
    assert "there are: " in platform.run("restart", "nope", exits=3).stderr
    assert "arriero pools restart" in platform.run("restart", "pool-123456", exits=4).stderr

    instance = status["holder"]["instance"]
    assert "everything runs again" in platform.run("restart").stderr
    assert platform.status()["holder"]["instance"] != instance

    secret = (platform.data_dir / "postgres" / "endpoint.json").read_text()
    password = json.loads(secret)["password"]
    shown = [platform.run(*command).stdout for command in (("status",), ("status", "--json"), ("version", "--json"))]
    assert not any(password in text for text in shown)

    stopped = platform.run("down").stderr
    assert "stopping arriero up" in stopped
    assert "control ended" in stopped
    assert processes_of(platform.data_dir) == []
    assert platform.status(exits=5)["processes"] == []
    assert "nothing runs" in platform.run("down").stderr


def test_what_a_killed_platform_has_left_is_shown_and_ended(platform: Platform) -> None:
    platform.run("up", "-d")
    holder = installation.holder_of(platform.data_dir)
    assert holder is not None
    os.kill(holder.pid, signal.SIGKILL)
    until(lambda: birth(holder.pid) is None)

    status = platform.status(exits=1)
    assert status["holder"] is None
    assert "a killed start has left: " in status["problems"][0]
    assert all(one["orphaned"] for one in status["processes"] if not one["name"].startswith("pool-"))
    assert "no `arriero up` runs" in platform.run("restart", exits=5).stderr
    assert "ending what a killed start has left" in platform.run("down").stderr
    assert processes_of(platform.data_dir) == []


def test_a_taken_port_is_the_error_of_a_start_in_the_background(platform: Platform) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for section in ("api", "flower"):
            refused = platform.run("up", "-d", exits=5, **{f"{section}_port": str(port)})
            error = next(text for text in refused.stderr.splitlines() if text.startswith("error: "))
            assert error.startswith(f"error: {section} did not start: port {port} on 127.0.0.1")
            assert f"{section}.port (ARRIERO_{section.upper()}__PORT)" in error
            assert f"process {os.getpid()} (" in error
    assert processes_of(platform.data_dir) == []


@pytest.mark.parametrize("by", ["Ctrl-C", "down"])
def test_a_start_in_the_background_can_be_stopped_before_it_is_ready(platform: Platform, by: str) -> None:
    with subprocess.Popen(platform.command("up", "-d"), cwd=ROOT, stderr=subprocess.PIPE, text=True) as starting:
        until(lambda: records.running(platform.data_dir))
        if by == "Ctrl-C":
            starting.send_signal(signal.SIGINT)
        else:
            platform.run("down")
        _, output = starting.communicate()
        assert starting.returncode == (130 if by == "Ctrl-C" else 1), output
    assert ("interrupted: stopping it again" if by == "Ctrl-C" else "it was stopped before it was ready") in output
    assert processes_of(platform.data_dir) == []


@pytest.mark.storm
def test_the_end_of_its_terminal_stops_it_in_order(platform: Platform) -> None:
    """Lines can no longer be written then, which must not disturb the stop."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, platform.command("up"))
    output = b""
    while b"arriero is up" not in output:
        output += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0
    assert processes_of(platform.data_dir) == []
    assert not (platform.data_dir / "run" / "up.json").exists()
