"""
Tools of MCP servers (Model Context Protocol), over its official client.

A server is either named by the operator, in the file of the setting `tools.mcp_file`, or has an address in the
workflow. Only the operator's file can name a command. An address is called under the rules of `http` steps.
Each description and each call is a session of its own, so that nothing of a server outlives it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import httpx2
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.kernel import log
from app.kernel.errors import FailureReason, StepFailure
from app.kernel.sections.http import HttpSettings
from app.workflows.http.calls import HttpBody, HttpCall
from workers import outbound
from workers.engine import OnStop
from workers.tool_loop.tools import MAX_TOOLS, ToolDescription

if TYPE_CHECKING:
    from mcp import Client

_log = log.get(__name__)

T = TypeVar("T")

#: Most characters of the operator's file, and most bytes of an answer of a server.
_MAX_FILE, _MAX_ANSWER = 1_000_000, 4_000_000
#: Most pages of a list of tools.
_MAX_PAGES = 20
#: Headers of a request that the connection sets, not the client.
_OWN_HEADERS = frozenset({"accept-encoding", "connection", "content-length", "host", "transfer-encoding"})


class McpServer(BaseModel):
    """A server in the operator's file."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    command: Annotated[str, Field(min_length=1)] | None = None
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = {}
    cwd: str | None = None
    url: Annotated[str, Field(min_length=1)] | None = None
    headers: Mapping[str, str] = {}
    #: The secrets in its headers, which are masked in messages.
    secrets: tuple[str, ...] = ()


class _McpFile(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    servers: Mapping[str, McpServer] = Field(alias="mcpServers")


def server_of(path: Path | None, name: str) -> McpServer:
    """Return a server of the operator's file. Raises StepFailure."""
    if path is None:
        raise _refused(f"there is no MCP server {name!r}: the setting tools.mcp_file is not set")
    try:
        with path.open(encoding="utf-8") as file:
            found = _McpFile.model_validate_json(file.read(_MAX_FILE)).servers
    except (OSError, ValueError) as error:
        why = f"{len(error.errors())} problems" if isinstance(error, ValidationError) else str(error)
        raise _refused(f"the file of the setting tools.mcp_file cannot be used: {why}") from None
    if name not in found:
        raise _refused(f"there is no MCP server {name!r}; there are: {', '.join(sorted(found)) or 'none'}")
    if (found[name].command is None) == (found[name].url is None):
        raise _refused(f"the MCP server {name!r} needs either `command` or `url` in the file of tools.mcp_file")
    return found[name]


def describe(
    server: McpServer, only: Sequence[str], http: HttpSettings, *, on_stop: OnStop, timeout: timedelta
) -> list[ToolDescription]:
    """Return the tools of a server, or those of these names. Raises StepFailure, CancelledError."""

    async def listed(client: Client) -> list[ToolDescription]:
        found: list[ToolDescription] = []
        cursor: str | None = None
        for _ in range(_MAX_PAGES):
            page = await client.list_tools(cursor=cursor)
            found += [ToolDescription(t.name, t.description or t.title or "", t.input_schema) for t in page.tools]
            cursor = page.next_cursor
            if cursor is None or len(found) > _MAX_PAGES * MAX_TOOLS:
                break
        return found

    found = _in_session(server, http, listed, on_stop, timeout)
    missing = [name for name in only if all(tool.name != name for tool in found)]
    if missing:
        names = ", ".join(tool.name for tool in found[:MAX_TOOLS])
        raise _refused(f"the MCP server has no tool {missing[0]!r}; it has: {names}")
    return [tool for tool in found if not only or tool.name in only]


def call(
    server: McpServer,
    name: str,
    arguments: Mapping[str, Any],
    call_id: str,
    http: HttpSettings,
    *,
    on_stop: OnStop,
    timeout: timedelta,
) -> str:
    """Return the result of a tool as a text. Raises StepFailure, CancelledError."""

    async def called(client: Client) -> tuple[str, bool]:
        about: Any = {"arriero/call_id": call_id}
        result = await client.call_tool(name, dict(arguments), meta=about)
        parts = [part.text if part.type == "text" else f"[{part.type} content is left out]" for part in result.content]
        if not parts and result.structured_content is not None:
            parts = [json.dumps(result.structured_content, ensure_ascii=False)]
        return "\n".join(parts), bool(result.is_error)

    text, is_error = _in_session(server, http, called, on_stop, timeout)
    if is_error:
        raise _refused(text or f"the tool {name} failed without saying why")
    return text


def _in_session(
    server: McpServer, http: HttpSettings, act: Callable[[Client], Awaitable[T]], on_stop: OnStop, timeout: timedelta
) -> T:
    """Do something in a session with a server, within the time. Raises StepFailure, CancelledError."""
    if importlib.util.find_spec("mcp") is None:
        raise _refused("tools of MCP servers need the package `mcp`: install arriero[mcp]")
    from mcp import Client, StdioServerParameters
    from mcp.client.streamable_http import streamable_http_client

    stopped: list[bool] = []
    transport = _CheckedTransport(http, timeout, server.secrets)

    async def session() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def stop() -> None:
            stopped.append(True)
            loop.call_soon_threadsafe(task.cancel)

        on_stop(stop)
        async with asyncio.timeout(max(timeout.total_seconds(), 0.001)):
            if server.url is not None:
                async with (
                    httpx2.AsyncClient(transport=transport, headers=dict(server.headers)) as own,
                    Client(streamable_http_client(server.url, http_client=own)) as client,
                ):
                    return await act(client)
            assert server.command is not None, "it has either a command or an address"
            env, cwd = dict(server.env) or None, server.cwd
            command = StdioServerParameters(command=server.command, args=list(server.args), env=env, cwd=cwd)
            async with Client(command) as client:
                return await act(client)

    try:
        return asyncio.run(session())
    except asyncio.CancelledError:
        if stopped:
            raise CancelledError from None
        raise
    except TimeoutError:
        message = f"the MCP server did not answer within {timeout.total_seconds():g} s"
        raise StepFailure(FailureReason.TIMEOUT, message) from None
    except Exception as error:  # noqa: BLE001 the client raises groups of errors, and errors of many kinds
        found = _leaf(error)
        if stopped:
            raise CancelledError from None
        if transport.failure is not None:
            raise transport.failure from None
        _log.info("mcp_failed", error=repr(found))
        message = f"the MCP server cannot be used: {type(found).__name__}: {found}"
        raise StepFailure(FailureReason.HTTP_UNREACHABLE, message) from None
    finally:
        on_stop(lambda: None)


def _leaf(error: BaseException) -> BaseException:
    """The first error of a group of errors."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class _CheckedTransport(httpx2.AsyncBaseTransport):
    """
    Sends the requests of the client as `http` steps send theirs: to checked addresses only, bounded in size and time.

    An answer is read as a whole; a server may send it as events. A stream of the server's own messages is not opened.
    """

    def __init__(self, settings: HttpSettings, timeout: timedelta, secrets: tuple[str, ...]) -> None:
        self._settings, self._timeout, self._secrets = settings, timeout, secrets
        #: Why a request could not be sent: the client says less.
        self.failure: StepFailure | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.method != "POST":
            return httpx2.Response(405, request=request)
        content = await request.aread()
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _OWN_HEADERS}
        body = HttpBody(content, headers.pop("content-type", "application/json"))
        call = HttpCall(
            str(request.url),
            "POST",
            headers,
            body=body,
            expect=tuple(range(200, 600)),
            timeout=self._timeout,
            max_bytes=_MAX_ANSWER,
            secrets=self._secrets,
        )
        stops: list[Callable[[], None]] = []
        try:
            found = await asyncio.to_thread(outbound.call, call, settings=self._settings, on_stop=stops.append)
        except StepFailure as failure:
            self.failure = failure
            return httpx2.Response(502, request=request)
        except asyncio.CancelledError:
            for stop in stops:
                stop()
            raise
        kept = {name: value for name, value in found.headers.items() if name not in _OWN_HEADERS | {"content-encoding"}}
        text = found.body if isinstance(found.body, str) else "" if found.body is None else json.dumps(found.body)
        return httpx2.Response(found.status, headers=kept, content=text.encode(), request=request)


def _refused(message: str) -> StepFailure:
    return StepFailure(FailureReason.INVALID_REQUEST, message)
