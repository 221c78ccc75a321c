"""`arriero up`: its parent can be killed, and what it leaves behind is ended by the next one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.faults.conftest import ROOT, assert_nothing_left, processes_of, shown, until

CATALOG = """
[[models]]
name = "alpha:1"
use_cases = ["chat"]
source = { path = "/nowhere/alpha.gguf" }
simulated = { bytes = "600MiB", load = "100ms" }
"""


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "data"
    assert_nothing_left(tmp_path / "data")


@contextmanager
def up(data_dir: Path, said: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`arriero up` with a simulated device and a pool on it; it writes what it says into a file."""
    catalog = said.with_name("catalog.toml")
    catalog.write_text(CATALOG)
    chosen = {
        "api.port": "0",
        "pools.models": "alpha:1",
        "catalog.files": str(catalog),
        "fleet.simulated": '[{"name": "sim-0", "bytes": "1GiB"}]',
    }
    options = [f"--set={key}={value}" for key, value in chosen.items()]
    command = [sys.executable, "-m", "app", "--data-dir", str(data_dir), *options, "up", "--no-flower"]
    with said.open("wb") as output, ExitStack() as stack:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=ROOT, start_new_session=True
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        try:
            yield process
        finally:
            shown(said.name, said.read_text())


def agent_of(data_dir: Path) -> int:
    """The agent's process."""
    pid: int = json.loads((data_dir / "run" / "agent.pid").read_text())["pid"]
    return pid


def is_up(process: subprocess.Popen[bytes], said: Path) -> bool:
    assert process.poll() is None, said.read_text()
    return "arriero is up" in said.read_text()


def test_next_up_ends_the_orphans_of_a_killed_one(data_dir: Path, tmp_path: Path) -> None:
    """
    The next `up` ends what a killed one left, takes its pools over, refuses a second beside it, and stops without a
    trace: the pools are gone too when nobody is left who would end them.
    """
    with up(data_dir, tmp_path / "first.txt") as first:
        until(lambda: is_up(first, tmp_path / "first.txt"))
        tree = processes_of(data_dir)
        (pool,) = [process for process in tree if "pool" in process.cmdline()]
        os.kill(agent_of(data_dir), signal.SIGKILL)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    orphans = [process for process in tree if process.pid != first.pid and process != pool]
    assert len(orphans) > 4, "servers, API, control worker and beat"
    assert all(process.is_running() for process in orphans[:3]), "nobody ended them"

    with up(data_dir, tmp_path / "second.txt") as second:
        until(lambda: is_up(second, tmp_path / "second.txt"))
        assert not [process for process in orphans if process.is_running()]
        assert b"pool_adopted" in (data_dir / "logs" / "agent.log").read_bytes()
        assert [process for process in processes_of(data_dir) if "pool" in process.cmdline()] == [pool]
        for name in ("api", "beat", "control"):
            assert f"{name} of an earlier start still ran" in (tmp_path / "second.txt").read_text()

        with up(data_dir, tmp_path / "third.txt") as third:
            until(lambda: third.poll() is not None)
        assert third.returncode == 4
        assert f"is in use by process {second.pid} (arriero up)" in (tmp_path / "third.txt").read_text()

        os.kill(agent_of(data_dir), signal.SIGKILL)
        second.send_signal(signal.SIGINT)
        until(lambda: second.poll() is not None)
    assert second.returncode == 0
    assert processes_of(data_dir) == []
    assert "pool alpha:1 was left by its agent" in (tmp_path / "second.txt").read_text()
    assert not list(data_dir.rglob("*.pid"))
