"""A backup while a run is in flight, restored elsewhere: the run goes on, and no completed step is done again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import text

from tests.faults import installation
from tests.faults.conftest import PATIENCE, ROOT, assert_nothing_left, until
from tests.faults.installation import api_url, is_up

pytestmark = pytest.mark.storm

SETTINGS = {
    "pools.models": "alpha:1",
    "fleet.simulated": '[{"name": "sim-0", "bytes": "1GiB"}]',
    "runs.lease": "4s",
    "runs.heartbeat": "1s",
    "http.allow_private": "true",
}


class Effects(ThreadingHTTPServer):
    """Counts what is done outside."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        assert isinstance(self.server, Effects)
        self.server.calls[self.path] += 1
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 the name is the base class's
        """Print nothing."""


@pytest.fixture
def effects() -> Iterator[Effects]:
    server = Effects()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def command(data_dir: Path, *arguments: str) -> dict[str, Any]:
    """The JSON that a command prints."""
    options = [sys.executable, "-m", "app", "--data-dir", str(data_dir), *arguments, "--json"]
    done = subprocess.run(options, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def client_of(data_dir: Path) -> httpx2.Client:
    return httpx2.Client(base_url=api_url(data_dir), trust_env=False, timeout=PATIENCE)


def steps(client: httpx2.Client, run_id: str) -> dict[str, dict[str, Any]]:
    return {step["key"]: step for step in client.get(f"/v1/runs/{run_id}").json()["steps"]}


def test_a_run_in_flight_goes_on_after_a_restore(tmp_path: Path, effects: Effects) -> None:
    call = {"kind": "http", "method": "POST", "body": "x"}
    workflow = {
        "workflow": "w",
        "steps": [
            {"id": "before", **call, "url": f"{effects.url}/before"},
            {"id": "write", "kind": "generate", "model": "alpha:1", "prompt": "x", "max_tokens": 300,
             "needs": ["before"]},
            {"id": "after", **call, "url": f"{effects.url}/after", "needs": ["write"]},
        ],
    }  # fmt: skip
    catalog = installation.catalog_of("alpha:1")
    settings = {**SETTINGS, "http.allowed_hosts": f"127.0.0.1:{effects.server_port}"}
    old, new, backup = tmp_path / "old", tmp_path / "new", tmp_path / "backup.tar"

    with installation.up(old, tmp_path / "old.txt", settings, catalog) as process:
        until(lambda: is_up(process, tmp_path / "old.txt"))
        with client_of(old) as client:
            accepted = client.post("/v1/runs", json={"definition": workflow})
            assert accepted.status_code == 202, accepted.text
            run_id = accepted.json()["id"]
            until(lambda: steps(client, run_id)["write"]["state"] == "running")
            made = command(old, "backup", str(backup))
            assert steps(client, run_id)["write"]["state"] == "running", "the backup was faster than the step"
        for _ in range(2):
            process.send_signal(signal.SIGINT)
        until(lambda: process.poll() is not None)
    assert made["runs"] == {"running": 1}
    assert effects.calls["/before"] == 1
    effects.calls.clear()
    assert_nothing_left(old)

    done = command(new, "restore", str(backup))
    assert done["open_runs"] == {"running": 1}
    with installation.up(new, tmp_path / "new.txt", settings, catalog) as process:
        until(lambda: is_up(process, tmp_path / "new.txt"))
        with client_of(new) as client:
            until(lambda: client.get(f"/v1/runs/{run_id}").json()["state"] == "succeeded")
            assert effects.calls == {"/after": 1}
            found = steps(client, run_id)
        database = installation.database_of(new)
        with database.work() as work:
            query = text("SELECT key, count(*) AS attempts FROM attempt JOIN step ON step.id = step_id GROUP BY key")
            attempts = {row.key: row.attempts for row in work.rows(query)}
        database.close()
        process.send_signal(signal.SIGINT)
        until(lambda: process.poll() is not None)
    assert {key: step["state"] for key, step in found.items()} == dict.fromkeys(found, "succeeded")
    assert attempts == {"before": 1, "write": 2, "after": 1}, "the attempt that was in flight is lost, and no other"
    assert_nothing_left(new)
