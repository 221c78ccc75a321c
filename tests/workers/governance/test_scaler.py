"""The job of the scaler on a real database, with a receiver that checks signatures: from a first host to none."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from sqlalchemy import text

from app.access.audit import log as audit_log
from app.access.audit.log import AuditFilter
from app.catalog.catalog import Catalog
from app.fleet import views
from app.fleet.hosts import Hosts
from app.kernel import clock
from app.kernel.activity import Activity
from app.kernel.database import Database
from app.kernel.security import webhook_signatures
from app.kernel.security.secrets import Secrets
from app.kernel.settings import Settings
from app.scheduler.wake_up import AgentCalls
from app.workflows.runs.service import Runs
from tests.fleet.granting import cpu_report
from workers.governance.scaler import run_scaler
from workers.leases import Leases
from workers.runtime import Runtime

SECRET = "whsec_" + "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0"


class Receiver:
    """Answers with the statuses in turn, and keeps what was signed rightly."""

    def __init__(self, *statuses: int) -> None:
        self.requests: list[dict[str, Any]] = []
        answers, outer = iter(statuses), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                id_, at, signed = (self.headers[f"webhook-{one}"] for one in ("id", "timestamp", "signature"))
                webhook_signatures.verify(SECRET, id_, at, signed, body, clock.now(), timedelta(minutes=5))
                outer.requests.append(json.loads(body))
                self.send_response(next(answers))
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver(503, 204, 204)
    yield made
    made.server.shutdown()
    made.server.server_close()


def settings(receiver: Receiver, least: int) -> Settings:
    scaled = {"name": "cpus", "type": "cpu", "bytes": 2**40, "match": "cloud-*", "min": least, "max": 3}
    scaler = {"mode": "on", "url": f"http://{receiver.address}/hosts", "secret": "cloud", "down_cooldown": "0s"}
    http = {"allowed_hosts": [receiver.address], "allow_private": True}
    return Settings.model_validate({"scaler": scaler | {"classes": [scaled]}, "http": http})


def test_hosts_are_asked_for_and_given_up(runs: Runs, database: Database, receiver: Receiver) -> None:
    """A refused request is sent again with its id; an accepted one is not; an idle host is drained and given up."""
    leases = Leases(runs, "w@here/1/x", interval=timedelta(seconds=1), stalled_for=lambda: timedelta(0))
    runtime = Runtime(
        settings(receiver, 1), runs, leases, None, Secrets(None, {"ARRIERO_SECRET_CLOUD": SECRET}), Catalog(),
        Activity("redis://127.0.0.1:1"), AgentCalls("redis://127.0.0.1:1"),
    )  # fmt: skip
    assert run_scaler(runtime) is None, "the receiver answered 503"
    assert run_scaler(runtime) is None, "it is not sent again at once"
    with database.work() as work:
        work.run(text("UPDATE scaler_class SET sending_until = now() - interval '1 s'"), {})
    assert run_scaler(runtime) == {"asked": ["cpus"]}
    assert run_scaler(runtime) is None
    assert [(one["id"], one["hosts"]) for one in receiver.requests] == [("cpus-1", 1), ("cpus-1", 1)]

    hosts = Hosts(database, agent_lease=timedelta(hours=1), pool_lease=timedelta(minutes=1))
    hosts.join("cloud-1", "cloud-1", 2, [cpu_report("cloud-1", total=2**40)], {})
    runtime.settings = settings(receiver, 0)
    states = []
    for _ in range(4):
        run_scaler(runtime)
        states.append(views.host(database, "cloud-1").state)
    assert states[-1] == "draining"
    assert [(one["id"], one["hosts"], one["release"]) for one in receiver.requests[2:]] == [("cpus-2", 0, ["cloud-1"])]
    with database.work() as work:
        entries = audit_log.page(work, AuditFilter(), before=None, limit=10)
    assert [(one.action, one.status) for one in entries] == [("scaler.ask", code) for code in (0, 0, 1)]
    database.close()
