"""Listening sockets: who holds a port that is in use, and which setting has it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from app.kernel.errors import ServerNotStarted
from app.kernel.processes import listening

_HOLD = """
import socket, sys
lock, listener = open(sys.argv[1], "w"), socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which this process listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listening.port_of(listener)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", ""])
def test_a_taken_port_names_its_setting_and_its_holder(host: str, taken: int) -> None:
    with pytest.raises(ServerNotStarted) as refused:
        listening.listen("api", host, taken, "api.port")

    message = str(refused.value)
    assert message.startswith(f"api did not start: port {taken} on ")
    assert "api.port (ARRIERO_API__PORT)" in message
    assert f"in use by process {os.getpid()} (" in message


def test_the_data_directory_of_another_tree_is_named(tmp_path: Path) -> None:
    """It is the directory whose lock the holder has open."""
    lock = tmp_path / "arriero.lock"
    program = [sys.executable, "-c", _HOLD, str(lock)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())

        assert listening.holder("127.0.0.1", port).startswith(f"process {process.pid} (")
        assert listening.holder("127.0.0.1", port).endswith(f": another Arriero, on the data directory {tmp_path}")
        process.communicate("")


@pytest.mark.parametrize(
    ("answer", "known"),
    [
        (b'{"status": "ok", "version": "1", "instance": "x"}', True),
        (b'{"status": "ok"}', False),
        (b"[" * 4000, False),
        (b"<html>", False),
    ],
)
def test_another_arriero_is_known_by_its_answer(answer: bytes, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process may be in another container, where it cannot be seen."""
    monkeypatch.setattr(listening, "_listening_on", lambda *_: iter(()))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        described = listening.holder("127.0.0.1", server.server_port)
        server.shutdown()
        thread.join()
    unseen = "a process that this user cannot see"
    assert described == (f"{unseen}: another Arriero" if known else unseen)


def test_port_0_takes_a_free_one() -> None:
    with listening.listen("api", "127.0.0.1", 0, "api.port") as listener:
        assert listening.port_of(listener) > 0


def test_an_address_of_another_machine_names_the_setting_of_the_host() -> None:
    with pytest.raises(ServerNotStarted, match=r"api\.host \(ARRIERO_API__HOST\) must be an address of this machine"):
        listening.listen("api", "192.0.2.1", 0, "api.port")
