"""
Long work: a task is a run, and its id is that of the run.

A call starts a run and waits for its end, as long as its caller wants to, telling how far it is. What was not done by
then goes on; a later call, from another connection too, waits for it again. A call that is cancelled while it waits
for the run that it started cancels the run.
"""

from __future__ import annotations

from typing import Any

import anyio

from app.mcp_server.api import Api, Refused
from app.mcp_server.tool import ReportProgress, object_of
from app.workflows.state_machine.states import RunState

#: The states in which a run has ended.
ENDED = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED})
#: Seconds between two looks at a run: the first, and the most.
_FIRST_PAUSE, _MOST_PAUSE = 0.1, 2.0
#: Most steps that a task shows.
_MAX_STEPS = 200
#: How long the cancellation of a run may take when its caller has gone.
_CANCEL_SECONDS = 5.0

#: The JSON Schema of a task.
TASK: dict[str, Any] = object_of(
    task_id={"type": "string", "description": "resume, inspect or cancel it with execute_automation_task"},
    state={"type": "string", "enum": [str(state) for state in RunState]},
    workflow={"type": "string"},
    output={"description": "null until it has succeeded"},
    error={"description": "why it failed; null otherwise"},
    steps={"type": "array", "items": {"type": "object"}},
    tokens={"type": "object"},
    next={"type": "string", "description": "what to do now, when it has not succeeded"},
) | {"required": ["task_id", "state"]}


async def start(
    api: Api, submission: dict[str, Any], seconds: float, progress: ReportProgress, key: str | None = None
) -> dict[str, Any]:
    """Submit a run and wait up to so many seconds for its end. Returns the task. Raises Refused."""
    run_id = str((await api.submit(submission, key))["id"])
    try:
        return await follow(api, run_id, seconds, progress)
    except anyio.get_cancelled_exc_class():
        with anyio.move_on_after(_CANCEL_SECONDS, shield=True):
            await _cancel_quietly(api, run_id)
        raise


async def follow(api: Api, run_id: str, seconds: float, progress: ReportProgress) -> dict[str, Any]:
    """Wait up to so many seconds for the end of a run. Returns the task. Raises Refused."""
    pause, told = _FIRST_PAUSE, -1
    until = anyio.current_time() + seconds
    while True:
        run = await api.get(f"/v1/runs/{run_id}")
        steps = run["steps"]
        done = sum(step["finished_at"] is not None for step in steps)
        if done > told:
            told = done
            at = next((step["key"] for step in steps if step["state"] == "running"), "")
            await progress(
                done, len(steps), f"{run['state']}: {done} of {len(steps)} steps" + (f", now {at}" if at else "")
            )
        left = until - anyio.current_time()
        if run["state"] in ENDED or left <= 0:
            return task(run)
        await anyio.sleep(min(pause, left))
        pause = min(pause * 1.5, _MOST_PAUSE)


async def output_of(api: Api, found: dict[str, Any]) -> Any:
    """Return the output of a task that has succeeded, also a long one. Raises Refused for one that has failed."""
    if found["state"] in ("failed", "cancelled"):
        raise Refused(f"task {found['task_id']} {found['state']}: {found['error'] or 'no reason was recorded'}")
    output = found["output"]
    if isinstance(output, dict) and "$payload" in output:
        return await api.get(f"/v1/runs/{found['task_id']}/output")
    return output


def task(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run as a task."""
    state, run_id = str(run["state"]), str(run["id"])
    steps = run["steps"] if isinstance(run["steps"], list) else []  # lists of runs have their number only
    error = run.get("error") or None
    found = {
        "task_id": run_id,
        "state": state,
        "workflow": run["workflow"],
        "output": run.get("output"),
        "error": error.get("message") if isinstance(error, dict) else error,
        "steps": [
            {"id": step["key"], "kind": step["kind"], "state": step["state"]}
            | ({"error": step["error"].get("message")} if isinstance(step.get("error"), dict) else {})
            for step in steps[:_MAX_STEPS]
        ],
        "tokens": {"in": run.get("tokens_in"), "out": run.get("tokens_out")},
    }
    if state not in ENDED:
        found["next"] = f"call execute_automation_task with action 'wait' (or 'cancel') and task_id '{run_id}'"
    elif state != "succeeded":
        found["next"] = f"read arriero://runs/{run_id}, then 'retry' repeats only what did not succeed"
    return found


async def _cancel_quietly(api: Api, run_id: str) -> None:
    try:
        await api.post(f"/v1/runs/{run_id}/cancel")
    except Refused:
        return  # it has ended, or nobody answers: then its deadline ends it
