"""An MCP server for the tests, over its standard input and output."""

from __future__ import annotations

import anyio
from mcp.server import MCPServer

server = MCPServer("tests")


@server.tool()
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


@server.tool()
async def wait(seconds: float) -> str:
    """Waits."""
    await anyio.sleep(seconds)
    return "done"


@server.tool()
def refuse() -> str:
    """Refuses."""
    raise ValueError("no")


if __name__ == "__main__":
    server.run()
