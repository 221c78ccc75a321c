"""Tools of agents where they are: Python programs, MCP servers, and what is offered to the model."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from app.kernel.errors import FailureReason, StepFailure
from app.kernel.sections.http import HttpSettings
from app.workflows.language import check
from app.workflows.language.agent import AgentFields
from tests.workers.tool_loop.mcp_server import server
from workers.tool_loop import mcp_tools, python_tools, tools
from workers.tool_loop.mcp_tools import McpServer
from workers.tool_loop.tools import ToolDescription

MINUTE = timedelta(minutes=1)


def never(_: Callable[[], None]) -> None:
    """Nothing stops the work."""


@pytest.fixture
def entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "house.py").write_text(
        "import os, time\n"
        "def double(n: int) -> dict[str, object]:\n"
        '    """Doubles a number."""\n'
        "    print('noise')\n"
        "    return {'twice': 2 * n, 'id': os.environ['ARRIERO_CALL_ID']}\n"
        "def fail() -> None: raise KeyError('x')\n"
        "def rest(seconds: float) -> None: time.sleep(seconds)\n"
    )
    about = tmp_path / "house-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: house\nVersion: 1.0\n")
    names = "".join(f"{name} = house:{name}\n" for name in ("double", "fail", "rest"))
    (about / "entry_points.txt").write_text(f"[arriero.tools]\n{names}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")


@pytest.mark.usefixtures("entry_points")
def test_a_python_tool_is_described_and_called_in_a_process_of_its_own() -> None:
    described = python_tools.describe("double", on_stop=never)
    assert (described.name, described.description) == ("double", "Doubles a number.")
    assert described.parameters["properties"]["n"]["type"] == "integer"

    result = python_tools.call("double", {"n": 4}, "run/agent[1]", on_stop=never, timeout=MINUTE)
    assert json.loads(result) == {"twice": 8, "id": "run/agent[1]"}
    with pytest.raises(StepFailure, match="KeyError") as raised:
        python_tools.call("fail", {}, "", on_stop=never, timeout=MINUTE)
    assert raised.value.reason is FailureReason.INTERNAL
    with pytest.raises(StepFailure, match=r"there are: double, fail, .*rest") as missing:
        python_tools.describe("triple", on_stop=never)
    assert missing.value.reason is FailureReason.INVALID_REQUEST


@pytest.mark.usefixtures("entry_points")
def test_a_python_tool_ends_at_its_time_limit_and_by_a_cancel() -> None:
    with pytest.raises(StepFailure, match="did not end within") as late:
        python_tools.call("rest", {"seconds": 600}, "", on_stop=never, timeout=timedelta(milliseconds=20))
    assert late.value.reason is FailureReason.TIMEOUT
    with pytest.raises(CancelledError):
        python_tools.call("rest", {"seconds": 600}, "", on_stop=lambda stop: stop(), timeout=MINUTE)


def stdio(tmp_path: Path) -> McpServer:
    path = tmp_path / "mcp.json"
    program = str(Path(__file__).with_name("mcp_server.py"))
    path.write_text(json.dumps({"mcpServers": {"tests": {"command": sys.executable, "args": [program]}}}))
    return mcp_tools.server_of(path, "tests")


def test_the_operator_s_mcp_server_is_a_program(tmp_path: Path) -> None:
    found = mcp_tools.describe(stdio(tmp_path), ("add",), HttpSettings(), on_stop=never, timeout=MINUTE)
    assert [(tool.name, tool.description) for tool in found] == [("add", "Adds two numbers.")]
    assert found[0].parameters["required"] == ["a", "b"]

    with pytest.raises(StepFailure, match="there are: tests"):
        mcp_tools.server_of(tmp_path / "mcp.json", "other")


@pytest.fixture(scope="module")
def mcp_url() -> Iterator[str]:
    listening = socket.create_server(("127.0.0.1", 0))
    program = uvicorn.Server(uvicorn.Config(server.streamable_http_app(), log_config=None, lifespan="on"))
    thread = threading.Thread(target=lambda: program.run([listening]))
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/mcp"
    program.should_exit = True
    thread.join()


def test_an_mcp_server_at_an_address_is_called_under_the_rules_of_http_steps(mcp_url: str) -> None:
    allowed = HttpSettings(allowed_hosts=(mcp_url.split("/")[2],), allow_private=True)
    at = McpServer(url=mcp_url)
    found = mcp_tools.describe(at, (), allowed, on_stop=never, timeout=MINUTE)
    assert [tool.name for tool in found] == ["add", "wait", "refuse"]

    assert mcp_tools.call(at, "add", {"a": 1, "b": 2}, "id", allowed, on_stop=never, timeout=MINUTE) == "3"
    with pytest.raises(StepFailure, match="refuse") as refused:
        mcp_tools.call(at, "refuse", {}, "id", allowed, on_stop=never, timeout=MINUTE)
    assert refused.value.reason is FailureReason.INVALID_REQUEST
    with pytest.raises(StepFailure) as forbidden:
        mcp_tools.call(at, "add", {"a": 1, "b": 2}, "id", HttpSettings(), on_stop=never, timeout=MINUTE)
    assert forbidden.value.reason is FailureReason.HTTP_REFUSED


def test_a_cancel_ends_a_call_of_an_mcp_server(mcp_url: str) -> None:
    allowed = HttpSettings(allowed_hosts=(mcp_url.split("/")[2],), allow_private=True)
    began = time.monotonic()
    with pytest.raises(CancelledError):
        mcp_tools.call(
            McpServer(url=mcp_url),
            "wait",
            {"seconds": 30},
            "",
            allowed,
            on_stop=lambda stop: threading.Timer(0.2, stop).start(),
            timeout=MINUTE,
        )
    assert time.monotonic() - began < 25


def agent(**more: Any) -> AgentFields:
    tool = {"name": "look", "description": "Looks", "http": {"url": "https://a.example"}}
    given = {"kind": "agent", "model": "smollm2:135m", "prompt": "?", "tools": [tool]}
    return AgentFields.model_validate(given | more)


def test_what_a_grammar_cannot_enforce_is_checked_after_the_call() -> None:
    schema = {"type": "object", "properties": {"n": {"not": {"type": "string"}}}}
    found, warnings = tools.offered(
        agent(tools=[{"python": "p"}]), {"python": lambda _: [ToolDescription("p", "", schema)]}
    )

    assert found[0].enforced == {"type": "object", "properties": {"n": {}}, "required": []}
    assert "p are checked after" in warnings[0]
    assert "arguments.n" in tools.argument_problems(found[0], {"n": "x"})
    assert tools.argument_problems(found[0], {"n": 1}) == ""


def test_names_of_tools_are_unique_and_can_be_written() -> None:
    twice = {"mcp": lambda _: [ToolDescription("a", "", {"type": "object"})] * 2}
    with pytest.raises(StepFailure, match="two tools have the name 'a'"):
        tools.offered(agent(tools=[{"mcp": {"server": "s"}}]), twice)
    strange = {"mcp": lambda _: [ToolDescription("a b", "", {"type": "object"})]}
    with pytest.raises(StepFailure, match="is not a name of a tool"):
        tools.offered(agent(tools=[{"mcp": {"server": "s"}}]), strange)


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ("{name: a, description: b}", "exactly one of http, workflow, python, mcp, memory"),
        ("{http: {url: 'https://a.example'}}", "needs a 'name' and a 'description'"),
        ("{mcp: {command: rm}}", "unknown field"),
        ("{mcp: {server: a, url: 'https://a.example'}}", "either 'server'"),
        ("{name: a, description: b, http: {url: 'https://a.example/{{ argument.x }}'}}", "argument"),
        ("{name: a, description: b, parameters: {type: array}, http: {url: 'https://a.example'}}", "not an object"),
        ("{workflow: w, parameters: {type: object}}", "has a schema of its own"),
    ],
)
def test_tools_are_checked_at_submission(tool: str, message: str) -> None:
    flow = f"workflow: w\nsteps: [{{id: a, kind: agent, model: smollm2:135m, prompt: hi, tools: [{tool}]}}]"
    with pytest.raises(Exception, match=message):
        check.parse(flow)
