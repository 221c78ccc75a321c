"""The MCP server, as the official client sees it. There are no workers: a task waits until it is cancelled."""

from __future__ import annotations

import json
from typing import Any

import anyio
import mcp_types as types
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator
from mcp.shared.exceptions import MCPError

from app.mcp_server.operations import recommendations
from app.mcp_server.server import TOOLS
from tests.mcp_server.conftest import Connect

pytestmark = pytest.mark.anyio

NAMES = {
    *("enhanced_text_generation", "enhanced_code_generation", "multimodal_analysis", "execute_automation_task"),
    *("execute_protocol_handoff", "manage_memory_reserves", "conversation_memory_management", "governance_status"),
    *("system_optimization", "performance_analytics", "collaboration_insights", "system_health_check"),
}
ASK = {
    "workflow": "ask",
    "description": "Answers a question.",
    "tool": True,
    "inputs": {"question": {"type": "string", "maxLength": 20}, "tone": {"type": "string", "default": "kind"}},
    "steps": [{"id": "a", "kind": "generate", "model": "smollm2:135m", "prompt": "{{ inputs.question }}"}],
}
#: Calls that only read, or start what then waits.
CALLS: dict[str, list[dict[str, Any]]] = {
    "enhanced_text_generation": [
        {"prompt": "Hi.", "model": "smollm2:135m", "wait_seconds": 0},
        {"prompt": "Hi. {{ steps.x }}", "model": "smollm2:135m", "wait_seconds": 0, "checks": ["size(output) < 9"]},
        {"prompt": "Hi.", "model": "smollm2:135m", "cooperation": "vote", "wait_seconds": 0},
        {
            "prompt": "Hi.",
            "model": "smollm2:135m",
            "cooperation": "review",
            "partners": ["gemma3:270m"],
            "wait_seconds": 0,
        },
        {"prompt": "JSON", "model": "smollm2:135m", "json_schema": {"type": "object"}, "seed": 1, "wait_seconds": 0},
    ],
    "enhanced_code_generation": [
        {"task": "add(a, b)", "model": "smollm2:135m", "tests": ["assert add(1, 2) == 3"], "wait_seconds": 0},
        {
            "task": "add(a, b)",
            "model": "smollm2:135m",
            "reviewer": "gemma3:270m",
            "write_tests": True,
            "wait_seconds": 0,
        },
        {"task": "add(a, b)", "model": "smollm2:135m", "review": False, "wait_seconds": 0},
    ],
    "execute_automation_task": [
        {"definition": ASK, "inputs": {"question": "Why?"}, "wait_seconds": 0},
        {"action": "list_workflows"},
        {"action": "list_tasks", "state": "queued"},
    ],
    "manage_memory_reserves": [
        {},
        {"action": "explain", "model": "smollm2:135m"},
        {"action": "load", "model": "smollm2:135m", "wait_seconds": 0},
        {"action": "unload", "model": "smollm2:135m"},
        {"action": "preview_defragment"},
        {"action": "defragment"},
    ],
    "conversation_memory_management": [
        {"action": "list"},
        {"action": "create", "title": "A talk", "user": "ana", "messages": [{"role": "user", "content": "Hi."}]},
        {"action": "search", "query": "parcel"},
        {"action": "recall", "query": "parcel", "user": "ana"},
        {"action": "remember", "text": "Ana prefers tea.", "kind": "preference", "user": "ana"},
        {"action": "memories", "user": "ana"},
        {"action": "find_memories", "query": "tea", "user": "ana"},
    ],
    "governance_status": [{}, {"include": ["rules", "firings", "alerts", "actions", "jobs", "signals"]}],
    "system_optimization": [
        {},
        {"action": "kinds"},
        {"action": "history"},
        {"action": "apply", "change": {"kind": "clean_up_memory"}, "dry_run": True},
    ],
    "performance_analytics": [{}, {"window": "24h", "by": "model", "signals": ["tokens"]}],
    "collaboration_insights": [{}],
    "system_health_check": [{}],
}
#: What is wrong with a call, and what its error names.
WRONG: list[tuple[str, dict[str, Any], list[str]]] = [
    ("no_such_tool", {}, ["no_such_tool", "enhanced_text_generation"]),
    ("workflow_nothing", {}, ["workflow_nothing", "is no tool"]),
    ("enhanced_text_generation", {}, ["prompt", "missing"]),
    ("enhanced_text_generation", {"prompt": 7}, ["prompt", "7"]),
    ("enhanced_text_generation", {"prompt": ""}, ["prompt"]),
    ("enhanced_text_generation", {"prompt": "x" * 400_001}, ["prompt", "400000"]),
    ("enhanced_text_generation", {"prompt": "x", "promt": "y"}, ["promt", "unknown", "prompt"]),
    ("enhanced_text_generation", {"prompt": "x", "max_tokens": True}, ["max_tokens"]),
    ("enhanced_text_generation", {"prompt": "x", "temperature": "NaN"}, ["temperature"]),
    ("enhanced_text_generation", {"prompt": "x", "model": "m:1"}, ["m:1", "smollm2:135m"]),
    ("enhanced_text_generation", {"prompt": "x", "cooperation": "review"}, ["partners"]),
    ("enhanced_text_generation", {"prompt": "x", "model": "smollm2:135m", "checks": ["1 +"]}, ["check"]),
    ("enhanced_code_generation", {"task": "x", "tests": ["a"], "write_tests": True}, ["write_tests"]),
    ("enhanced_code_generation", {"task": "x", "timeout_seconds": 1e9}, ["timeout_seconds"]),
    ("execute_automation_task", {}, ["workflow", "definition"]),
    ("execute_automation_task", {"workflow": "nothing"}, ["nothing"]),
    ("execute_automation_task", {"workflow": "../../etc/passwd"}, ["etc/passwd"]),
    ("execute_automation_task", {"action": "wait"}, ["task_id"]),
    ("execute_automation_task", {"action": "wait", "task_id": "no-id"}, ["task_id"]),
    ("execute_automation_task", {"action": "status", "task_id": "0" * 32}, ["run"]),
    ("execute_automation_task", {"definition": {"workflow": "w", "steps": []}}, ["steps"]),
    ("execute_automation_task", {"workflow": "w", "inputs": {"a": "x" * 1_000_001}}, ["inputs", "1000000"]),
    ("execute_protocol_handoff", {"handoff": "crm", "message": {}}, ["crm", "arriero handoffs list"]),
    ("execute_protocol_handoff", {"handoff": "crm"}, ["message", "missing"]),
    ("multimodal_analysis", {"prompt": "What?", "media": ["x"], "model": "smollm2:135m"}, ["no images", "gemma3:4b"]),
    ("multimodal_analysis", {"prompt": "What is it?", "media": []}, ["media"]),
    ("manage_memory_reserves", {"action": "load"}, ["model"]),
    ("manage_memory_reserves", {"action": "load", "model": "m:1"}, ["m:1"]),
    ("conversation_memory_management", {}, ["action", "missing"]),
    ("conversation_memory_management", {"action": "read"}, ["conversation_id"]),
    ("conversation_memory_management", {"action": "read", "conversation_id": "../v1/keys"}, ["keys"]),
    ("conversation_memory_management", {"action": "append", "conversation_id": "c"}, ["messages"]),
    ("governance_status", {"include": ["keys"]}, ["include"]),
    ("system_optimization", {"action": "apply"}, ["change"]),
    ("system_optimization", {"action": "apply", "change": {"kind": "format_disk"}}, ["format_disk"]),
    ("performance_analytics", {"signals": ["nothing"]}, ["nothing", "response_time"]),
    ("performance_analytics", {"window": "1y"}, ["window"]),
]


def text_of(result: types.CallToolResult) -> str:
    (content,) = result.content
    assert isinstance(content, types.TextContent)
    return content.text


async def test_all_tools_are_listed_with_valid_schemas(connected: Connect) -> None:
    async with connected() as client:
        listed = (await client.list_tools()).tools
        assert client.instructions is not None

    assert {tool.name for tool in listed} == NAMES == set(TOOLS)
    for tool in listed:
        assert tool.output_schema is not None
        for schema in (tool.input_schema, tool.output_schema):
            Draft202012Validator.check_schema(schema)
        assert tool.annotations is not None
        assert tool.description
    reading = {tool.name for tool in listed if tool.annotations and tool.annotations.read_only_hint}
    assert "conversation_memory_management" not in reading
    assert "governance_status" in reading


@pytest.mark.parametrize("name", CALLS)
async def test_every_tool_works(connected: Connect, name: str) -> None:
    """The client checks each structured result against the schema of the tool."""
    async with connected() as client:
        await client.list_tools()
        for arguments in CALLS[name]:
            result = await client.call_tool(name, arguments)
            assert not result.is_error, (arguments, text_of(result))
            assert result.structured_content == json.loads(text_of(result))


async def test_what_is_wrong_is_named(connected: Connect) -> None:
    async with connected() as client:
        for name, arguments, words in WRONG:
            result = await client.call_tool(name, arguments)
            assert result.is_error, (name, arguments)
            for word in words:
                assert word in text_of(result), (name, str(arguments)[:200], text_of(result)[:500])


async def test_a_task_is_resumed_and_cancelled_by_another_connection(connected: Connect) -> None:
    start = {"definition": ASK, "inputs": {"question": "Why?"}, "wait_seconds": 0, "idempotency_key": "once"}
    async with connected() as client:
        task = (await client.call_tool("execute_automation_task", start)).structured_content
        again = (await client.call_tool("execute_automation_task", start)).structured_content
    assert task is not None
    assert again is not None
    assert again["task_id"] == task["task_id"]
    assert task["state"] == "queued"
    assert task["task_id"] in task["next"]

    seen: list[tuple[float, float | None, str | None]] = []

    async def progress(done: float, total: float | None, message: str | None) -> None:
        seen.append((done, total, message))

    async with connected() as client:
        waited = await client.call_tool(
            "execute_automation_task",
            {"action": "wait", "task_id": task["task_id"], "wait_seconds": 0.2},
            progress_callback=progress,
        )
        cancelled = await client.call_tool("execute_automation_task", {"action": "cancel", "task_id": task["task_id"]})
    assert waited.structured_content is not None
    assert waited.structured_content["state"] == "queued"
    assert cancelled.structured_content is not None
    assert cancelled.structured_content["state"] in ("cancelling", "cancelled")
    assert seen
    assert seen[0][:2] == (0, 1)


async def test_the_end_of_a_call_cancels_the_task_that_it_started(connected: Connect, app: FastAPI) -> None:
    browser = TestClient(app, base_url="http://localhost", client=("127.0.0.1", 1))

    def states() -> list[str]:
        return [run["state"] for run in browser.get("/v1/runs").json()["runs"]]

    async with connected() as client, anyio.create_task_group() as group:
        start = {"definition": ASK, "inputs": {"question": "Why?"}, "wait_seconds": 600}
        group.start_soon(client.call_tool, "execute_automation_task", start)
        with anyio.fail_after(60):
            while await anyio.to_thread.run_sync(states) != ["queued"]:
                await anyio.sleep(0.02)
        group.cancel_scope.cancel()
    with anyio.fail_after(60):
        while await anyio.to_thread.run_sync(states) == ["queued"]:
            await anyio.sleep(0.02)


async def test_a_workflow_that_asks_for_it_is_a_tool(connected: Connect, app: FastAPI) -> None:
    browser = TestClient(app, base_url="http://localhost", client=("127.0.0.1", 1))
    assert browser.put("/v1/workflows/ask", json=ASK).status_code == 201
    assert browser.put("/v1/workflows/other", json={**ASK, "workflow": "other", "tool": False}).status_code == 201
    async with connected() as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == NAMES | {"workflow_ask"}
        tool = tools["workflow_ask"]
        assert tool.description == "Answers a question."
        assert tool.input_schema["required"] == ["question"]
        assert tool.input_schema["properties"]["question"] == {"type": "string", "maxLength": 20}
        done = await client.call_tool("workflow_ask", {"question": "Why?", "wait_seconds": 0})
        assert done.structured_content is not None
        assert done.structured_content["workflow"] == "ask"
        for wrong, word in (
            ({"question": "x" * 21}, "question"),
            ({}, "question"),
            ({"question": "x", "wait_seconds": "soon"}, "wait_seconds"),
            ({"question": "x", "colour": "red"}, "colour"),
        ):
            refused = await client.call_tool("workflow_ask", wrong)
            assert refused.is_error
            assert word in text_of(refused)


async def test_resources_and_prompts(connected: Connect) -> None:
    async with connected() as client:
        started = await client.call_tool(
            "execute_automation_task", {"definition": ASK, "inputs": {"question": "Why?"}, "wait_seconds": 0}
        )
        assert started.structured_content is not None
        task = started.structured_content["task_id"]
        listed = {resource.uri for resource in (await client.list_resources()).resources}
        assert {f"arriero://runs/{task}", "arriero://models/smollm2%3A135m", "arriero://models"} <= listed
        for uri in sorted(listed):
            (content,) = (await client.read_resource(uri)).contents
            assert isinstance(content, types.TextResourceContents)
            assert json.loads(content.text)
        assert (await client.list_resource_templates()).resource_templates
        for uri in ("arriero://keys", "file:///etc/passwd", "arriero://runs/..%2Fkeys", "arriero://models/x/output"):
            with pytest.raises(MCPError):
                await client.read_resource(uri)

        assert {prompt.name for prompt in (await client.list_prompts()).prompts} == {
            *("explain_run", "make_room_for_model", "write_workflow")
        }
        for name, arguments in (
            ("explain_run", {"task_id": task}),
            ("make_room_for_model", {"model": "smollm2:135m"}),
            ("write_workflow", {"goal": "Sort messages."}),
        ):
            (message,) = (await client.get_prompt(name, arguments)).messages
            assert isinstance(message.content, types.TextContent)
            assert len(message.content.text) > 200
        for name, wrong in (("explain_run", {}), ("nothing", {}), ("explain_run", {"task_id": "../keys"})):
            with pytest.raises(MCPError):
                await client.get_prompt(name, wrong)


def test_recommendations_follow_from_what_is_measured() -> None:
    calm = {"thrash_rate": 0.0, "memory_utilisation": 0.5, "error_rate": None, "queue_wait": 1.0}
    assert recommendations(calm, {"moves": []}, {"refusals": []}) == []
    busy = {"thrash_rate": 0.5, "memory_utilisation": 0.9, "error_rate": 0.2, "queue_wait": 9.0}
    fleet = {"refusals": [{"model": "m:1", "reason": "no room"}]}
    found = recommendations(busy, {"moves": [{}]}, fleet)
    assert len(found) == 6
    assert all(one["tool"] in TOOLS for one in found)
