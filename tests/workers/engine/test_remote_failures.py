"""What a server does wrong, and what each gives: down, slow, busy, rubbish, cut off, a wrong key, a refused address."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from app.inference.requests import ChatMessage, EmbedRequest, GenerateRequest
from app.kernel import clock
from app.kernel.errors import FailureReason, StepFailure
from app.kernel.security.egress import EgressPolicy
from workers.engine.remote.engine import RemoteEngine
from workers.engine.remote.options import RemoteOptions
from workers.engine.remote.rates import RateWindow

KEY = "sk-very-secret-key"
DONE = [{"choices": [{"delta": {"content": "ok"}}]}, {"choices": [{"delta": {}, "finish_reason": "stop"}]}]
Answer = Callable[[BaseHTTPRequestHandler], None]


def status(code: int, body: str = "", **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body.encode())

    return answer


def stream(*lines: Any) -> Answer:
    """A stream of events; a text is written as it is."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for line in lines:
            handler.wfile.write((line if isinstance(line, str) else f"data: {json.dumps(line)}\n\n").encode())

    return answer


class Server:
    """Gives one answer after the other, the last again and again."""

    def __init__(self) -> None:
        self.answers: list[Answer] = [stream(*DONE)]
        self.seen: list[str] = []
        self.hold, self.reached = threading.Event(), threading.Event()
        self.left = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                server.seen.append(self.path)
                server.reached.set()
                answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
                answer(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    def silent(self, handler: BaseHTTPRequestHandler) -> None:
        """Answers nothing until the test ends, and notes that the client has gone away."""
        handler.connection.settimeout(60)
        if not handler.connection.recv(1):
            self.left.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


Engines = Callable[..., RemoteEngine]


@pytest.fixture
def engines(server: Server) -> Iterator[Engines]:
    made: list[RemoteEngine] = []

    def make(url: str = "", on_problem: Callable[[str], None] = lambda _: None, **more: Any) -> RemoteEngine:
        made.append(RemoteEngine(RemoteOptions(url or server.url, "m", api_key=lambda: KEY, **more), on_problem))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


REQUEST = GenerateRequest(messages=(ChatMessage("user", "Hello."),))


def failure(engine: RemoteEngine) -> StepFailure:
    with pytest.raises(StepFailure) as caught:
        engine.generate(REQUEST).result(60)
    return caught.value


@pytest.mark.parametrize(
    ("answer", "reason", "said"),
    [
        (status(401, f"wrong key {KEY}"), "engine_error", "the server does not accept the key (401): wrong key ***"),
        (status(429, "slow down"), "http_throttled", "the server asks for fewer requests (429): slow down"),
        (status(500, "oops"), "engine_error", "the server cannot serve the request (500): oops"),
        (status(503), "engine_error", "the server cannot serve the request (503)"),
        (status(504), "timeout", "the server timed out (504)"),
        (
            status(302, Location="http://127.0.0.1:1/"),
            "engine_error",
            "the server redirects, which is not followed (302)",
        ),
        (status(400, "maximum context length is 10"), "context_exceeded", "the server rejected the request (400)"),
        (status(400, "x" * 100_000), "invalid_request", "the server rejected the request (400): xxx"),
        (status(200, "<html>"), "engine_error", "the server's stream ended too early"),
        (stream("data: {broken\n\n"), "engine_error", "an event that is not JSON"),
        (stream("data: " + "[" * 100_000 + "\n\n"), "engine_error", "an event that is not JSON"),
        (stream({"choices": [7]}), "engine_error", "without the form of OpenAI's API"),
        (stream({"choices": [{"delta": {"content": 5}}]}), "engine_error", "without the form of OpenAI's API"),
        (stream({"error": {"message": "out of memory"}}), "engine_error", "the server failed"),
        (stream(DONE[0]), "engine_error", "the server's stream ended too early"),
        (stream("data: " + "x" * (5 * 2**20)), "engine_error", "is too long"),
    ],
)
def test_what_a_server_does_wrong(
    server: Server, engines: Engines, answer: Answer, reason: FailureReason, said: str
) -> None:
    server.answers = [answer]
    found = failure(engines())
    assert (found.reason, said in found.message) == (reason, True), found.message
    assert KEY not in found.message
    assert len(found.message) < 1_000


def test_nonsense_in_the_usage_does_not_lose_the_text(server: Server, engines: Engines) -> None:
    server.answers = [stream(*DONE, {"choices": [], "usage": {"prompt_tokens": "many", "completion_tokens": -1}})]
    found = engines().generate(REQUEST).result(60)
    assert (found.text, found.tokens_in, found.tokens_out) == ("ok", 0, 1)


def test_a_server_that_is_down(engines: Engines) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens on it
        found = failure(engines(f"http://127.0.0.1:{taken.getsockname()[1]}/v1", retries=1))
    assert found.reason is FailureReason.HTTP_UNREACHABLE
    assert "cannot be reached" in found.message


def test_a_server_that_says_nothing(server: Server, engines: Engines) -> None:
    server.answers = [server.silent]
    found = failure(engines(read_timeout=0.5))
    assert (found.reason, "no data for 0.5 s" in found.message) == (FailureReason.TIMEOUT, True)
    assert len(server.seen) == 1, "what may have been read is not sent again"


def test_a_busy_server_is_asked_again_when_it_says_when(server: Server, engines: Engines) -> None:
    server.answers = [status(429, Retry_After="0"), status(503, Retry_After="0"), stream(*DONE)]
    assert engines().generate(REQUEST).result(60).text == "ok"
    assert len(server.seen) == 3


@pytest.mark.parametrize("retry_after", ["60", "Wed, 21 Oct 2099 07:28:00 GMT"])
def test_a_long_retry_after_is_left_to_the_retry_of_the_step(
    server: Server, engines: Engines, retry_after: str
) -> None:
    server.answers = [status(429, Retry_After=retry_after)]
    found = failure(engines())
    assert found.retry_after is not None
    assert timedelta(seconds=60) <= found.retry_after <= timedelta(days=1)
    assert len(server.seen) == 1


def test_nothing_is_sent_again_once_the_answer_has_begun(server: Server, engines: Engines) -> None:
    server.answers = [stream(DONE[0])]
    assert failure(engines()).text == "ok"
    assert len(server.seen) == 1


def test_a_connection_that_breaks_keeps_the_text_so_far(server: Server, engines: Engines) -> None:
    def cut(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(f"data: {json.dumps(DONE[0])}\n\n".encode())

    server.answers = [cut]
    found = failure(engines())
    assert (found.reason, found.text) == (FailureReason.ENGINE_ERROR, "ok")
    assert "broke" in found.message


def test_a_deadline_says_nothing_of_the_server(server: Server, engines: Engines) -> None:
    engine = engines()
    request = replace(REQUEST, deadline=clock.now() - timedelta(seconds=1))
    with pytest.raises(StepFailure) as caught:
        engine.generate(request).result(60)
    assert (caught.value.reason, engine.problem) == (FailureReason.TIMEOUT, "")


def test_a_cancelled_request_leaves_a_silent_server_at_once(server: Server, engines: Engines) -> None:
    server.answers = [server.silent]
    ticket = engines(read_timeout=600).generate(REQUEST)
    assert server.reached.wait(60)
    ticket.cancel()
    began = time.monotonic()
    with pytest.raises(CancelledError):
        ticket.result(60)
    assert server.left.wait(60)
    assert time.monotonic() - began < 30, "it does not wait for the read timeout"


def test_a_stopped_embedding_leaves_a_silent_server_at_once(server: Server, engines: Engines) -> None:
    server.answers = [server.silent]
    stops: list[Callable[[], None]] = []

    def stop() -> None:
        assert server.reached.wait(60)
        stops[0]()

    threading.Thread(target=stop).start()
    with pytest.raises(CancelledError):
        engines(read_timeout=600).embed(EmbedRequest(("a",)), 60, stops.append)
    assert server.left.wait(60)


def test_a_slow_server_is_no_stalled_engine(server: Server, engines: Engines) -> None:
    server.answers = [server.silent]
    engine = engines(read_timeout=600)
    ticket = engine.generate(REQUEST)
    assert server.reached.wait(60)
    assert engine.stalled_for() == timedelta(0)
    ticket.cancel()


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (EgressPolicy(), "this machine itself; `private = true` in its catalogue entry would allow it"),
        (EgressPolicy(allow_private=True), None),
    ],
)
def test_an_address_of_a_private_network_needs_permission(
    server: Server, engines: Engines, policy: EgressPolicy, said: str | None
) -> None:
    engine = engines(policy=policy)
    if said is None:
        assert engine.generate(REQUEST).result(60).text == "ok"
        return
    found = failure(engine)
    assert (found.reason, said in found.message) == (FailureReason.HTTP_REFUSED, True), found.message
    assert server.seen == []


def test_a_metadata_service_is_never_called(engines: Engines) -> None:
    found = failure(engines("http://169.254.169.254/v1", policy=EgressPolicy(allow_private=True)))
    assert (found.reason, "the metadata service" in found.message) == (FailureReason.HTTP_REFUSED, True)


def test_what_a_server_cannot_do_is_refused_by_name(engines: Engines) -> None:
    for more, said in (({"n": 2}, "n is 2"), ({"logprobs": 1}, "logprobs is set")):
        with pytest.raises(StepFailure, match=said):
            engines().generate(GenerateRequest(prompt="a", **more))
    with pytest.raises(StepFailure, match="a grammar"):
        engines(llama_fields=False).generate(GenerateRequest(prompt="a", grammar='root ::= "a"')).result(60)


def test_the_problem_of_a_server_is_told_and_passes(server: Server, engines: Engines) -> None:
    told: list[str] = []
    server.answers = [status(401), status(400), stream(*DONE)]
    engine = engines(on_problem=told.append)
    failure(engine)
    assert "does not accept the key" in told[-1]
    failure(engine)  # a request that the server rejects says that it serves
    assert told[-1] == ""
    server.answers = [status(403)]
    with pytest.raises(StepFailure):
        engine.probe()
    assert "does not accept the key" in engine.problem
    server.answers = [status(404)]
    engine.probe()  # a server without this resource
    assert engine.problem == ""
    assert engine.metrics().failed == 2


def test_the_limits_of_a_minute_are_kept_by_waiting(server: Server, engines: Engines) -> None:
    engine = engines(requests_per_minute=2)
    for _ in range(2):
        engine.generate(REQUEST).result(60)
    ticket = engine.generate(REQUEST)
    with pytest.raises(TimeoutError):
        ticket.result(0.3)
    assert engine.stalled_for() == timedelta(0)
    ticket.cancel()
    with pytest.raises(CancelledError):
        ticket.result(60)
    assert len(server.seen) == 2


def test_the_rate_window() -> None:
    window = RateWindow(2, 100)
    assert window.wait(0.0, 10) == 0
    first = window.send(0.0, 10)
    window.send(10.0, 10)
    assert window.wait(20.0, 10) == 40.0  # until the first is a minute old
    assert window.wait(60.0, 10) == 0
    tokens = RateWindow(None, 100)
    first = tokens.send(0.0, 10)
    tokens.correct(first, 95)  # it has written more than was thought
    assert tokens.wait(30.0, 10) == 30.0
    assert tokens.wait(30.0, 5) == 0
    assert tokens.wait(61.0, 1_000_000) == 0, "a request beyond the limit goes alone"


def test_a_secret_that_is_gone_fails_the_request_alone(server: Server) -> None:
    def gone() -> str:
        raise StepFailure(FailureReason.TEMPLATE_ERROR, "there is no secret 'k'")

    for url in (server.url, "http://127.0.0.1:1/v1"):
        engine = RemoteEngine(RemoteOptions(url, "m", api_key=gone, retries=0))
        found = failure(engine)
        assert (found.reason, found.message) == (FailureReason.TEMPLATE_ERROR, "there is no secret 'k'")
        engine.close()
    assert server.seen == []
