"""MCP clients of a running installation, with a real model: over HTTP, and over the pipes of `arriero mcp`."""

from __future__ import annotations

import sys
from typing import Any

import anyio
import pytest
from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters

from tests.live.conftest import MODEL, ROOT, Live

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

#: It waits for an event, so it is there when its client has gone.
WAITING = {
    "workflow": "waiting",
    "steps": [
        {"id": "go", "kind": "wait", "event": "go"},
        {"id": "write", "kind": "generate", "needs": ["go"], "model": MODEL, "prompt": "Hi.", "max_tokens": 3},
    ],
}
TEXT = {"prompt": "Repeat: A B C D E F G H", "model": MODEL, "max_tokens": 12, "temperature": 0, "wait_seconds": 300}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_models_write_and_tasks_survive_their_connection(live: Live) -> None:
    over_pipes = StdioServerParameters(
        command=sys.executable, args=["-m", "app", "--set", f"api.url={live.api}", "mcp"], cwd=ROOT
    )
    steps: list[float] = []

    async def progress(done: float, total: float | None, message: str | None) -> None:
        assert total == 2
        assert message
        steps.append(done)

    texts = []
    with anyio.fail_after(600):
        async with Client(f"{live.api}/mcp") as client:
            texts.append(await _text(client))
            started = await client.call_tool("execute_automation_task", {"definition": WAITING, "wait_seconds": 0})
            assert started.structured_content is not None
            task = {"task_id": started.structured_content["task_id"]}
        async with Client(over_pipes) as client:
            texts.append(await _text(client))
            await client.call_tool("execute_automation_task", {"action": "send_event", "event": "go", **task})
            ended = await client.call_tool(
                "execute_automation_task", {"action": "wait", "wait_seconds": 300, **task}, progress_callback=progress
            )
            code = await client.call_tool(
                "enhanced_code_generation",
                {
                    "task": "add(a, b)",
                    "model": MODEL,
                    "tests": ["assert add(1, 2) == 3"],
                    "rounds": 1,
                    "max_tokens": 40,
                },
            )
    assert texts[0] == texts[1] != ""
    assert ended.structured_content is not None
    assert ended.structured_content["state"] == "succeeded"
    assert steps == sorted(steps)
    assert steps[-1] == 2
    assert code.structured_content is not None, code
    assert code.structured_content["verification"] in ("passed", "failed")
    assert code.structured_content["review"]


async def _text(client: Client) -> Any:
    result = await client.call_tool("enhanced_text_generation", TEXT)
    assert result.structured_content is not None, result
    return result.structured_content["text"]
