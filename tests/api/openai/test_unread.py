"""A client that does not read its stream: what waits for it is bounded, and its call is stopped."""

from __future__ import annotations

import json
import socket
import time
from urllib.parse import urlsplit

import httpx2
import pytest

from app.api import connections
from tests.api.openai.conftest import MODEL, StartPool


def test_a_stream_that_nobody_reads_is_stopped(
    api: str, start_pool: StartPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "INTERVAL", 0.2)
    monkeypatch.setattr(connections, "SEND_BUFFER", 16 * 1024)
    start_pool(slots=1, tokens_per_second=2_000)
    request = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 7_000, "stream": True}
    body = json.dumps(request).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    where = urlsplit(api)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((where.hostname, where.port))
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        assert client.recv(12) == b"HTTP/1.1 200"

        end = time.monotonic() + 60
        while "cancelled" not in (states := [run["state"] for run in httpx2.get(f"{api}/v1/runs").json()["runs"]]):
            assert set(states) <= {"running", "cancelling"}
            assert time.monotonic() < end
            time.sleep(0.05)
    # The slot is free: the next call is answered.
    short = {**request, "max_tokens": 2, "stream": False}
    assert httpx2.post(f"{api}/v1/chat/completions", json=short, timeout=60).status_code == 200
