"""Flower beside `arriero up`: the states of its tasks are the outcomes of steps, and nothing hides them."""

from __future__ import annotations

import ast
from typing import Any

import httpx2
import pytest

from tests.live.conftest import MODEL, Live, generate, until

QUERY = {
    "draw": 1,
    "start": 0,
    "length": 10_000,
    "order[0][column]": 0,
    "order[0][dir]": "asc",
    "columns[0][data]": "name",
}


def tasks(live: Live) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx2.get(
        f"{live.flower}/tasks/datatable",
        params=QUERY,
        timeout=60,  # the first request starts it
    ).json()["data"]
    return found


def of_run(live: Live, run_id: str) -> dict[str, dict[str, Any]]:
    """The tasks of a run by step and attempt."""
    found = [(ast.literal_eval(task["kwargs"]), task) for task in tasks(live) if task["kwargs"]]
    return {f"{about['step']} {about['attempt']}": task for about, task in found if about["run"] == run_id}


@pytest.fixture(scope="module")
def watched(live: Live) -> Live:
    """The running tree, once its workers send events: Flower asks for them every few seconds."""
    noop = {"workflow": "probe", "steps": [{"id": "a", "kind": "noop"}]}
    until(lambda: of_run(live, live.until_ended(live.submit(noop))["id"]))
    until(lambda: of_run(live, live.until_ended(live.submit(generate("Hi", max_tokens=1)))["id"]))
    return live


def ended_tasks(live: Live, run_id: str, count: int) -> dict[str, dict[str, Any]]:
    """The tasks of a run, once so many of them have an outcome."""

    def ended() -> dict[str, dict[str, Any]] | None:
        found = of_run(live, run_id)
        done = [task for task in found.values() if task["state"] not in ("RECEIVED", "STARTED")]
        return found if len(done) >= count else None

    found: dict[str, dict[str, Any]] = until(ended)
    return found


def test_a_step_that_succeeds_names_workflow_run_attempt_and_model(watched: Live) -> None:
    run_id = watched.submit(generate("{{ inputs.text }}", max_tokens=3), text="a secret of the user")
    (task,) = ended_tasks(watched, run_id, 1).values()

    assert (task["name"], task["state"]) == ("ask/ask", "SUCCESS")
    assert ast.literal_eval(task["kwargs"]) == {"run": run_id, "step": "ask", "attempt": 1, "model": MODEL}
    assert task["result"].endswith("tokens read, 3 written")
    assert "secret" not in str(task)


def test_every_step_of_a_chain_and_every_item_is_a_task_of_its_own(watched: Live) -> None:
    """A worker goes on with short steps without a message; the last one fails."""
    run_id = watched.submit(
        {
            "workflow": "chain",
            "steps": [
                {"id": "first", "kind": "noop"},
                {"id": "each", "kind": "map", "needs": ["first"], "over": "[1, 2]", "step": {"kind": "noop"}},
                {"id": "last", "kind": "transform", "needs": ["each"], "cel": "[1][5]"},
            ],
        }
    )
    found = ended_tasks(watched, run_id, 5)

    assert {key: (task["name"], task["state"]) for key, task in found.items()} == {
        "first 1": ("chain/first", "SUCCESS"),
        "each 1": ("chain/each", "SUCCESS"),
        "each[0] 1": ("chain/each", "SUCCESS"),
        "each[1] 1": ("chain/each", "SUCCESS"),
        "last 1": ("chain/last", "FAILURE"),
    }
    assert found["each 1"]["result"] == "awaiting (expanded)"
    assert found["last 1"]["exception"].startswith("template_error: ")


def test_an_attempt_that_is_repeated_is_a_retry_with_its_reason(watched: Live) -> None:
    """One token is no JSON object; the last attempt fails for good."""
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    run_id = watched.submit(
        generate("A number", max_tokens=1, output={"schema": schema}, retry={"max_attempts": 2, "delay": "0s"})
    )
    found = ended_tasks(watched, run_id, 2)

    assert {key: task["state"] for key, task in found.items()} == {"ask 1": "RETRY", "ask 2": "FAILURE"}
    assert all(task["exception"].startswith("invalid_output: ") for task in found.values())
    assert [found[key]["retries"] for key in ("ask 1", "ask 2")] == [0, 1]


def test_a_cancelled_step_is_revoked(watched: Live) -> None:
    long = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 600}
    run_id = watched.submit(generate("Many numbers", max_tokens=1900, output={"schema": long}))
    until(lambda: any(task["state"] == "STARTED" for task in of_run(watched, run_id).values()))
    httpx2.post(f"{watched.api}/v1/runs/{run_id}/cancel", timeout=30).raise_for_status()
    (task,) = ended_tasks(watched, run_id, 1).values()

    assert task["state"] == "REVOKED"
    assert task["exception"].startswith("cancelled: ")


def test_scheduled_jobs_send_no_events(watched: Live) -> None:
    """They run several times a second, and would push the steps out of what Flower keeps."""
    run_id = watched.submit(generate("Hi", max_tokens=1))
    ended_tasks(watched, run_id, 1)

    names = {task["name"] for task in tasks(watched)}
    assert "ask/ask" in names
    # Other tests use the same installation; names of steps are `WORKFLOW/STEP`, those of jobs are import paths.
    assert [name for name in names if "/" not in name or name.startswith("workers.")] == []
