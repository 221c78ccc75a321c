"""Connections that send their requests slowly."""

from __future__ import annotations

import http.client
import select
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn

from app.api import connections

Connect = Callable[[], socket.socket]

#: Seconds after which a slow connection is closed in these tests, and the interval of the checks.
GRACE, INTERVAL = 0.6, 0.1


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer with the length of the body after receiving it completely."""
    length, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        length, more = length + len(message.get("body", b"")), message.get("more_body", False)
    body = str(length).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    monkeypatch.setattr(connections, "GRACE", GRACE)
    monkeypatch.setattr(connections, "INTERVAL", INTERVAL)
    config = uvicorn.Config(
        echo, host="127.0.0.1", port=0, lifespan="off", log_config=None, http=connections.TimedProtocol,
        timeout_keep_alive=30,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    address = server.servers[0].sockets[0].getsockname()
    yield lambda: socket.create_connection(address, timeout=30)
    server.should_exit = True
    thread.join()


def closed(client: socket.socket, seconds: float) -> bool:
    """Whether the server closes the connection, or sends something, within that time."""
    return bool(select.select([client], [], [], seconds)[0])


HEADS = [
    b"",
    b"GET / HTTP/1.1\r\nHost: h\r\nX-Long: ",
    b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 999\r\n\r\n",
]


@pytest.mark.parametrize("head", HEADS)
def test_a_request_that_does_not_arrive_is_dropped(connect: Connect, head: bytes) -> None:
    with connect() as client:
        client.sendall(head)
        assert client.recv(1) == b""


@pytest.mark.parametrize("head", HEADS[1:])
def test_a_request_that_trickles_in_is_dropped(connect: Connect, head: bytes) -> None:
    with connect() as client:
        client.sendall(head)
        sent = 0
        while not closed(client, 0.05):
            client.sendall(b"x")
            sent += 1
        assert sent < 990, "it was dropped before it was complete"


def test_a_request_that_arrives_fast_enough_is_answered(connect: Connect) -> None:
    """Each received part extends the time."""
    part, parts = b"x" * 1000, 8
    with connect() as client:
        client.sendall(f"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: {len(part) * parts}\r\n\r\n".encode())
        for _ in range(parts):
            assert not closed(client, GRACE / 3)
            client.sendall(part)
        assert b" 200 " in client.recv(1000)


def test_a_client_that_keeps_its_connection_is_served_again(connect: Connect) -> None:
    with connect() as made:
        client = http.client.HTTPConnection(*made.getpeername(), timeout=30)
        for _ in range(4):
            client.request("GET", "/")
            assert client.getresponse().read() == b"0"
            used = client.sock
            assert not closed(used, GRACE / 2)
        assert client.sock is used
        client.close()
