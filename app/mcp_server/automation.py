"""The tools that run workflows and hand-offs, and follow what runs."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal
from urllib.parse import quote
from uuid import UUID

import anyio
from pydantic import Field, model_validator

from app.mcp_server import tasks
from app.mcp_server.api import Refused
from app.mcp_server.tool import McpCall, NameText, ServedTool, ToolArguments, WaitSeconds, object_of

_MAX_JSON = 1_000_000
#: Seconds between two looks at a message.
_PAUSE = 0.3


class AutomationArguments(ToolArguments):
    """What to do with which workflow or task."""

    action: Literal["start", "wait", "status", "cancel", "retry", "send_event", "list_workflows", "list_tasks"] = Field(
        default="start",
        description="wait: until the task ends, or for wait_seconds; retry: repeats what did not succeed; "
        "send_event: answers a step that waits, such as an approval",
    )
    workflow: NameText | None = Field(default=None, description="with start: the name of a stored workflow")
    definition: dict[str, Any] | None = Field(default=None, description="with start: a workflow, instead of a name")
    version: int | None = Field(default=None, ge=0, le=2**31 - 1, description="with start: by default the newest")
    inputs: dict[str, Any] = Field(default={}, description="with start: the inputs of the workflow")
    priority: Literal["interactive", "standard", "batch"] | None = None
    labels: dict[str, Annotated[str, Field(max_length=200)]] = Field(default={}, max_length=32)
    idempotency_key: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        default=None, description="with start: the same key never starts a second task"
    )
    task_id: UUID | None = Field(default=None, description="the task, of an earlier call or connection too")
    event: NameText | None = Field(default=None, description="with send_event: its name")
    payload: Any = Field(default=None, description="with send_event")
    state: NameText | None = Field(default=None, description="with list_tasks: only those")
    limit: int = Field(default=20, ge=1, le=100, description="of lists")
    wait_seconds: WaitSeconds = Field(default=60, description="with start, wait and retry")

    @model_validator(mode="after")
    def _is_consistent(self) -> AutomationArguments:
        if self.action == "start" and (self.workflow is None) == (self.definition is None):
            raise ValueError("action 'start' needs exactly one of 'workflow' and 'definition'")
        if self.action in ("wait", "status", "cancel", "retry", "send_event") and self.task_id is None:
            raise ValueError(f"action {self.action!r} needs 'task_id'")
        if self.action == "send_event" and self.event is None:
            raise ValueError("action 'send_event' needs 'event'")
        if len(json.dumps([self.inputs, self.definition, self.payload])) > _MAX_JSON:
            raise ValueError(f"'inputs', 'definition' and 'payload' have more than {_MAX_JSON} characters")
        return self


async def automate(call: McpCall[AutomationArguments]) -> dict[str, Any]:
    """Start a workflow, or look after a task."""
    asked, api, path = call.arguments, call.api, f"/v1/runs/{call.arguments.task_id}"
    match asked.action:
        case "start":
            body = {
                name: value
                for name, value in asked.model_dump(
                    include={"workflow", "definition", "version", "inputs", "priority", "labels"}
                ).items()
                if value not in (None, {})
            }
            return await tasks.start(api, body, asked.wait_seconds, call.progress, asked.idempotency_key)
        case "wait":
            return await tasks.follow(api, str(asked.task_id), asked.wait_seconds, call.progress)
        case "retry":
            await api.post(f"{path}/retry")
            return await tasks.follow(api, str(asked.task_id), asked.wait_seconds, call.progress)
        case "cancel":
            await api.post(f"{path}/cancel")
        case "send_event":
            await api.post(f"{path}/events", {"name": asked.event, "payload": asked.payload})
        case "list_workflows":
            found = (await api.get("/v1/workflows"))["workflows"]
            kept = ("name", "version", "description", "inputs", "models", "steps")
            return {"workflows": [{key: one[key] for key in kept} for one in found[: asked.limit]], "total": len(found)}
        case "list_tasks":
            found = await api.get("/v1/runs", limit=asked.limit, state=asked.state, workflow=asked.workflow)
            return {"tasks": [tasks.task(run) for run in found["runs"]], "more": found.get("next_cursor") is not None}
    return tasks.task(await api.get(path))


class HandoffArguments(ToolArguments):
    """A message, and the hand-off that takes it."""

    handoff: NameText = Field(description="the name of a stored hand-off")
    message: dict[str, Any] = Field(description="what is handed on; it must conform to the hand-off's schema")
    key: Annotated[str, Field(min_length=1, max_length=255)] | None = Field(
        default=None, description="the same key is delivered once, however often it is sent"
    )
    wait_seconds: WaitSeconds = Field(default=60, description="for the target to have it")

    @model_validator(mode="after")
    def _is_bounded(self) -> HandoffArguments:
        if len(json.dumps(self.message)) > _MAX_JSON:
            raise ValueError(f"'message' has more than {_MAX_JSON} characters")
        return self


async def hand_on(call: McpCall[HandoffArguments]) -> dict[str, Any]:
    """Give a message to a hand-off."""
    asked = call.arguments
    path = f"/v1/handoffs/{quote(asked.handoff, safe='')}/messages"
    try:
        accepted = await call.api.submit(asked.message, asked.key, path)
        until = anyio.current_time() + asked.wait_seconds
        while True:
            found = await call.api.get(f"{path}/{accepted['id']}")
            if found["state"] not in ("received", "delivering") or anyio.current_time() >= until:
                return {"duplicate": accepted["duplicate"], "message": found}
            await anyio.sleep(_PAUSE)
    except Refused as refused:
        if refused.status != 404:
            raise
        raise Refused(
            f"there is no hand-off {asked.handoff!r}; `arriero handoffs list` shows those that are stored"
        ) from None


TOOLS: tuple[ServedTool[Any], ...] = (
    ServedTool(
        "execute_automation_task",
        "Run a workflow",
        "Starts a workflow as a durable task and follows it. Returns a task_id at once or when the task has ended; the "
        "task survives this connection: action 'wait' resumes, 'cancel' ends it, 'retry' repeats what failed. "
        "'list_workflows' shows what can be started, with its inputs.",
        AutomationArguments,
        object_of(
            **tasks.TASK["properties"],
            workflows={"type": "array", "items": {"type": "object"}},
            tasks={"type": "array", "items": {"type": "object"}},
        ),
        automate,
    ),
    ServedTool(
        "execute_protocol_handoff",
        "Hand a message on",
        "Gives a message to a stored hand-off, which validates, de-duplicates and transforms it and delivers it in "
        "another protocol (an HTTP API, a CRM, a workflow). Returns its record.",
        HandoffArguments,
        object_of(message={"type": "object"}),
        hand_on,
    ),
)
