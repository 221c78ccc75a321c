"""Alerts over the real database, and receivers of notifications on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from app.governance.actions import action as actions
from app.governance.actions.action import AlertAction
from app.governance.actions.execution import Cause
from app.governance.alerts import channel_store, dispatch
from app.governance.alerts.service import AlertService
from app.kernel.database import Database
from app.kernel.sections.governance import AlertSettings
from app.kernel.sections.http import HttpSettings
from app.kernel.security.secrets import Secrets
from app.kernel.settings import Settings
from workers.governance.delivery import deliveries


@dataclass
class Received:
    """A receiver of web hooks."""

    url: str
    #: Headers and bodies, in the order of their arrival.
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    #: The statuses of the next answers; 204 after them.
    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)

    def documents(self) -> list[Any]:
        return [json.loads(body) for _, body in self.requests]


@pytest.fixture
def receiver() -> Iterator[Received]:
    """A server of web hooks."""
    made = Received("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            made.requests.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(made.statuses.pop(0) if made.statuses else 204)
            for name, value in made.headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_port}/hook"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass
class AlertWorld:
    """A database with alerts, and a control worker that sends them."""

    database: Database
    settings: Settings
    secrets: Secrets

    def fire(self, cause: Cause, action: Any = "alert") -> None:
        (found,) = actions.parse([action])
        assert isinstance(found, AlertAction)
        with self.database.work() as work:
            AlertService(self.settings.alerts).fired(work, cause, found)

    def clear(self, cause: Cause) -> None:
        with self.database.work() as work:
            AlertService(self.settings.alerts).cleared(work, cause)

    def channel(self, name: str, namespace: str = "", **document: Any) -> None:
        with self.database.work() as work:
            channel_store.put(work, namespace, name, document)

    def work(self) -> int:
        """A pass of a control worker. Returns how many notifications it wrote."""
        written = dispatch.dispatch(self.database, self.settings.alerts)
        deliveries.deliver_due(self.database, self.settings, self.secrets, lambda: True)
        return written

    def run(self, statement: str, **values: Any) -> int:
        with self.database.work() as work:
            return work.run(text(statement), values)

    def pass_time(self, interval: str) -> None:
        """Let what is due within an interval be due now."""
        by = f"- interval '{interval}'"
        self.run(f"UPDATE alert SET due_at = due_at {by}, quiet_until = quiet_until {by}")
        self.run(f"UPDATE alert_notification SET due_at = due_at {by}, created_at = created_at {by}")
        self.run(f"UPDATE alert_silence SET ends_at = ends_at {by}, starts_at = starts_at {by}")

    def notifications(self) -> list[Any]:
        with self.database.work() as work:
            return work.rows(text("SELECT * FROM alert_notification ORDER BY namespace, created_at, channel"))

    def alerts(self) -> list[Any]:
        with self.database.work() as work:
            return work.rows(text("SELECT * FROM alert ORDER BY first_at, id"))

    def events(self) -> list[str]:
        with self.database.work() as work:
            return [row.kind for row in work.rows(text("SELECT kind FROM alert_event ORDER BY at, id"))]


@pytest.fixture
def world(database: Database, tmp_path: Path, receiver: Received) -> AlertWorld:
    port = int(receiver.url.rpartition(":")[2].partition("/")[0])
    settings = Settings(
        data_dir=tmp_path,
        alerts=AlertSettings(group_wait="0s", group_interval="0s"),  # type: ignore[arg-type] # as in a file
        http=HttpSettings(allowed_hosts=(f"127.0.0.1:{port}",), allow_private=True),
    )
    secrets = Secrets(None, {"ARRIERO_SECRET_HOOK": "whsec_" + "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0"})
    return AlertWorld(database, settings, secrets)
