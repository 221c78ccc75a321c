"""`arriero up`: its parent can be killed, and what it leaves behind is ended by the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.faults.conftest import ROOT, assert_nothing_left, processes_of, shown, until


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "data"
    assert_nothing_left(tmp_path / "data")


@contextmanager
def up(data_dir: Path, said: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`arriero up` without pools; it writes what it says into a file."""
    options = ["--data-dir", str(data_dir), "--set", "api.port=0", "--set", "pools.models="]
    command = [sys.executable, "-m", "app", *options, "up", "--no-flower"]
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


def is_up(process: subprocess.Popen[bytes], said: Path) -> bool:
    assert process.poll() is None, said.read_text()
    return "arriero is up" in said.read_text()


def test_next_up_ends_the_orphans_of_a_killed_one(data_dir: Path, tmp_path: Path) -> None:
    """The next `up` ends what a killed one left, serves, refuses a second beside it, and stops without a trace."""
    with up(data_dir, tmp_path / "first.txt") as first:
        until(lambda: is_up(first, tmp_path / "first.txt"))
        tree = processes_of(data_dir)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    orphans = [process for process in tree if process.pid != first.pid]
    assert len(orphans) > 4, "servers, API, control worker and beat"
    assert all(process.is_running() for process in orphans[:3]), "nobody ended them"

    with up(data_dir, tmp_path / "second.txt") as second:
        until(lambda: is_up(second, tmp_path / "second.txt"))
        assert not [process for process in orphans if process.is_running()]
        for name in ("api", "beat", "control"):
            assert f"{name} of an earlier start still ran" in (tmp_path / "second.txt").read_text()

        with up(data_dir, tmp_path / "third.txt") as third:
            until(lambda: third.poll() is not None)
        assert third.returncode == 4
        assert f"is in use by process {second.pid} (arriero up)" in (tmp_path / "third.txt").read_text()

        second.send_signal(signal.SIGINT)
        until(lambda: second.poll() is not None)
    assert second.returncode == 0
    assert processes_of(data_dir) == []
    assert not list(data_dir.rglob("*.pid"))
