"""Models of servers in a real installation: this API itself, a server that goes and comes, and llama.cpp's own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx2
import openai
import pytest

from tests.live.conftest import LETTERS, MODEL, PATIENCE, Live, free_port, until

pytestmark = pytest.mark.slow


@contextmanager
def entries(live: Live, text: str) -> Iterator[None]:
    """The catalogue of the data directory with further entries."""
    own = live.folder / "catalog.toml"
    before = own.read_text() if own.exists() else ""
    own.write_text(f"{before}\n{text}")
    try:
        yield
    finally:
        own.write_text(before)


def entry(name: str, url: str, model: str, more: str = "") -> str:
    return f"""
[[models]]
name = "{name}"
use_cases = ["chat"]
context = 1024
slots = 2
{more}
[models.remote]
url = "{url}"
model = "{model}"
allowed = true
private = true
llama_fields = true
cost_in = 1
cost_out = 2
"""


def ask(live: Live, model: str) -> httpx2.Response:
    body = {"model": model, "messages": LETTERS, "max_tokens": 8}
    return httpx2.post(f"{live.api}/v1/chat/completions", json=body, timeout=PATIENCE)


@contextmanager
def serving(port: int) -> Iterator[None]:
    """A server of two words."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()
            for word in ("From", " afar"):
                self.wfile.write(f"data: {json.dumps({'choices': [{'delta': {'content': word}}]})}\n\n".encode())
            self.wfile.write(b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n')

    ThreadingHTTPServer.allow_reuse_address = True
    http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    http.daemon_threads = True
    thread = Thread(target=http.serve_forever)
    thread.start()
    try:
        yield
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def test_this_api_serves_a_model_of_another_name(live: Live) -> None:
    with entries(live, entry("self:smol", f"{live.api}/v1", MODEL, 'aliases = ["gpt-4o-mini"]')):
        with openai.OpenAI(base_url=f"{live.api}/v1", api_key="none", timeout=PATIENCE) as client:
            create = client.chat.completions.create
            plain = create(model="gpt-4o-mini", messages=LETTERS, max_tokens=8, temperature=0)
            direct = create(model=MODEL, messages=LETTERS, max_tokens=8, temperature=0)
            chunks = list(create(model="self:smol", messages=LETTERS, max_tokens=8, temperature=0, stream=True))
        assert plain.model == "self:smol"
        assert plain.choices[0].message.content == direct.choices[0].message.content
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain.choices[0].message.content
        assert plain.usage is not None
        run = live.until_ended(plain.id.removeprefix("chatcmpl-"))
        expected = (plain.usage.prompt_tokens + 2 * plain.usage.completion_tokens) / 1_000_000
        assert run["cost"] == pytest.approx(expected)
        step = {"id": "a", "kind": "generate", "model": "auto:chat?remote=only", "prompt": "Hello.", "max_tokens": 4}
        found = live.until_ended(live.submit({"workflow": "w", "steps": [step]}))
        assert (found["state"], found["steps"][0]["model"]) == ("succeeded", "self:smol")
        (pool,) = [one for one in httpx2.get(f"{live.api}/v1/pools").json()["pools"] if one["model"] == "self:smol"]
        assert list(pool["bytes"].values()) == [192 * 2**20]
        assert "which lists the model" in live.arriero("models", "verify", "self:smol").stdout
        assert "auto:chat?remote=only: self:smol" in live.arriero("models", "select", "auto:chat?remote=only").stdout
        assert "it uses no device" in live.arriero("models", "footprint", "self:smol", expect=6).stderr
        live.arriero("pools", "stop", "self:smol")


def test_a_server_that_goes_is_followed_by_a_local_model_until_it_is_back(live: Live) -> None:
    port = free_port()
    with entries(live, entry("far:away", f"http://127.0.0.1:{port}/v1", "m", f'fallback = ["{MODEL}"]')):
        with serving(port):
            # Until the agent has seen the entry, no host can serve it.
            until(lambda: ask(live, "far:away").json()["model"] == "far:away")
        answer = ask(live, "far:away")
        assert answer.headers["X-Arriero-Model"] == answer.json()["model"] == MODEL
        assert "far:away failed (http_unreachable)" in answer.headers["X-Arriero-Reason"]

        def state() -> Any:
            return httpx2.get(f"{live.api}/v1/models/far:away").json()

        gone = until(lambda: found if (found := state())["state"] == "unavailable" else None)
        assert "cannot be reached" in gone["problem"]
        until(lambda: "far:away is unavailable" in ask(live, "far:away").headers.get("X-Arriero-Reason", ""))
        with serving(port):
            until(lambda: ask(live, "far:away").json()["model"] == "far:away")
            assert state()["state"] == "resident"
        live.arriero("pools", "stop", "far:away")


SERVER = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_parallel, params.n_ctx = sys.argv[1], 2, 2048
params.port, params.verbosity = int(sys.argv[2]), 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
time.sleep(86400)
"""


def test_llama_cpps_own_server(live: Live) -> None:
    pytest.importorskip("xllamacpp")
    path, port = json.loads(live.arriero("models", "show", MODEL, "--json").stdout)["path"], free_port()
    command = [sys.executable, "-c", SERVER, path, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert "http" in server.stdout.readline()
            with entries(live, entry("llama:server", f"http://127.0.0.1:{port}/v1", "smollm")):
                answer = ask(live, "llama:server").json()
                assert answer["choices"][0]["message"]["content"]
                assert answer["usage"]["completion_tokens"] == 8
                schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
                form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
                body = {"model": "llama:server", "messages": LETTERS, "max_tokens": 60, "response_format": form}
                found = httpx2.post(f"{live.api}/v1/chat/completions", json=body, timeout=PATIENCE).json()
                assert isinstance(json.loads(found["choices"][0]["message"]["content"])["n"], int)
                live.arriero("pools", "stop", "llama:server")
        finally:
            server.kill()
