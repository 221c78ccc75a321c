"""Servers that are frozen: they accept connections and answer nothing. The API says so in time, and serves the rest."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

from app.kernel.processes.process import Child
from app.kernel.settings import ApiSettings, environment_of
from tests.faults.conftest import ROOT, Stage, lattice, until
from tests.frozen import frozen

#: Seconds after which nothing here is answered any more that was to be answered within five.
LATE = 20.0
#: The same for what is to be answered at once.
SLOW = 4.0


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: Any
    #: Seconds that it took.
    took: float


@dataclass(frozen=True)
class Api:
    """An API process."""

    port: int

    def ask(self, method: str, path: str, body: Any = None, accept: str = "application/json") -> Answer:
        connection, begun = self.connection(), time.monotonic()
        headers = {"Content-Type": "application/json", "Accept": accept}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        read = answer.read()
        connection.close()
        return Answer(answer.status, dict(answer.getheaders()), json.loads(read), time.monotonic() - begun)

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def submit(self) -> Answer:
        return self.ask("POST", "/v1/runs", {"definition": lattice(1)})

    def serves(self) -> bool:
        try:
            return self.ask("GET", "/readyz").status == 200
        except OSError:
            return False


@pytest.fixture
def api(stage: Stage) -> Iterator[Api]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    settings = stage.settings.model_copy(update={"api": ApiSettings(port=port)})
    child = Child(
        "api",
        [sys.executable, "-m", "app", "api"],
        environment=environment_of(settings),
        log_file=stage.directory / "api.log",
        pid_file=stage.directory / "api.pid",
        directory=ROOT,
    )
    child.start()
    made = Api(port)
    try:
        until(lambda: made.serves() or not child.alive)
        assert child.alive
        yield made
    finally:
        child.stop(timedelta(seconds=10))


def test_a_frozen_database_is_told_in_time_and_health_answers_meanwhile(stage: Stage, api: Api) -> None:
    """Sixty submissions at once, and as many event streams as nobody has threads for, are no reason to wait."""
    run_id = api.submit().body["id"]
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(contextlib.closing(api.connection())) for _ in range(30)]
        for connection in connections:
            connection.request("GET", f"/v1/runs/{run_id}/events", headers={"Accept": "text/event-stream"})
        streams = [connection.getresponse() for connection in connections]
        assert all(stream.readline().startswith(b"id: ") for stream in streams)

        with ThreadPoolExecutor(60) as clients:
            with frozen(stage._postgres.pid):
                submissions = [clients.submit(api.submit) for _ in range(60)]
                for _ in range(5):
                    for path in ("/healthz", "/v1/schemas/workflow", "/openapi.json"):
                        answer = api.ask("GET", path)
                        assert (answer.status, answer.took < SLOW) == (200, True), (path, answer.took)
                answers = [one.result() for one in submissions]
                ready, next_one = api.ask("GET", "/readyz"), api.submit()

            assert {answer.status for answer in answers} == {503}
            assert max(answer.took for answer in answers) < LATE, "the answer timeout is 5 s"
            assert {answer.headers["retry-after"] for answer in answers} == {"5"}
            assert {answer.body["type"] for answer in answers} == {"urn:arriero:error:database-unreachable"}
            assert (ready.status, next_one.status) == (503, 503)
            assert max(ready.took, next_one.took) < LATE

            until(api.serves)
            assert {one.result().status for one in [clients.submit(api.submit) for _ in range(60)]} == {202}
        assert api.ask("POST", f"/v1/runs/{run_id}/cancel").status == 202
        assert all(b"event: cancelled" in stream.read() for stream in streams), "each goes on to its end"


def test_a_frozen_broker_delays_no_answer_and_loses_no_step(stage: Stage, api: Api) -> None:
    """What was not sent is found by the sweep, once the broker answers."""
    assert api.submit().status == 202

    with frozen(stage._valkey.pid):
        first, *others = [api.submit() for _ in range(5)]
        ready = api.ask("GET", "/readyz")

    assert [first.status, *(one.status for one in others)] == [202] * 5
    assert first.took < 2 + SLOW, "one caller finds it out, which takes 2 s"
    assert sum(one.took for one in others) < 2 + 2 * SLOW, "the next ones do not, but for one each 2 s"
    assert (ready.status, ready.body["broker"] != "ok") == (503, True)
    control, beat = stage.control(), stage.beat()
    assert control.ready()
    assert beat.ready()
    until(lambda: stage.open_runs() == 0)


def test_two_hundred_submissions_at_once_are_all_taken(stage: Stage, api: Api) -> None:
    """How long they take is measured in benchmarks/submissions.py."""
    with ThreadPoolExecutor(200) as clients:
        answers = [one.result() for one in [clients.submit(api.submit) for _ in range(200)]]

    assert {answer.status for answer in answers} == {202}
    assert stage.open_runs() == 200
