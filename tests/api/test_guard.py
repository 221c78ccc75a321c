"""Requests that pages of other sites can send are refused, and the commands of the README work."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi.testclient import TestClient

from app.api.main import serve
from app.api.services import Services

ROOT = Path(__file__).parents[2]
RUN = '{"definition": {"workflow": "w", "steps": [{"id": "a", "kind": "noop"}]}, "inputs": {}}'
JSON = {"Content-Type": "application/json"}
PAGE = {"Origin": "http://evil.example"}


def count(client: TestClient) -> int:
    return len(client.get("/v1/runs").json()["runs"])


@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({"Host": "evil.example"}, "Host"),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, "Host"),
        (PAGE, "Origin"),
        ({"Origin": "null"}, "Origin"),
        ({"Sec-Fetch-Site": "cross-site"}, "Sec-Fetch-Site"),
    ],
)
def test_requests_of_other_sites_are_refused_on_every_path(
    client: TestClient, headers: dict[str, str], named: str
) -> None:
    run_id = client.post("/v1/runs", content=RUN, headers=JSON).json()["id"]
    before = client.get(f"/v1/runs/{run_id}").json()
    paths = [
        ("POST", "/v1/runs"), ("POST", f"/v1/runs/{run_id}/cancel"), ("POST", f"/v1/runs/{run_id}/pause"),
        ("POST", "/v1/schedules/nightly/trigger"), ("POST", "/v1/pools/p/stop"), ("DELETE", "/v1/workflows/w"),
        ("GET", f"/v1/runs/{run_id}"), ("GET", "/v1/runs"), ("GET", "/healthz"), ("GET", "/docs"),
        ("GET", "/openapi.json"), ("OPTIONS", "/v1/runs"), ("GET", "/nowhere"),
    ]  # fmt: skip
    for method, path in paths:
        body = RUN if path == "/v1/runs" and method == "POST" else None
        answer = client.request(method, path, content=body, headers=JSON | headers)
        assert answer.status_code == 403, (method, path)
        assert answer.headers["content-type"] == "application/problem+json"
        assert "access-control-allow-origin" not in answer.headers
        problem = answer.json()
        assert problem["type"] == "urn:arriero:error:forbidden-request"
        assert problem["errors"][0]["where"] == named
        assert repr(headers[named]) in problem["detail"]
        assert "trusted_hosts" in problem["errors"][0]["accepted"]
    assert client.get(f"/v1/runs/{run_id}").json() == before
    assert count(client) == 1


@pytest.mark.parametrize(
    "content_type", [None, "", "text/plain", "TEXT/PLAIN; charset=utf-8", "application/x-www-form-urlencoded",
                     "multipart/form-data; boundary=x"]
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/runs", "/v1/runs/00000000-0000-0000-0000-000000000000/cancel"])
def test_a_body_needs_a_type_that_forms_cannot_send(client: TestClient, content_type: str | None, path: str) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = client.post(path, content=RUN, headers=headers)

    assert answer.status_code == 415
    (problem,) = answer.json()["errors"]
    assert (problem["where"], problem["accepted"]) == ("Content-Type", "application/json, application/yaml")
    assert count(client) == 0


def test_a_body_of_unknown_length_needs_a_media_type_too(client: TestClient) -> None:
    assert client.post("/v1/runs", content=iter([RUN.encode()])).status_code == 415


def test_a_form_without_fields_is_refused(client: TestClient) -> None:
    """Old browsers send it without an Origin."""
    run_id = client.post("/v1/runs", content=RUN, headers=JSON).json()["id"]
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert client.post(f"/v1/runs/{run_id}/cancel", headers=form).status_code == 415
    assert client.post(f"/v1/runs/{run_id}/cancel").status_code in {200, 202}


def test_own_pages_and_programs_are_accepted(client: TestClient) -> None:
    own = {"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}

    assert client.post("/v1/runs", content=RUN, headers=JSON | own).status_code == 202
    assert client.post("/v1/runs", content=RUN, headers=JSON).status_code == 202
    assert client.get("/docs", headers={"Sec-Fetch-Site": "none"}).status_code == 200
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert client.get("/docs", headers=link).status_code == 200


@pytest.fixture
def port(services: Services) -> Iterator[int]:
    """The port of an API that is served as `arriero api` does."""
    # Without the lifespan, whose end would close the database of the session.
    config = uvicorn.Config(serve(services), host="127.0.0.1", port=0, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    running = threading.Event()
    startup = server.startup

    async def started(*arguments: object, **more: object) -> None:
        await startup(*arguments, **more)  # type: ignore[arg-type] # passed on unchanged
        running.set()

    server.startup = started  # type: ignore[method-assign] # to know when it accepts connections
    thread = threading.Thread(target=server.run)
    thread.start()
    assert running.wait(30)
    yield int(server.servers[0].sockets[0].getsockname()[1])
    server.should_exit = True
    thread.join()


def raw(port: int, *lines: str) -> int:
    """Send the lines as a request, and return the status of the answer."""
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        return int(connection.makefile("rb").readline().split()[1])


def test_neither_request_line_nor_repeated_headers_replace_the_host(port: int) -> None:
    assert raw(port, "GET /healthz HTTP/1.1", f"Host: 127.0.0.1:{port}", "Connection: close") == 200
    assert raw(port, "GET /healthz HTTP/1.0") == 403
    assert raw(port, "GET /healthz HTTP/1.1", "Host: evil.example", "Connection: close") == 403
    assert raw(port, "GET /healthz HTTP/1.1", "Host: localhost", "Host: evil.example", "Connection: close") in {
        400,
        403,
    }
    assert raw(port, "GET /healthz HTTP/1.1", "Host: localhost", "X-Forwarded-Host: a", "Origin: null") == 403
    # A URL in the request line has no effect: browsers send one to proxies only.
    assert raw(port, "GET http://localhost/healthz HTTP/1.1", "Host: evil.example", "Connection: close") in {400, 403}


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_commands_of_the_readme_work_as_printed(port: int) -> None:
    block = re.search(r"The same over HTTP.*?```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    commands = block[1].replace("\\\n", " ").strip().splitlines()
    assert len(commands) >= 3
    for command in commands:
        curl, *arguments = shlex.split(command.replace("127.0.0.1:8470", f"127.0.0.1:{port}"))
        done = subprocess.run(
            [curl, "--fail-with-body", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout
