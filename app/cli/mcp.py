"""`arriero mcp`: the MCP server over standard input and output, for clients that start it as a program."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import anyio
import httpx2
import typer

from app.cli.client import key_of, url_of
from app.cli.output import settings_of
from app.kernel.errors import InvalidInput, Problem
from app.kernel.security.tls import verification
from app.kernel.settings import Settings
from app.mcp_server.api import Api

#: Seconds until an answer of the API.
_TIMEOUT = 120.0


def mcp(context: typer.Context) -> None:
    """
    Serve one MCP client over standard input and output, until it closes them.

    Tools, resources and prompts are those of http://HOST:PORT/mcp. They call the API at api.url (or that of the
    `arriero up` of the data directory) with the key api.key. Clients start this program themselves:
    {"command": "arriero", "args": ["mcp"]}.
    """
    if find_spec("mcp") is None:
        problem = Problem("", "the package mcp is not installed", "pip install 'arriero[mcp]'")
        raise InvalidInput([problem], "installation")
    if sys.stdin.isatty():
        typer.echo("waiting for an MCP client on standard input; Ctrl-C ends this", err=True)
    anyio.run(_serve, settings_of(context))


async def _serve(settings: Settings) -> None:
    from mcp.server.stdio import stdio_server

    from app.mcp_server.server import serve

    def connected() -> Api:
        # Where the API is, is looked up for each call: `arriero up` may be started, or restarted, later.
        url = url_of(settings)
        key = key_of(settings, url)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        trusted = verification(url, settings.api)
        http = httpx2.AsyncClient(base_url=url, headers=headers, timeout=_TIMEOUT, trust_env=False, verify=trusted)
        return Api(http)

    server = serve(lambda _: connected())
    async with stdio_server() as (reading, writing):
        await server.run(reading, writing, server.create_initialization_options())
