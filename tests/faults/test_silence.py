"""Frozen servers, which accept connections and do not answer: the API reports that in time, and serves the rest."""

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
from app.kernel.sections.servers import ApiSettings
from app.kernel.settings import environment_of
from tests.faults.conftest import ROOT, Cluster, lattice, until
from tests.frozen import frozen

#: Most seconds for answers that have a timeout of 5 s, on a loaded machine.
LATE = 20.0
#: Most seconds for immediate answers, on a loaded machine.
SLOW = 4.0


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: Any
    #: Seconds.
    took: float


@dataclass(frozen=True)
class Api:
    """An API process."""

    port: int

    def request(self, method: str, path: str, body: Any = None, accept: str = "application/json") -> Answer:
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
        return self.request("POST", "/v1/runs", {"definition": lattice(1)})

    def serves(self) -> bool:
        try:
            return self.request("GET", "/readyz").status == 200
        except OSError:
            return False


@pytest.fixture
def api(cluster: Cluster) -> Iterator[Api]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    settings = cluster.settings.model_copy(update={"api": ApiSettings(port=port)})
    child = Child(
        "api",
        [sys.executable, "-m", "app", "api"],
        environment=environment_of(settings),
        log_file=cluster.directory / "api.log",
        pid_file=cluster.directory / "api.pid",
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


def test_a_frozen_database_is_reported_in_time_and_other_endpoints_answer(cluster: Cluster, api: Api) -> None:
    """Also during 60 submissions, and with more event streams than the API has threads."""
    run_id = api.submit().body["id"]
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(contextlib.closing(api.connection())) for _ in range(30)]
        for connection in connections:
            connection.request("GET", f"/v1/runs/{run_id}/events", headers={"Accept": "text/event-stream"})
        streams = [connection.getresponse() for connection in connections]
        assert all(stream.readline().startswith(b"id: ") for stream in streams)

        with ThreadPoolExecutor(60) as clients:
            with frozen(cluster._postgres.pid):
                submissions = [clients.submit(api.submit) for _ in range(60)]
                for _ in range(5):
                    for path in ("/healthz", "/v1/schemas/workflow", "/openapi.json"):
                        answer = api.request("GET", path)
                        assert (answer.status, answer.took < SLOW) == (200, True), (path, answer.took)
                answers = [one.result() for one in submissions]
                ready, next_one = api.request("GET", "/readyz"), api.submit()

            assert {answer.status for answer in answers} == {503}
            assert max(answer.took for answer in answers) < LATE, "the answer timeout is 5 s"
            assert {answer.headers["retry-after"] for answer in answers} == {"5"}
            assert {answer.body["type"] for answer in answers} == {"urn:arriero:error:database-unreachable"}
            assert (ready.status, next_one.status) == (503, 503)
            assert max(ready.took, next_one.took) < LATE

            until(api.serves)
            assert {one.result().status for one in [clients.submit(api.submit) for _ in range(60)]} == {202}
        assert api.request("POST", f"/v1/runs/{run_id}/cancel").status == 202
        assert all(b"event: cancelled" in stream.read() for stream in streams), "each stream continues to its end"


def test_a_frozen_broker_delays_no_answer_and_loses_no_step(cluster: Cluster, api: Api) -> None:
    """The sweep publishes the missing messages when the broker answers again."""
    assert api.submit().status == 202

    with frozen(cluster._valkey.pid):
        first, *others = [api.submit() for _ in range(5)]
        ready = api.request("GET", "/readyz")

    assert [first.status, *(one.status for one in others)] == [202] * 5
    assert first.took < 2 + SLOW, "one caller notices it, after 2 s"
    assert sum(one.took for one in others) < 2 + 2 * SLOW, "of the next callers one every 2 s waits again"
    assert (ready.status, ready.body["broker"] != "ok") == (503, True)
    control, beat = cluster.control(), cluster.beat()
    assert control.ready()
    assert beat.ready()
    until(lambda: cluster.open_runs() == 0)


def test_two_hundred_concurrent_submissions_are_accepted(cluster: Cluster, api: Api) -> None:
    """`benchmarks/submissions.py` measures their duration."""
    with ThreadPoolExecutor(200) as clients:
        answers = [one.result() for one in [clients.submit(api.submit) for _ in range(200)]]

    assert {answer.status for answer in answers} == {202}
    assert cluster.open_runs() == 200
