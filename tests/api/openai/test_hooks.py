"""Hooks on the whole road: chats, streams, steps, lines of batches, and what is recorded of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import text

from app.kernel.sections.hooks import HookDefinition
from app.kernel.settings import Settings
from app.workflows.language import check
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from tests.api.openai.conftest import MODEL, StartPool
from tests.workers.hooks.conftest import installed  # noqa: F401 a fixture
from workers import steps

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("installed")]

PATIENCE = 60
PROMPT = "Write to a@b.co, card 4111 1111 1111 1111"


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    """`echo` answers what the model was given; requests of the namespace of refusals are refused."""
    hooks = (
        HookDefinition(name="pii", kind="pii", order=1),
        HookDefinition(name="echo", kind="python", entry_point="echo", order=2, timeout="20s"),
        HookDefinition(name="no-damn", kind="words", at="pre_prompt", options={"action": "refuse"}),
        HookDefinition(name="late", kind="python", entry_point="hang", timeout="300ms", workflows=("late-*",)),
        HookDefinition(name="elsewhere", kind="python", entry_point="die", models=("other*",)),
    )
    return Settings(data_dir=tmp_path, database_url=database_url, redis_url=redis_url, hooks=hooks)


def post(api: str, prompt: str = PROMPT, **more: Any) -> httpx2.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_tokens": 8, **more}
    return httpx2.post(f"{api}/v1/chat/completions", json=body, timeout=PATIENCE)


def recorded(api: str, run: str, wait_for: Callable[..., Any]) -> Any:
    def ended() -> Any:
        found = httpx2.get(f"{api}/v1/runs/{run}", timeout=PATIENCE)
        document = found.json() if found.status_code == 200 else {"state": "absent"}
        return document if document["state"] in ("succeeded", "failed") else None

    return wait_for(ended)


@pytest.fixture
def wait_for() -> Callable[..., Any]:
    import time

    def wait(found: Callable[[], Any]) -> Any:
        until = time.monotonic() + PATIENCE
        while (value := found()) is None:
            assert time.monotonic() < until
            time.sleep(0.02)
        return value

    return wait


def test_a_chat_is_masked_for_the_model_and_restored_for_the_client(
    api: str, start_pool: StartPool, wait_for: Callable[..., Any]
) -> None:
    pool = start_pool()
    answer = post(api, temperature=0)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == f"You wrote: {PROMPT}"
    assert answer.headers["X-Arriero-Cache"] == "bypass", "a kept answer would pass no hook"
    run = recorded(api, answer.headers["X-Arriero-Run"], wait_for)
    hooks = run["steps"][0]["attempts"][0]["hooks"]
    assert [(one["hook"], one["at"], one["result"]) for one in hooks] == [
        ("no-damn", "pre_prompt", "passed"),
        ("pii", "pre_prompt", "changed"),
        ("echo", "pre_prompt", "passed"),
        ("echo", "post_result", "changed"),
        ("pii", "post_result", "changed"),
    ]
    assert hooks[1]["annotations"] == {"masked_card": 1, "masked_email": 1}
    assert "a@b.co" not in json.dumps(hooks)
    calls, _ = pool.runtime.figures.hooks.totals()
    assert calls["pii", "pre_prompt", "changed"] == 1


def test_a_stream_is_held_back_until_the_text_is_known(api: str, start_pool: StartPool) -> None:
    start_pool()
    body = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8, "stream": True}
    said = ""
    with httpx2.stream("POST", f"{api}/v1/chat/completions", json=body, timeout=PATIENCE) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    said += choice["delta"].get("content") or ""
    assert said == f"You wrote: {PROMPT}"


def test_a_refused_request_says_so_and_is_recorded(
    api: str, start_pool: StartPool, wait_for: Callable[..., Any], runs: Runs
) -> None:
    start_pool()
    answer = post(api, "damn")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "hook_refused")
    assert "no-damn" in answer.json()["error"]["message"]
    with runs.database.work() as work:
        (row,) = work.rows(text("SELECT id FROM run"), {})
    run = recorded(api, str(row.id), wait_for)
    assert run["state"] == "failed"
    assert run["steps"][0]["attempts"][0]["outcome"] == "hook_refused"
    assert run["steps"][0]["attempts"][0]["hooks"][0]["result"] == "refused"


def test_steps_of_workflows_pass_the_same_hooks(start_pool: StartPool, runs: Runs) -> None:
    runtime = start_pool().runtime

    def run(name: str, step: str) -> Any:
        source = f"workflow: {name}\nsteps:\n  - {{id: a, model: '{MODEL}', {step}}}\n"
        run_id = runs.submit(Submission(check.parse(source), {})).id
        with runs.database.work() as work:
            (row,) = work.rows(text("SELECT id, attempt FROM step WHERE run_id = :id"), {"id": run_id})
        steps.run_step(runtime, row.id, row.attempt)
        with runs.database.work() as work:
            (ended,) = work.rows(
                text(
                    "SELECT outcome, message, hooks, output FROM attempt JOIN step ON step.id = step_id"
                    " WHERE run_id = :id ORDER BY attempt.attempt"
                ),
                {"id": run_id},
            )
        return ended

    written = run("mails", f"kind: generate, prompt: '{PROMPT}'")
    assert (written.outcome, PROMPT in str(written.output)) == ("succeeded", True)
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8}
    asked = run("mails", f"kind: openai, request: '{json.dumps(body)}'")
    assert (asked.outcome, PROMPT in str(asked.output)) == ("succeeded", True)
    late = run("late-mails", "kind: generate, prompt: hello, retry: {max_attempts: 1}")
    assert (late.outcome, late.hooks[-1]["result"]) == ("hook_failed", "timeout")
    assert run("mails", "kind: generate, prompt: damn").outcome == "hook_refused"


def test_a_pool_whose_hook_hangs_serves_others(api: str, settings: Settings, start_pool: StartPool) -> None:
    pool = start_pool()
    late = HookDefinition(name="late", kind="python", entry_point="hang", timeout="300ms", on_failure="open")
    pool.runtime.settings = settings.model_copy(update={"hooks": (late,)})
    assert post(api).status_code == 200
    pool.runtime.settings = settings.model_copy(update={"hooks": (late.model_copy(update={"on_failure": "closed"}),)})
    refused = post(api)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "hook_failed")
    pool.runtime.settings = settings.model_copy(update={"hooks": ()})
    assert post(api).status_code == 200
