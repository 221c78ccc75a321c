"""`/mcp` of the API: who is let in, and what each may reach. The transport itself is the official package's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from mcp.client.client import Client
from mcp.client.streamable_http import streamable_http_client

from app.access import key_store, keys
from app.access.callers import LOCAL, KeyScope
from app.access.keys import NewKey
from app.api.main import serve
from app.api.services import Services
from app.kernel import ids
from app.kernel.sections.access import AccessSettings

pytestmark = pytest.mark.anyio

FLOW = {"workflow": "flow", "steps": [{"id": "a", "kind": "wait", "event": "go"}]}
HELLO = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "1"},
    },
}
ACCEPT = {"Accept": "application/json, text/event-stream"}


@pytest.fixture
def closed(services: Services) -> FastAPI:
    """The API with keys required."""
    services.settings = services.settings.model_copy(update={"access": AccessSettings(keys="required")})
    return serve(services)


def key(services: Services, *scopes: KeyScope, namespace: str | None = None) -> str:
    key_id, secret = ids.new_text(keys.ID_CHARACTERS, lower_case=True), ids.new_text(keys.SECRET_CHARACTERS)
    with services.database.work() as work:
        new = NewKey.by(LOCAL, f"key of {namespace}", namespace, list(scopes or KeyScope), None)
        key_store.create(work, LOCAL, new, key_id, secret)
    return keys.compose(key_id, secret)


def http(app: FastAPI, secret: str | None = None, address: str = "127.0.0.1") -> httpx2.AsyncClient:
    headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
    transport = httpx2.ASGITransport(app=app, client=(address, 1), raise_app_exceptions=False)
    return httpx2.AsyncClient(transport=transport, base_url="http://localhost", headers=headers)


@asynccontextmanager
async def ending(app: FastAPI) -> AsyncIterator[None]:
    """End the sessions of an application in the task that began them."""
    try:
        yield
    finally:
        await app.state.mcp.close()


def client(app: FastAPI, secret: str) -> Client:
    return Client(streamable_http_client("http://localhost/mcp", http_client=http(app, secret)))


async def test_who_has_no_key_is_told_where_to_look(closed: FastAPI, services: Services) -> None:
    async with http(closed) as browser, ending(closed):
        for headers in (
            {},
            {"Authorization": "Bearer none"},
            {"Authorization": f"Bearer {keys.compose('a' * 8, 'b' * 43)}"},
        ):
            answer = await browser.post("/mcp", json=HELLO, headers={**ACCEPT, **headers})
            assert answer.status_code == 401
            where = "http://localhost/.well-known/oauth-protected-resource/mcp"
            assert f'resource_metadata="{where}"' in answer.headers["WWW-Authenticate"]
        found = (await browser.get(where)).json()
        assert found["resource"] == "http://localhost/mcp"
        assert found["bearer_methods_supported"] == ["header"]
        right = {"Authorization": f"Bearer {key(services)}", **ACCEPT}
        assert (await browser.post("/mcp", json=HELLO, headers=right)).status_code == 200


async def test_pages_of_other_sites_and_unknown_hosts_are_refused(app: FastAPI) -> None:
    async with http(app) as browser, ending(app):
        for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"Origin": "null"}):
            answer = await browser.post("/mcp", json=HELLO, headers={**ACCEPT, **headers})
            assert answer.status_code == 403, headers
        assert (
            await browser.post("/mcp", content=b"x" * 70_000, headers={"Content-Type": "application/json"})
        ).status_code == 413
        assert (
            await browser.post("/mcp", content=b"{", headers={**ACCEPT, "Content-Type": "application/json"})
        ).status_code == 400
        assert (await browser.put("/mcp", json={})).status_code == 405


async def test_a_tool_can_do_what_its_caller_can(closed: FastAPI, services: Services) -> None:
    """The namespace and the scopes are those of the key of each request."""
    ours, theirs = key(services, namespace="ours"), key(services, namespace="theirs")
    reader = key(services, KeyScope.READ, namespace="ours")

    async def call(secret: str, **arguments: Any) -> Any:
        async with client(closed, secret) as made:
            return await made.call_tool("execute_automation_task", arguments)

    async with ending(closed):
        started = await call(ours, definition=FLOW, wait_seconds=0)
        assert not started.is_error, started
        task = started.structured_content["task_id"]
        assert not (await call(reader, action="status", task_id=task)).is_error
        for secret, arguments, word in (
            (theirs, {"action": "status", "task_id": task}, "run"),
            (theirs, {"action": "cancel", "task_id": task}, "run"),
            (reader, {"action": "cancel", "task_id": task}, "scope"),
            (reader, {"definition": FLOW, "wait_seconds": 0}, "scope"),
        ):
            refused = await call(secret, **arguments)
            assert refused.is_error
            assert word in str(refused.content)
        async with client(closed, theirs) as made:
            assert not [one for one in (await made.list_resources()).resources if task in one.uri]


async def test_a_session_belongs_to_the_key_that_began_it(closed: FastAPI, services: Services) -> None:
    one, other = key(services, namespace="ours"), key(services, namespace="theirs")
    async with http(closed) as browser, ending(closed):
        begun = await browser.post("/mcp", json=HELLO, headers={**ACCEPT, "Authorization": f"Bearer {one}"})
        session = {"Mcp-Session-Id": begun.headers["mcp-session-id"], **ACCEPT}
        listing = {"jsonrpc": "2.0", "id": 2, "method": "prompts/list"}
        ready = {"jsonrpc": "2.0", "method": "notifications/initialized"}
        for secret, status in ((one, 202), (other, 404)):
            headers = {**session, "Authorization": f"Bearer {secret}"}
            assert (await browser.post("/mcp", json=ready, headers=headers)).status_code == status
        answer = await browser.post("/mcp", json=listing, headers={**session, "Authorization": f"Bearer {one}"})
        assert "explain_run" in answer.text
        assert (await browser.delete("/mcp", headers={**session, "Authorization": f"Bearer {one}"})).status_code == 200
        assert (
            await browser.post("/mcp", json=listing, headers={**session, "Authorization": f"Bearer {one}"})
        ).status_code == 404
