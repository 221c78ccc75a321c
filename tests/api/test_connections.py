"""Connections that send their requests slowly."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import uvicorn

from app.api import connections

Connect = Callable[[], socket.socket]

#: Seconds after which a slow connection is closed in these tests, and the interval of the checks.
GRACE, INTERVAL = 0.6, 0.1


#: Bounds of the protocol in these tests: most connections, and seconds for a client that does not read.
MOST, UNREAD = 4, 0.5


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer with the length of the body after receiving it completely."""
    if scope["path"] == "/endless":
        await send_endlessly(receive, send)
        return
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


#: Bytes that were sent to a client that does not read, and whether its answer has been stopped.
endless: dict[str, Any] = {}


async def send_endlessly(receive: Any, send: Any) -> None:
    """Send until the client has gone away, as an event stream does."""
    endless.update(sent=0, stopped=threading.Event())
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while (await receive())["type"] != "http.disconnect":
        break
    leaving = asyncio.create_task(receive())
    while not leaving.done():
        await send({"type": "http.response.body", "body": b"x" * 10_000, "more_body": True})
        endless["sent"] += 10_000
        await asyncio.sleep(0)
    endless["stopped"].set()


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    monkeypatch.setattr(connections, "GRACE", GRACE)
    monkeypatch.setattr(connections, "INTERVAL", INTERVAL)
    config = uvicorn.Config(
        echo, host="127.0.0.1", port=0, lifespan="off", log_config=None, timeout_keep_alive=30,
        http=connections.bounded(MOST, timedelta(seconds=UNREAD)),
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


def test_received_bytes_are_no_credit_for_silence(connect: Connect) -> None:
    """A part of a body that came fast does not let the rest wait for long."""
    with connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 999999\r\n\r\n" + b"x" * 50_000)
        client.settimeout(20)
        assert client.recv(1) == b""


def test_a_client_that_reads_nothing_is_disconnected_and_what_waits_for_it_is_bounded(connect: Connect) -> None:
    with connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        client.sendall(b"GET /endless HTTP/1.1\r\nHost: h\r\n\r\n")
        client.recv(10)
        assert endless["stopped"].wait(60)
    assert endless["sent"] < 2 * 1024 * 1024


def test_a_client_that_reads_is_not_disconnected(connect: Connect) -> None:
    with connect() as client:
        client.sendall(b"GET /endless HTTP/1.1\r\nHost: h\r\n\r\n")
        end = time.monotonic() + UNREAD * 3
        while time.monotonic() < end:
            assert client.recv(100_000)
        assert not endless["stopped"].is_set()


def test_connections_over_the_limit_are_closed_and_the_others_served(connect: Connect) -> None:
    held = [connect() for _ in range(MOST)]
    try:
        for client in held:
            client.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            assert b" 200 " in client.recv(1000)
        with connect() as another, contextlib.suppress(ConnectionResetError):
            assert another.recv(1) == b""
        held.pop().close()
        with connect() as again:
            again.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            assert b" 200 " in again.recv(1000)
    finally:
        for client in held:
            client.close()


def test_headers_over_the_limit_are_refused(connect: Connect) -> None:
    with connect() as client, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client.sendall(b"GET / HTTP/1.1\r\nHost: h\r\nX-Long: " + b"x" * 200_000)
        assert b" 400 " in client.recv(1000)
