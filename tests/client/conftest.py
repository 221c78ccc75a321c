"""The in-process API and pool, and a server that answers as it is told, over real connections."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.api.conftest import services
from tests.api.openai.conftest import api, settings, start_pool

__all__ = ["api", "services", "settings", "start_pool"]


def answer(status: int, document: Any = None, **headers: str) -> bytes:
    """A whole answer, after which the connection is closed."""
    body = b"" if document is None else json.dumps(document).encode()
    lines = [f"HTTP/1.1 {status} X", "Connection: close", "Content-Type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def events(*texts: str) -> bytes:
    """The beginning of a stream that breaks off."""
    body = "".join(texts).encode()
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 100000\r\n\r\n"
    return head.encode() + body


@dataclass
class Script:
    """A server: what it answers, in order, and the heads and bodies of the requests that it got."""

    url: str = ""
    answers: list[bytes] = field(default_factory=list)
    requests: list[tuple[str, bytes]] = field(default_factory=list)

    def header(self, index: int, name: str) -> str | None:
        for line in self.requests[index][0].split("\r\n")[1:]:
            key, _, value = line.partition(": ")
            if key.lower() == name.lower():
                return value
        return None


@pytest.fixture
def script() -> Iterator[Script]:
    made = Script()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            lines: list[str] = []
            while (line := self.rfile.readline().decode().rstrip("\r\n")) != "":
                lines.append(line)
            if not lines:
                return
            head = "\r\n".join(lines)
            length = next((int(one.split(":")[1]) for one in lines if one.lower().startswith("content-length")), 0)
            made.requests.append((head, self.rfile.read(length)))
            self.wfile.write(made.answers.pop(0))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        made.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield made
        server.shutdown()
        thread.join()
