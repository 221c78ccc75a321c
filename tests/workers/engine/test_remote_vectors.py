"""Vectors of the remote engine, from a real HTTP server on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from app.inference.requests import EmbedRequest
from app.kernel.errors import FailureReason, StepFailure
from workers.engine import Engine
from workers.engine.remote.engine import RemoteEngine
from workers.engine.remote.options import RemoteOptions


class Server:
    """Returns the vector (length, 1) for each text, in reverse order."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.arrived, self.resume = threading.Event(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.seen.append(body | {"path": self.path})
                server.arrived.set()
                texts = body["input"]
                if texts == ["wait"]:
                    server.resume.wait(60)
                data = [{"index": i, "embedding": [len(text), 1]} for i, text in enumerate(texts)]
                answer = {"data": data[::-1][: 1 if texts[0] == "missing" else None], "usage": {"prompt_tokens": 9}}
                self.send_response(400 if texts == ["too long"] else 200)
                self.end_headers()
                content = "the input passes the context" if texts == ["too long"] else json.dumps(answer)
                self.wfile.write(content.encode())

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.resume.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def engine(server: Server) -> Iterator[Engine]:
    options = RemoteOptions(f"http://127.0.0.1:{server.http.server_port}/v1", "m", query_prefix="q: ")
    made = RemoteEngine(options)
    yield made
    server.resume.set()
    made.close()


def test_vectors_are_in_order_and_normalised(server: Server, engine: Engine) -> None:
    found = engine.embed(EmbedRequest(("", "abc"), task="query"), 10)

    assert [[round(number, 3) for number in vector] for vector in found.vectors] == [[0.949, 0.316], [0.986, 0.164]]
    assert found.tokens_in == 9
    assert server.seen == [
        {"model": "m", "input": ["q: ", "q: abc"], "encoding_format": "float", "path": "/v1/embeddings"}
    ]
    assert engine.embed(EmbedRequest(("abc",), dimensions=1), 10).vectors == ((1.0,),)


@pytest.mark.parametrize(
    ("texts", "more", "reason"),
    [
        (("too long",), {}, FailureReason.CONTEXT_EXCEEDED),
        (("missing", "b"), {}, FailureReason.ENGINE_ERROR),
        (("a",), {"dimensions": 3}, FailureReason.INVALID_REQUEST),
    ],
)
def test_server_errors_become_step_failures(
    engine: Engine, texts: tuple[str, ...], more: dict[str, int], reason: FailureReason
) -> None:
    with pytest.raises(StepFailure) as caught:
        engine.embed(EmbedRequest(texts, **more), 10)  # type: ignore[arg-type] # fields of several types
    assert caught.value.reason is reason


def outcome_of(server: Server, engine: Engine, interrupt: Callable[[Callable[[], None]], None]) -> BaseException:
    """Return the error of a waiting request after `interrupt`, which receives the callback that stops the request."""
    outcome: list[BaseException] = []
    stops: list[Callable[[], None]] = []

    def work() -> None:
        try:
            engine.embed(EmbedRequest(("wait",)), 60, stops.append)
        except BaseException as error:  # noqa: BLE001 the test looks at it
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert server.arrived.wait(60)
    while not stops:
        thread.join(0.01)
    interrupt(stops[0])
    thread.join(10)
    return outcome[0]


def test_a_waiting_request_can_be_stopped(server: Server, engine: Engine) -> None:
    assert isinstance(outcome_of(server, engine, lambda stop: stop()), CancelledError)
    with pytest.raises(TimeoutError):
        engine.embed(EmbedRequest(("wait",)), 0.01)


def test_closing_fails_waiting_requests(server: Server, engine: Engine) -> None:
    closing = threading.Thread(target=engine.close)
    outcome = outcome_of(server, engine, lambda _: closing.start())
    assert isinstance(outcome, StepFailure)
    assert outcome.reason is FailureReason.WORKER_STOPPED
    server.resume.set()
    closing.join()
