"""
The MCP server at `/mcp`, over streamable HTTP.

Everything that guards the API guards it: keys and scopes, Host and Origin, bounds of bodies. A tool calls the API in
this process, with the headers of its request, so it can do what its caller can. The package `mcp`, an extra, is
imported with the first request.
"""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import httpx2
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from app.access.callers import KeyScope
from app.api.callers import OPEN, InjectedCaller, requires
from app.api.routers import ApiRouter
from app.mcp_server.api import Api

if TYPE_CHECKING:
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

router = ApiRouter(include_in_schema=False)

PATH = "/mcp"
#: Where clients look for how requests to it are authorised (RFC 9728).
METADATA_PATH = f"/.well-known/oauth-protected-resource{PATH}"
#: Most sessions at a time, and seconds without a request after which one ends.
_MAX_SESSIONS, _IDLE_SECONDS = 500, 1_800.0
#: What of a request its tools send again: who asks, and through which proxies.
_FORWARDED = ("authorization", "host", "forwarded", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host")
_MISSING = "the MCP server needs the package mcp: pip install 'arriero[mcp]'"


class McpEndpoint:
    """The sessions of MCP clients in this process."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._manager: StreamableHTTPSessionManager | None = None
        self._serving: asyncio.Task[None] | None = None
        self._closed = asyncio.Event()
        self._lock = asyncio.Lock()

    async def manager(self) -> StreamableHTTPSessionManager:
        """Return what serves the sessions; it begins with the first request."""
        async with self._lock:
            if self._manager is None:
                self._manager, began = self._made(), asyncio.Event()
                # Its task group has to be entered and left by one task, which is none of a request.
                self._serving = asyncio.create_task(self._serve(self._manager, began))
                await began.wait()
            return self._manager

    async def close(self) -> None:
        """End all sessions."""
        self._closed.set()
        if self._serving is not None:
            await self._serving

    async def _serve(self, manager: StreamableHTTPSessionManager, began: asyncio.Event) -> None:
        async with manager.run():
            began.set()
            await self._closed.wait()

    def _made(self) -> StreamableHTTPSessionManager:
        from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
        from mcp.server.transport_security import TransportSecuritySettings

        from app.mcp_server.server import serve

        return StreamableHTTPSessionManager(
            serve(lambda context: self._api_of(context.request)),
            # The guard of the API has checked Host and Origin before.
            security_settings=TransportSecuritySettings(enable_dns_rebinding_protection=False),
            session_idle_timeout=_IDLE_SECONDS,
            max_sessions=_MAX_SESSIONS,
        )

    def _api_of(self, request: Request | None) -> Api:
        """Return the API for the caller of a request."""
        assert request is not None, "over HTTP every message has its request"
        address = request.client or ("", 0)
        transport = httpx2.ASGITransport(app=self._app, client=(address[0], address[1]), raise_app_exceptions=False)
        headers = {name: request.headers[name] for name in _FORWARDED if name in request.headers}
        return Api(
            httpx2.AsyncClient(transport=transport, base_url=str(request.base_url), headers=headers, timeout=None)
        )


class _Handled(Response):
    """The answer of the MCP server to a request, which it reads and answers itself."""

    def __init__(self, manager: StreamableHTTPSessionManager, caller: str) -> None:
        super().__init__()
        self._manager, self._caller = manager, caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on. A session belongs to the key that began it."""
        from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
        from mcp.server.auth.provider import AccessToken

        token = AccessToken(token="", client_id=self._caller, scopes=[])
        await self._manager.handle_request({**scope, "user": AuthenticatedUser(token)}, receive, send)


def metadata_url(request: Request) -> str:
    """Return where clients find how requests to the MCP server are authorised."""
    return f"{str(request.base_url).rstrip('/')}{METADATA_PATH}"


@router.api_route(PATH, methods=["GET", "POST", "DELETE"], dependencies=[requires(KeyScope.SUBMIT, KeyScope.READ)])
async def mcp(request: Request, caller: InjectedCaller) -> Response:
    """The MCP server."""
    if find_spec("mcp") is None:
        raise HTTPException(501, _MISSING)
    endpoint: McpEndpoint = request.app.state.mcp
    return _Handled(await endpoint.manager(), caller.key_id or caller.name)


@router.get(METADATA_PATH, dependencies=[OPEN])
def metadata(request: Request) -> JSONResponse:
    """How requests to the MCP server are authorised: by API keys, which no authorisation server issues (RFC 9728)."""
    found: dict[str, Any] = {
        "resource": f"{str(request.base_url).rstrip('/')}{PATH}",
        "resource_name": "Arriero",
        "bearer_methods_supported": ["header"],
        "scopes_supported": sorted(KeyScope),
        "authorization_servers": [],
    }
    return JSONResponse(found)
