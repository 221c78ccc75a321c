"""An agent whose workers are killed in the middle goes on after the last item that has ended."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from sqlalchemy import text

from app.kernel.sections.http import HttpSettings
from app.workflows.runs import views
from tests.faults.conftest import MODEL, Cluster, until

FLOW = """
workflow: asking
steps:
  - id: agent
    kind: agent
    model: "{model}"
    prompt: Order 7
    tools:
      - name: order
        description: Looks up an order
        parameters:
          {{type: object, required: [number], properties: {{number: {{type: integer}}}}, additionalProperties: false}}
        http: {{url: "{url}"}}
    calls: forced
    limits: {{turns: 2}}
    max_tokens: 64
    sampling: {{temperature: 0}}
"""


class Shop:
    """A server that answers only when it is told to, and notes the keys of the calls."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.answers = threading.Event()
        self.came = threading.Semaphore(0)
        shop = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                shop.keys.append(self.headers["idempotency-key"])
                shop.came.release()
                shop.answers.wait(300)
                body = json.dumps({"state": "sent"}).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                """Quiet."""

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # the worker was killed
                    super().handle()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def shop() -> Iterator[Shop]:
    made = Shop()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.answers.set()
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def test_a_killed_worker_repeats_no_finished_call_of_an_agent(cluster: Cluster, shop: Shop) -> None:
    http = HttpSettings(allowed_hosts=(shop.address,), allow_private=True)
    cluster.settings = cluster.settings.model_copy(update={"http": http})
    control, pool, beat = cluster.control(), cluster.pool(), cluster.beat()
    assert all(node.ready() for node in (control, pool, beat))
    run_id = cluster.submit(FLOW.format(model=MODEL, url=f"http://{shop.address}/orders"))
    assert shop.came.acquire(timeout=180), "the tool is called"

    control.kill("SIGKILL")
    control.restart()
    assert shop.came.acquire(timeout=180), "the call in progress is made again"
    shop.answers.set()
    until(lambda: cluster.open_runs() == 0)

    assert cluster.state(run_id) == "succeeded", cluster.view(run_id).run.error
    items = views.items(cluster.database, run_id, "agent", limit=10)
    assert [(item.kind, item.state) for item in items] == [
        *(("turn", "succeeded"), ("call", "succeeded"), ("turn", "succeeded"))
    ]
    assert json.loads(items[1].output) == {"state": "sent"}
    assert shop.keys == [f"{run_id}/agent[1]"] * 2, "both attempts are one call to the server"
    with cluster.database.work() as work:
        rows = work.rows(
            text("""
                SELECT key, array_agg(outcome ORDER BY attempt.attempt) AS outcomes
                FROM step JOIN attempt ON step_id = step.id WHERE run_id = :id AND parent_id IS NOT NULL GROUP BY key
            """),
            {"id": run_id},
        )
    outcomes = {row.key: row.outcomes for row in rows}
    assert outcomes["agent[0]"] == ["succeeded"]
    assert outcomes["agent[1]"] == ["worker_lost", "succeeded"]
    assert outcomes["agent[2]"][-1] == "succeeded"
