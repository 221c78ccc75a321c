"""A package with hooks that are good, hang, crash and lie, as it would be installed; and servers that do so."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

CODE = '''
import os, time

def echo(request):
    """Keep the prompt, and answer it as the result."""
    if request["at"] == "pre_prompt":
        return {"state": request["texts"][-1]["text"]}
    return {"texts": [dict(one, text="You wrote: " + request["state"]) for one in request["texts"]]}

def shout(request):
    print("this is no answer")
    return {"texts": [dict(one, text=one["text"].upper()) for one in request["texts"]], "annotations": {"loud": True}}

def hang(request):
    time.sleep(600)

def die(request):
    os._exit(3)

def fail(request):
    raise RuntimeError("my prompt was " + request["texts"][0]["text"])

def lie(request):
    return {"texts": request["texts"] + request["texts"]}

def babble(request):
    return {"texts": "x", "surprise": 1}

def unwritable(request):
    return {"state": object()}

def refuse(request):
    return {"refuse": "not today", "annotations": {"why": "weekday"}}

def break_json(request):
    if request["at"] == "post_result":
        return {"texts": [dict(one, text="no json") for one in request["texts"]]}
'''
NAMES = ("echo", "shout", "hang", "die", "fail", "lie", "babble", "unwritable", "refuse", "break_json")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is installed for child processes."""
    place = tmp_path / "site"
    about = place / "hooks_of_tests-1.0.dist-info"
    about.mkdir(parents=True)
    (place / "hooks_of_tests.py").write_text(CODE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: hooks-of-tests\nVersion: 1.0\n")
    points = "\n".join(f"{name} = hooks_of_tests:{name}" for name in NAMES)
    (about / "entry_points.txt").write_text(f"[arriero.hooks]\n{points}\nbroken = nowhere_at_all:f\n")
    monkeypatch.setenv("PYTHONPATH", str(place))


class HookServer:
    """A server whose answer is a function of what it is sent."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, str], bytes]] = []
        self.answer: Callable[[Any], tuple[int, bytes]] = lambda _: (200, b"{}")
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                server.seen.append(({name.lower(): value for name, value in self.headers.items()}, body))
                status, content = server.answer(json.loads(body))
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    @property
    def authority(self) -> str:
        return f"127.0.0.1:{self.http.server_port}"

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server() -> Iterator[HookServer]:
    found = HookServer()
    yield found
    found.close()
