"""The remote engine against a real HTTP server on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from app.inference.requests import (
    ChatMessage,
    FinishReason,
    GenerateRequest,
    NamedTool,
    Sampling,
    TextPiece,
    Tool,
    ToolCall,
)
from app.kernel import clock
from app.kernel.errors import FailureReason, StepFailure
from workers.engine.remote.body import body
from workers.engine.remote.engine import RemoteEngine
from workers.engine.remote.options import RemoteOptions


class Server:
    """An OpenAI-compatible server whose answer depends on the last user message."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.resume = threading.Event()
        self.disconnected = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.seen.append(body | {"path": self.path, "key": self.headers.get("Authorization")})
                text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
                if text.startswith("status "):
                    self.send_response(int(text.split()[1]))
                    self.end_headers()
                    self.wfile.write(text.encode())
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                try:
                    self.stream(text)
                except OSError:
                    server.disconnected.set()

            def stream(self, text: str) -> None:
                if text == "nonsense":
                    self.wfile.write(b"data: {broken\n\n")
                    return
                if text == "think":
                    for name in ("reasoning_content", "reasoning"):
                        self.event({"choices": [{"delta": {name: f"by {name}; "}}]})
                for word in ["Hello", " wörld"] if not text.startswith("{") else [text]:
                    self.event({"choices": [{"delta": {"content": word}, "text": word}]})
                if text == "endless":
                    for _ in range(100_000):
                        server.resume.wait(0.005)
                        self.event({"choices": [{"delta": {"content": "."}}]})
                if text == "call":
                    part = {"index": 0, "function": {"name": "f", "arguments": '{"x":'}}
                    self.event({"choices": [{"delta": {"tool_calls": [part]}}]})
                    rest = {"index": 0, "function": {"arguments": " 1}"}}
                    self.event({"choices": [{"delta": {"tool_calls": [rest]}}]})
                if text != "short":
                    self.event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
                    self.event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}})
                self.wfile.write(b"data: [DONE]\n\n")

            def event(self, value: dict[str, Any]) -> None:
                self.wfile.write(b": ping\n\ndata: " + json.dumps(value).encode() + b"\n\n")
                self.wfile.flush()

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self) -> None:
        self.resume.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def engine(server: Server) -> Iterator[RemoteEngine]:
    engine = RemoteEngine(RemoteOptions(server.url, "m", api_key=lambda: "key-of-server", slots=2))
    yield engine
    engine.close()


def chat(text: str, **more: Any) -> GenerateRequest:
    return GenerateRequest(messages=(ChatMessage("user", text),), **more)


def test_a_text_is_streamed_and_counted(server: Server, engine: RemoteEngine) -> None:
    pieces: list[str] = []
    result = engine.generate(chat("hi", sampling=Sampling(seed=3), stop=("x",)), pieces.append).result(60)
    assert (result.text, result.finish) == ("Hello wörld", FinishReason.STOP)
    assert (result.tokens_in, result.tokens_out) == (5, 2)
    assert pieces == ["Hello", " wörld"]
    (seen,) = server.seen
    assert (seen["path"], seen["key"], seen["model"]) == ("/v1/chat/completions", "Bearer key-of-server", "m")
    assert (seen["seed"], seen["stop"], seen["top_k"]) == (3, ["x"], 40)


def test_the_thinking_of_a_server_is_passed_on(server: Server, engine: RemoteEngine) -> None:
    pieces: list[TextPiece] = []
    request = chat("think", reasoning_effort="low", template_arguments={"enable_thinking": True})
    result = engine.generate(request, on_piece=pieces.append).result(60)
    assert (result.reasoning, result.text) == ("by reasoning_content; by reasoning; ", "Hello wörld")
    assert "".join(piece.reasoning for piece in pieces) == result.reasoning
    assert "".join(piece.text for piece in pieces) == result.text
    assert server.seen[0]["reasoning_effort"] == "low"
    assert server.seen[0]["chat_template_kwargs"] == {"enable_thinking": True}


def test_a_prompt_without_messages_goes_to_completions(server: Server, engine: RemoteEngine) -> None:
    assert engine.generate(GenerateRequest(prompt="hi")).result(60).text == "Hello wörld"
    assert server.seen[0]["path"] == "/v1/completions"


def test_a_cancelled_request_closes_its_stream(server: Server, engine: RemoteEngine) -> None:
    started = threading.Event()
    ticket = engine.generate(chat("endless"), lambda _: started.set())
    assert started.wait(60)
    assert engine.stalled_for() < timedelta(seconds=5)
    ticket.cancel()
    with pytest.raises(CancelledError):
        ticket.result(60)
    assert server.disconnected.wait(60)


def test_closing_fails_running_requests_with_the_reason(engine: RemoteEngine) -> None:
    started = threading.Event()
    ticket = engine.generate(chat("endless"), lambda _: started.set())
    assert started.wait(60)
    engine.close()
    with pytest.raises(StepFailure, match="closed") as caught:
        ticket.result(60)
    assert caught.value.reason is FailureReason.WORKER_STOPPED


def test_a_deadline_keeps_the_text_so_far(engine: RemoteEngine) -> None:
    with pytest.raises(StepFailure) as caught:
        engine.generate(chat("endless", deadline=clock.now() + timedelta(seconds=2))).result(60)
    assert caught.value.reason is FailureReason.TIMEOUT
    assert (caught.value.text or "").startswith("Hello")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("status 400 bad", FailureReason.INVALID_REQUEST),
        ("status 400 exceeds the context", FailureReason.CONTEXT_EXCEEDED),
        ("status 401", FailureReason.ENGINE_ERROR),
        ("status 429", FailureReason.HTTP_THROTTLED),
        ("status 503", FailureReason.ENGINE_ERROR),
        ("status 504", FailureReason.TIMEOUT),
        ("short", FailureReason.ENGINE_ERROR),
        ("nonsense", FailureReason.ENGINE_ERROR),
    ],
)
def test_server_errors_become_step_failures(engine: RemoteEngine, text: str, reason: FailureReason) -> None:
    with pytest.raises(StepFailure) as caught:
        engine.generate(chat(text)).result(60)
    assert caught.value.reason is reason


def test_an_unreachable_server() -> None:
    engine = RemoteEngine(RemoteOptions("http://127.0.0.1:9/v1", "m", connect_timeout=2))
    with pytest.raises(StepFailure, match="cannot be reached"):
        engine.generate(chat("a")).result(60)
    assert engine.stalled_for() == timedelta(0)
    engine.close()
    with pytest.raises(StepFailure, match="closed"):
        engine.generate(chat("a"))


def test_answers_are_validated_against_the_schema(engine: RemoteEngine) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert engine.generate(chat('{"a": 1}', schema=schema)).result(60).text == '{"a": 1}'
    for text in ('{"a": "1"}', "hello"):
        with pytest.raises(StepFailure) as caught:
            engine.generate(chat(text, schema=schema)).result(60)
        assert caught.value.reason is FailureReason.INVALID_OUTPUT
        assert caught.value.text


def test_tool_calls_are_assembled_from_events(server: Server, engine: RemoteEngine) -> None:
    (call,) = engine.generate(chat("call", tools=(Tool("f"),))).result(60).tool_calls
    assert (call.name, call.arguments) == ("f", {"x": 1})
    assert server.seen[0]["tools"][0]["function"]["name"] == "f"


def test_tool_results_refer_to_earlier_calls_by_id() -> None:
    called = ChatMessage("assistant", "", (ToolCall("f", {"x": 1}), ToolCall("g", {})))
    turns = (ChatMessage("user", "a"), called, ChatMessage("tool", "one"), ChatMessage("tool", "two"))
    request = GenerateRequest(messages=turns, tools=(Tool("f"), Tool("g")), tool_choice=NamedTool("g"))
    sent = body(request, "m", llama_fields=True)
    assert sent["tool_choice"] == {"type": "function", "function": {"name": "g"}}
    numbers = [call["id"] for call in sent["messages"][1]["tool_calls"]]
    assert [turn["tool_call_id"] for turn in sent["messages"][2:]] == numbers
    assert sent["messages"][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": 1}'}


def test_a_call_of_an_unknown_tool_is_a_failure(engine: RemoteEngine) -> None:
    strict = {"type": "object", "properties": {"x": {"type": "string"}}}
    for tools in ((Tool("other"),), (Tool("f", "", strict),)):
        with pytest.raises(StepFailure) as caught:
            engine.generate(chat("call", tools=tools)).result(60)
        assert caught.value.reason is FailureReason.INVALID_OUTPUT
