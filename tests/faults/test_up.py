"""`arriero up`: its parent can be killed, and what it leaves behind is ended by the next one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import httpx2
import psutil
import pytest

from app.kernel.embedded.endpoint import ENDPOINT_FILE, find_endpoint
from app.kernel.processes import pid_file
from tests.faults import installation
from tests.faults.conftest import PATIENCE, assert_nothing_left, processes_of, until
from tests.faults.installation import address, is_up, members


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "data"
    assert_nothing_left(tmp_path / "data")


def up(data_dir: Path, said: Path) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """`arriero up` with a simulated device and a pool on it; it writes what it says into a file."""
    settings = {"pools.models": "alpha:1", "fleet.simulated": '[{"name": "sim-0", "bytes": "1GiB"}]'}
    return installation.up(data_dir, said, settings, installation.catalogue("alpha:1"))


def pool_of(data_dir: Path) -> psutil.Process:
    (pool,) = [process for process in processes_of(data_dir) if "pool" in process.cmdline()]
    return pool


def client_of(data_dir: Path) -> httpx2.Client:
    """A client of the API; a request waits as long as it takes."""
    return httpx2.Client(base_url=address(data_dir), trust_env=False, timeout=PATIENCE)


def assert_works(client: httpx2.Client) -> None:
    """A run with a step for a worker and one for a pool ends."""
    write = {"id": "write", "kind": "generate", "model": "alpha:1", "prompt": "x", "max_tokens": 2, "needs": ["begin"]}
    workflow = {"workflow": "w", "steps": [{"id": "begin", "kind": "noop"}, write]}

    def submitted() -> str | None:
        answer = client.post("/v1/runs", json={"definition": workflow})
        return answer.json()["id"] if answer.status_code == 202 else None

    run_id = until(submitted)
    until(lambda: client.get(f"/v1/runs/{run_id}").json().get("state") == "succeeded")


def test_next_up_takes_over_what_a_killed_one_left(data_dir: Path, tmp_path: Path) -> None:
    """
    The next `up` takes over servers and pools as they run, ends the other orphans, refuses a second beside it, and
    stops without a trace: the pools are gone too when nobody is left who would end them.
    """
    with up(data_dir, tmp_path / "first.txt") as first:
        until(lambda: is_up(first, tmp_path / "first.txt"))
        before, pool = members(data_dir), pool_of(data_dir)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert all(pid_file.birth(pid) for pid in before.values()), "nobody ended them"

    with up(data_dir, tmp_path / "second.txt") as second:
        until(lambda: is_up(second, tmp_path / "second.txt"))
        now = members(data_dir)
        kept = {"Postgres", "Valkey"}
        assert {name for name, pid in now.items() if before[name] == pid} == kept
        assert [name for name, pid in before.items() if pid_file.birth(pid) and name not in kept] == []
        assert b"pool_adopted" in (data_dir / "logs" / "agent.log").read_bytes()
        assert pool_of(data_dir) == pool, "it was not asked to end"
        for name in ("agent", "api", "beat", "control"):
            assert f"{name} of an earlier start still ran" in (tmp_path / "second.txt").read_text()
        with client_of(data_dir) as client:
            assert_works(client)

        with up(data_dir, tmp_path / "third.txt") as third:
            until(lambda: third.poll() is not None)
        assert third.returncode == 4
        assert f"is in use by process {second.pid} (arriero up)" in (tmp_path / "third.txt").read_text()

        os.kill(members(data_dir)["agent"], signal.SIGKILL)
        second.send_signal(signal.SIGINT)
        until(lambda: second.poll() is not None)
    assert second.returncode == 0
    assert processes_of(data_dir) == []
    assert "pool alpha:1 was left by its agent" in (tmp_path / "second.txt").read_text()
    assert not list(data_dir.rglob("*.pid"))


def test_api_that_dies_refuses_nobody_and_what_stands_still_is_replaced(data_dir: Path, tmp_path: Path) -> None:
    """A client of an API that was killed is answered by the next one; frozen programs and servers are killed."""
    with up(data_dir, tmp_path / "said.txt") as process:
        until(lambda: is_up(process, tmp_path / "said.txt"))
        before = members(data_dir)
        with client_of(data_dir) as client:
            os.kill(before["api"], signal.SIGKILL)
            until(lambda: pid_file.birth(before["api"]) is None)
            assert client.get("/healthz").status_code == 200
            frozen = ("agent", "control", "Valkey")
            for name in frozen:
                os.kill(before[name], signal.SIGSTOP)
            until(lambda: not any(pid_file.birth(before[name]) for name in frozen))
            assert_works(client)
        for name in frozen:
            assert f"{name} was stopped by a signal for 10 s; killing it" in (tmp_path / "said.txt").read_text()
        process.send_signal(signal.SIGINT)
        until(lambda: process.poll() is not None)


def test_everything_follows_a_server_that_moves(data_dir: Path, tmp_path: Path) -> None:
    """A stranger takes the port of a server that died while `up` stood still: all that had its old address follow."""
    with up(data_dir, tmp_path / "said.txt") as process, ExitStack() as stack:
        until(lambda: is_up(process, tmp_path / "said.txt"))
        client = stack.enter_context(client_of(data_dir))
        for name in ("Valkey", "Postgres"):
            endpoint = find_endpoint(data_dir / name.lower() / ENDPOINT_FILE)
            assert endpoint is not None
            old, pool = members(data_dir)[name], pool_of(data_dir)
            process.send_signal(signal.SIGSTOP)
            os.kill(old, signal.SIGKILL)
            until(lambda old=old: pid_file.birth(old) is None)  # type: ignore[misc] # a default
            stranger = stack.enter_context(socket.socket())
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            until(lambda stranger=stranger, port=endpoint.port: takes(stranger, port))  # type: ignore[misc] # as above
            process.send_signal(signal.SIGCONT)
            until(lambda name=name: f"{name} has moved to port" in (tmp_path / "said.txt").read_text())  # type: ignore[misc] # as above
            until(lambda pool=pool: pid_file.birth(pool.pid) is None)  # type: ignore[misc] # as above
            assert_works(client)
        process.send_signal(signal.SIGINT)
        until(lambda: process.poll() is not None)


def takes(stranger: socket.socket, port: int) -> bool:
    """Whether the port could be taken: the last of a dead server's processes has let go of it."""
    try:
        stranger.bind(("127.0.0.1", port))
        stranger.listen()
    except OSError:
        return False
    return True
