"""Faults of `arriero up`: kills and freezes of itself, of its programs and of its servers."""

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
from tests.faults.conftest import PATIENCE, assert_nothing_left, is_pool, processes_of, until
from tests.faults.installation import api_url, is_up, members


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "data"
    assert_nothing_left(tmp_path / "data")


def up(data_dir: Path, output: Path) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """Run `arriero up` with a pool on a simulated device; its output is written to a file."""
    settings = {"pools.models": "alpha:1", "fleet.simulated": '[{"name": "sim-0", "bytes": "1GiB"}]'}
    return installation.up(data_dir, output, settings, installation.catalog_of("alpha:1"))


def pool_of(data_dir: Path) -> psutil.Process:
    (pool,) = [process for process in processes_of(data_dir) if is_pool(process)]
    return pool


def client_of(data_dir: Path) -> httpx2.Client:
    """A client of the API, with a long timeout."""
    return httpx2.Client(base_url=api_url(data_dir), trust_env=False, timeout=PATIENCE)


def assert_works(client: httpx2.Client) -> None:
    """Check that a run ends that needs a control worker and a pool."""
    write = {"id": "write", "kind": "generate", "model": "alpha:1", "prompt": "x", "max_tokens": 2, "needs": ["begin"]}
    workflow = {"workflow": "w", "steps": [{"id": "begin", "kind": "noop"}, write]}

    def submitted() -> str | None:
        answer = client.post("/v1/runs", json={"definition": workflow})
        return answer.json()["id"] if answer.status_code == 202 else None

    run_id = until(submitted)
    until(lambda: client.get(f"/v1/runs/{run_id}").json().get("state") == "succeeded")


@pytest.mark.storm
def test_the_next_up_adopts_servers_and_pools_of_a_killed_one(data_dir: Path, tmp_path: Path) -> None:
    """
    The next `up` adopts running servers and pools, and ends the other orphans. A second `up` on the directory is
    refused. At its stop no process is left, not even pools whose agent was killed.
    """
    with up(data_dir, tmp_path / "first.txt") as first:
        until(lambda: is_up(first, tmp_path / "first.txt"))
        before, pool = members(data_dir), pool_of(data_dir)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert all(pid_file.birth(pid) for pid in before.values()), "they survived their parent"

    with up(data_dir, tmp_path / "second.txt") as second:
        until(lambda: is_up(second, tmp_path / "second.txt"))
        now = members(data_dir)
        kept = {"Postgres", "Valkey"}
        assert {name for name, pid in now.items() if before[name] == pid} == kept
        assert [name for name, pid in before.items() if pid_file.birth(pid) and name not in kept] == []
        assert b"pool_adopted" in (data_dir / "logs" / "agent.log").read_bytes()
        assert pool_of(data_dir) == pool, "it was adopted"
        for name in ("agent", "api", "control"):
            assert f"{name} of an earlier start was still running" in (tmp_path / "second.txt").read_text()
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


def test_a_killed_api_refuses_no_client_and_frozen_programs_are_replaced(data_dir: Path, tmp_path: Path) -> None:
    """The restarted API answers clients of the killed one; frozen programs and servers are killed."""
    with up(data_dir, tmp_path / "output.txt") as process:
        until(lambda: is_up(process, tmp_path / "output.txt"))
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
            assert f"{name} was stopped by a signal for 10 s; killing it" in (tmp_path / "output.txt").read_text()
        process.send_signal(signal.SIGINT)
        until(lambda: process.poll() is not None)


@pytest.mark.storm
def test_programs_are_restarted_when_the_port_of_a_server_changes(data_dir: Path, tmp_path: Path) -> None:
    """Another process takes the port of a server that was killed while `up` was frozen; the server gets a new port."""
    with up(data_dir, tmp_path / "output.txt") as process, ExitStack() as stack:
        until(lambda: is_up(process, tmp_path / "output.txt"))
        client = stack.enter_context(client_of(data_dir))
        for name in ("Valkey", "Postgres"):
            endpoint = find_endpoint(data_dir / name.lower() / ENDPOINT_FILE)
            assert endpoint is not None
            old, pool = members(data_dir)[name], pool_of(data_dir)
            process.send_signal(signal.SIGSTOP)
            os.kill(old, signal.SIGKILL)
            until(lambda old=old: pid_file.birth(old) is None)  # type: ignore[misc] # mypy infers no type for defaults
            occupier = stack.enter_context(socket.socket())
            occupier.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            until(lambda occupier=occupier, port=endpoint.port: try_to_listen(occupier, port))  # type: ignore[misc] # as above
            process.send_signal(signal.SIGCONT)
            until(lambda name=name: f"{name} has moved to port" in (tmp_path / "output.txt").read_text())  # type: ignore[misc] # as above
            until(lambda pool=pool: pid_file.birth(pool.pid) is None)  # type: ignore[misc] # as above
            assert_works(client)
        process.send_signal(signal.SIGINT)
        until(lambda: process.poll() is not None)


def try_to_listen(occupier: socket.socket, port: int) -> bool:
    """Try to listen on the port; it is free when the last process of the killed server has ended."""
    try:
        occupier.bind(("127.0.0.1", port))
        occupier.listen()
    except OSError:
        return False
    return True
