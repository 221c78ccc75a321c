"""Hand-offs over the real database, with a control worker in this process and a CRM with a database of its own."""

from __future__ import annotations

import json
import random
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from app.api.main import serve
from app.api.services import Services
from app.catalog import files
from app.catalog.catalog import Catalog
from app.devices.inventory import Devices
from app.handoffs import advance
from app.kernel.activity import Activity
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.sections.http import HttpSettings
from app.kernel.security.secrets import Secrets
from app.kernel.settings import Settings
from app.scheduler.operator_commands import OperatorCommands
from app.scheduler.wake_up import AgentCalls
from app.workflows.runs.recovery.overdue import SweepCursor
from app.workflows.runs.recovery.sweep import sweep
from app.workflows.runs.service import Runs
from workers.leases import Leases
from workers.runtime import Runtime
from workers.steps import run_step

#: The secrets of tests, as files of `secrets_dir`.
SECRETS = {"shop_hook": "whsec_c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0", "crm": "token-of-the-crm"}


@dataclass
class Crm:
    """A CRM for tests: records in SQLite, upserted by their key; it fails as often as it is told."""

    url: str
    path: Path
    chance: random.Random = field(default_factory=lambda: random.Random(7))
    #: The part of requests that fail, half of them after they took effect.
    failing: float = 0.0
    requests: int = 0
    #: Headers of the requests.
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, isolation_level=None)

    def leads(self) -> list[dict[str, Any]]:
        with self.connect() as connection:
            return [json.loads(body) for (body,) in connection.execute("SELECT body FROM lead ORDER BY key")]

    def upsert(self, key: str, body: Any) -> int:
        with self.connect() as connection:
            connection.execute(
                "INSERT INTO lead (key, body, writes) VALUES (?, ?, 1)"
                " ON CONFLICT (key) DO UPDATE SET body = excluded.body, writes = writes + 1",
                (key, json.dumps(body)),
            )
            ((id_,),) = connection.execute("SELECT id FROM lead WHERE key = ?", (key,))
            return int(id_)


@pytest.fixture
def crm(tmp_path: Path) -> Iterator[Crm]:
    made = Crm("", tmp_path / "crm.sqlite")
    with made.connect() as connection:
        connection.execute(
            "CREATE TABLE lead (id INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL, body TEXT, writes INT)"
        )

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with made.lock:
                made.requests += 1
                made.paths.append(self.path)
                made.headers.append({name.lower(): value for name, value in self.headers.items()})
                fails, takes_effect = made.chance.random() < made.failing, made.chance.random() < 0.5
                if self.headers["authorization"] != f"Bearer {SECRETS['crm']}":
                    self.answer(401, {"error": "who are you?"})
                    return
                id_ = made.upsert(str(body["id"]), body) if not fails or takes_effect else 0
            self.answer(503 if fails else 200, {"id": id_})

        def do_GET(self) -> None:
            with made.lock, made.connect() as connection:
                rows = connection.execute(
                    "SELECT body FROM lead WHERE id = ?", (self.path.rpartition("/")[2],)
                ).fetchall()
            self.answer(200 if rows else 404, json.loads(rows[0][0]) if rows else {})

        def answer(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass
class HandoffWorld:
    """An API, and a control worker that works when it is told."""

    client: TestClient
    database: Database
    runtime: Runtime

    def put(self, document: str) -> None:
        name = document.split()[1]
        answer = self.client.put(f"/v1/handoffs/{name}", content=document, headers={"Content-Type": "application/yaml"})
        assert answer.status_code in (200, 201), answer.text

    def messages(self, name: str, **parameters: Any) -> list[dict[str, Any]]:
        answer = self.client.get(f"/v1/handoffs/{name}/messages", params={"limit": 200, **parameters})
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["messages"]
        return found

    def work(self) -> None:
        """Work until nothing is to be done, as control workers do: the job, steps, and steps whose delay is over."""
        for _ in range(100):
            advance.advance(self.runtime.runs, lambda: True)
            if not self.steps() and not self.waits():
                return
        raise AssertionError("it does not come to an end")

    def steps(self) -> int:
        """Execute the steps that are ready. Returns how many."""
        with self.database.work() as work:
            rows = work.rows(text("SELECT id, attempt FROM step WHERE state = 'ready'"))
        for row in rows:
            run_step(self.runtime, row.id, row.attempt)
        return len(rows)

    def waits(self) -> int:
        """Let the delays of retries pass. Returns how many steps waited."""
        count = self.run("UPDATE step SET not_before = now() WHERE state = 'waiting'")
        if count:
            sweep(self.runtime.runs, republish_after=timedelta(minutes=5), cursor=SweepCursor(), in_time=lambda: True)
        return count

    def run(self, statement: str, **values: Any) -> int:
        with self.database.work() as work:
            return work.run(text(statement), values)


@pytest.fixture
def secrets_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "secrets"
    folder.mkdir(mode=0o700)
    for name, value in SECRETS.items():
        (folder / name).write_text(value)
        (folder / name).chmod(0o600)
    return folder


@pytest.fixture
def world(
    database: Database, publisher: CeleryPublisher, runs: Runs, tmp_path: Path, secrets_dir: Path, crm: Crm
) -> Iterator[HandoffWorld]:
    allowed = HttpSettings(allowed_hosts=(crm.url.removeprefix("http://"),), allow_private=True)
    settings = Settings(data_dir=tmp_path, secrets_dir=secrets_dir, http=allowed)
    leases = Leases(runs, "w@here/1/x", interval=timedelta(seconds=1), stalled_for=lambda: timedelta(0))
    leases.start()
    runtime = Runtime(
        settings,
        runs,
        leases,
        None,
        Secrets(secrets_dir),
        Catalog(),
        Activity("redis://127.0.0.1:1"),
        AgentCalls("redis://127.0.0.1:1"),
    )
    services = Services(
        settings,
        database,
        publisher,
        runs,
        files.read_catalog(),
        Devices(settings.fleet),
        OperatorCommands(database, lambda: None),
    )
    client = TestClient(serve(services), base_url="http://localhost", raise_server_exceptions=False)
    yield HandoffWorld(client, database, runtime)
    leases.close()


#: Signs the body of a web hook.
Sign = Callable[..., dict[str, str]]
