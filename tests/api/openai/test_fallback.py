"""Aliases, selectors and fallbacks of calls over HTTP: simulated pools, and pools of servers that fail."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import UUID

import httpx2
import pytest

from app.fleet.hosts import Hosts
from app.kernel.database import Database
from app.kernel.errors import NotFound
from app.scheduler import needs
from app.workflows.runs import views
from tests.api.openai.conftest import MODEL, StartPool, catalog
from tests.fleet.granting import cpu_report
from workers.engine.remote.engine import RemoteEngine
from workers.engine.remote.options import RemoteOptions

PATIENCE = 60.0
HELLO = [{"role": "user", "content": "Hello."}]


class Server:
    """A server whose answer to every request is `status`, or for 200 the `lines` of a stream."""

    def __init__(self) -> None:
        self.status, self.lines = 200, list[str]()
        self.requests = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                server.requests += 1
                self.send_response(server.status)
                self.end_headers()
                for line in server.lines:
                    self.wfile.write(f"data: {line}\n\n".encode())
                    self.wfile.flush()

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    def says(self, *words: str, ends: bool = True) -> None:
        self.lines = [json.dumps({"choices": [{"delta": {"content": word}}]}) for word in words]
        if ends:
            usage = {"prompt_tokens": 1_000, "completion_tokens": 100}
            self.lines += [json.dumps({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": usage}), "[DONE]"]

    def engine(self) -> RemoteEngine:
        return RemoteEngine(RemoteOptions(f"http://127.0.0.1:{self.http.server_port}/v1", "m", slots=2, retries=0))

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def post(api: str, model: str, path: str = "chat/completions", **more: Any) -> httpx2.Response:
    body = {"model": model, "messages": HELLO, "max_tokens": 8, **more}
    return httpx2.post(f"{api}/v1/{path}", json=body, timeout=PATIENCE)


def ended(database: Database, run_id: str) -> views.RunView:
    limit = time.monotonic() + PATIENCE
    while True:
        with suppress(NotFound):
            found = views.run(database, UUID(run_id))
            if found.run.finished_at is not None:
                return found
        assert time.monotonic() < limit
        threading.Event().wait(0.02)


def serves(database: Database, model: str) -> None:
    """A host that has the file of a model, as its agent reports it."""
    hosts = Hosts(database, timedelta(minutes=5), timedelta(minutes=5))
    devices = [cpu_report("here/cpu", total=8 * 2**30)]
    epoch = hosts.join("here", "id", 4, devices, {})
    hosts.declare_layouts([needs.of_server(catalog().get(model))])
    hosts.heartbeat("here", epoch, devices, [needs.configuration_id(catalog().get(model))], [])


def test_an_alias_is_answered_by_its_model(api: str, start_pool: StartPool, server: Server, database: Database) -> None:
    server.says("Hi")
    start_pool(model="server:first", engine=server.engine())
    answer = post(api, "gpt-4o-mini")
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == answer.headers["X-Arriero-Model"] == "server:first"
    assert answer.headers["X-Arriero-Reason"] == "gpt-4o-mini is an alias of server:first"
    found = ended(database, answer.headers["X-Arriero-Run"])
    assert found.run.labels["model_asked"] == "gpt-4o-mini"
    # A thousand tokens at 2 a million, a hundred at 10.
    assert found.cost == pytest.approx(0.003)


def test_a_plain_name_has_no_reason(api: str, start_pool: StartPool) -> None:
    start_pool()
    answer = post(api, MODEL)
    assert answer.headers["X-Arriero-Model"] == MODEL
    assert "X-Arriero-Reason" not in answer.headers


@pytest.mark.parametrize("streamed", [False, True])
def test_a_model_whose_server_fails_is_followed_by_the_next(
    api: str, start_pool: StartPool, server: Server, database: Database, streamed: bool
) -> None:
    server.status = 500
    start_pool(model="server:first", engine=server.engine())
    start_pool()
    answer = post(api, "server:first", stream=streamed)
    assert answer.status_code == 200, answer.text
    assert answer.headers["X-Arriero-Model"] == MODEL
    assert "server:first failed (engine_error)" in answer.headers["X-Arriero-Reason"]
    if streamed:
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        assert {chunk["model"] for chunk in chunks} == {MODEL}
    else:
        assert answer.json()["model"] == MODEL
    second = ended(database, answer.headers["X-Arriero-Run"])
    assert second.run.state == "succeeded"
    first = ended(database, second.run.labels["fallback_after"])
    assert first.run.state == "failed"
    assert first.steps[0].model == "server:first"


def test_what_a_server_says_can_be_stored_and_sent(
    api: str, start_pool: StartPool, server: Server, database: Database
) -> None:
    server.lines = [json.dumps({"error": "a\x00b \ud83e ü\r\nX-Evil: 1"})]
    start_pool(model="server:first", engine=server.engine())
    start_pool()
    answer = post(api, "server:first")
    assert (answer.status_code, answer.headers["X-Arriero-Model"]) == (200, MODEL)
    assert "X-Evil" not in answer.headers
    run = ended(database, answer.headers["X-Arriero-Run"]).run
    assert run.labels["model_reason"] == answer.headers["X-Arriero-Reason"]
    assert ended(database, run.labels["fallback_after"]).run.state == "failed"


def test_nothing_follows_once_text_was_sent(api: str, start_pool: StartPool, server: Server) -> None:
    server.says("Once", " upon", ends=False)
    start_pool(model="server:first", engine=server.engine())
    start_pool()
    answer = post(api, "server:first", stream=True)
    assert answer.headers["X-Arriero-Model"] == "server:first"
    assert "Once" in answer.text
    assert "the server's stream ended too early" in answer.text
    assert MODEL not in answer.text


def test_a_failure_that_the_chain_does_not_name_ends_the_call(api: str, start_pool: StartPool, server: Server) -> None:
    server.status = 400
    start_pool(model="server:first", engine=server.engine())
    start_pool()
    answer = post(api, "server:first")
    assert answer.status_code == 400
    assert "the server rejected the request (400)" in answer.text


def test_the_failure_of_the_last_model_tells_of_those_before(api: str, start_pool: StartPool, server: Server) -> None:
    server.status = 503
    start_pool(model="server:first", engine=server.engine())
    start_pool(engine=server.engine())
    answer = post(api, "server:first")
    assert answer.status_code == 500, answer.text
    assert "before it: server:first failed (engine_error)" in answer.text


def test_a_model_without_a_token_in_time_is_followed_by_the_next(
    api: str, start_pool: StartPool, database: Database
) -> None:
    start_pool()
    answer = post(api, "late:first")
    assert answer.headers["X-Arriero-Model"] == MODEL
    assert answer.headers["X-Arriero-Reason"] == "fallback: late:first had no token within 1 s"
    second = ended(database, answer.headers["X-Arriero-Run"])
    assert ended(database, second.run.labels["fallback_after"]).run.state == "cancelled"


def test_a_local_model_that_is_late_is_followed_by_a_server(api: str, start_pool: StartPool, server: Server) -> None:
    server.says("From", " afar")
    start_pool(model="server:last", engine=server.engine())
    answer = post(api, "local:first")
    assert answer.headers["X-Arriero-Model"] == "server:last"
    assert answer.json()["choices"][0]["message"]["content"] == "From afar"


def test_an_unavailable_model_is_not_tried(api: str, start_pool: StartPool, server: Server, database: Database) -> None:
    serves(database, MODEL)
    start_pool(model="server:first", engine=server.engine())
    start_pool()
    answer = post(api, "server:first")
    assert answer.headers["X-Arriero-Model"] == MODEL
    assert "server:first is unavailable: no host has its file" in answer.headers["X-Arriero-Reason"]
    assert server.requests == 0
    assert "fallback_after" not in ended(database, answer.headers["X-Arriero-Run"]).run.labels


def test_a_selector_chooses_among_what_can_be_served(api: str, start_pool: StartPool, database: Database) -> None:
    answer = post(api, "auto:chat")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert f"{MODEL}: unavailable: no host is up" in answer.text
    serves(database, MODEL)
    start_pool()
    limit = time.monotonic() + PATIENCE
    while (answer := post(api, "auto:chat?prefer=speed")).status_code == 503:
        assert time.monotonic() < limit  # what was read of the fleet holds for a second
    assert answer.headers["X-Arriero-Model"] == answer.json()["model"] == MODEL
    assert answer.headers["X-Arriero-Reason"].startswith("auto:chat?prefer=speed: score 0.")
    assert ended(database, answer.headers["X-Arriero-Run"]).run.labels["model_asked"] == "auto:chat?prefer=speed"
    vectors = post(api, "auto:embed", "embeddings", input="a")
    assert vectors.json()["model"] == MODEL, vectors.text


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        ("auto:paint", 400, "no model has the use case 'paint'"),
        ("auto:chat?x=1", 400, "there is no condition 'x'"),
        ("auto:chat?context=9999k", 400, "tokens, 10238976 are needed"),
        ("gpt-99", 404, "no model 'gpt-99'"),
    ],
)
def test_what_no_model_can_mean_is_refused(api: str, asked: str, status: int, said: str) -> None:
    for answer in (post(api, asked), httpx2.get(f"{api}/v1/catalog/select", params={"model": asked})):
        assert answer.status_code == status, answer.text
        assert said in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "model"


def test_the_selection_shows_the_figures(api: str, database: Database) -> None:
    serves(database, MODEL)
    found = httpx2.get(f"{api}/v1/catalog/select", params={"model": "auto:chat"}).json()
    assert [one["model"] for one in found["ranking"]] == [MODEL]
    assert found["ranking"][0]["state"] == "cold"
    assert found["tried"] == [MODEL]
    assert found["excluded"]["server:first"] == "a server serves it, and the selector does not say remote=yes"
    chain = httpx2.get(f"{api}/v1/catalog/select", params={"model": "late:first"}).json()
    assert chain["tried"] == [MODEL]
    assert "late:first is unavailable" in chain["passed_over"]["late:first"]


def test_the_lists_of_models_are_truthful_about_servers(api: str) -> None:
    found = {one["id"]: one for one in httpx2.get(f"{api}/v1/models").json()["data"]}
    assert (found["server:first"]["state"], found["server:first"]["remote"]) == ("cold", True)
    assert found["server:first"]["aliases"] == ["gpt-4o-mini"]
    assert httpx2.get(f"{api}/v1/models/gpt-4o-mini").json()["id"] == "server:first"
    entry = httpx2.get(f"{api}/v1/catalog/server:first").json()
    assert entry["remote"]["url"] == "http://127.0.0.1:1/v1"
    assert entry["fallback"] == [MODEL]
