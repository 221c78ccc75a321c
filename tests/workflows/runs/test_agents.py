"""Agents: the turns of the model and the calls of tools are items of the step, which goes on when they have ended."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from app.workflows import registry
from app.workflows.language import check
from app.workflows.runs import control
from app.workflows.runs.claims import Claim
from app.workflows.runs.forks import fork
from app.workflows.runs.service import Runs
from app.workflows.state_machine.outcomes import Success, TokenUsage
from tests.workflows.conftest import StepWorker, failure

FLOW = """
workflow: asking
inputs: {question: {type: string}}
steps:
  - id: agent
    kind: agent
    model: smollm2:135m
    prompt: "{{ inputs.question }}"
    retry: {max_attempts: 1}
    tool_retry: {max_attempts: 1}
    tools:
      - {name: weather, description: The weather of a city, http: {url: "https://a.example/w"},
         parameters: {type: object, required: [city], properties: {city: {type: string}}}}
      - {workflow: sums}
  - {id: end, kind: transform, needs: [agent], cel: "steps.agent.output.text"}
"""
SUMS = """
workflow: sums
description: Adds two numbers
inputs: {a: {type: integer}, b: {type: integer}}
steps: [{id: sum, kind: transform, cel: inputs.a + inputs.b}]
outputs: {sum: steps.sum.output}
"""


def says(text: str = "", *calls: tuple[str, dict[str, Any]], tokens: int = 10) -> Success:
    written = [{"name": name, "arguments": arguments} for name, arguments in calls]
    output = {"text": text, "tool_calls": written, "finish_reason": "tool_calls" if calls else "stop"}
    return Success(output, TokenUsage(tokens, 1))


def turns(*said: Any) -> Callable[[Claim], Any]:
    """The answers of the model, one for each turn."""
    left = list(said)
    return lambda claim: left.pop(0) if claim.data["item"].get("turn") else pytest.fail("a turn was expected")


@pytest.fixture
def sums(runs: Runs) -> None:
    registry.put(runs.database, "sums", check.parse(SUMS))


def kinds(worker: StepWorker, run_id: UUID) -> list[tuple[str, str, str]]:
    return [(item.key, item.kind, item.state) for item in worker.items(run_id, "agent")]


@pytest.mark.usefixtures("sums")
def test_a_model_calls_tools_until_it_answers(worker: StepWorker) -> None:
    run_id = worker.submit(FLOW, question="Where is it warm?")
    said = [says("", ("weather", {"city": "Lima"}), ("sums", {"a": 2, "b": 3})), says("In Lima.")]

    worker.work(**{"agent[0]": said[0], "agent[1]": "20 degrees", "agent[3]": said[1]})

    assert worker.run(run_id).output == {"end": "In Lima."}
    ended = [
        (key, kind, "succeeded")
        for key, kind in zip(
            ("agent[0]", "agent[1]", "agent[2]", "agent[3]"), ("turn", "call", "call", "turn"), strict=True
        )
    ]
    assert kinds(worker, run_id) == ended
    items = worker.items(run_id, "agent")
    assert items[0].input["opening"]["messages"] == [{"role": "user", "content": "Where is it warm?"}]
    assert [tool["name"] for tool in items[0].input["opening"]["tools"]] == ["weather", "sums"]
    assert items[2].output == {"sum": 5}
    step = worker.step(run_id, "agent")
    assert step.output["stopped_by"] == "answer"
    assert (step.output["turns"], step.output["calls"]) == (2, 2)
    assert (step.tokens_in, step.tokens_out) == (20, 2)
    assert {entry.step for entry in worker.history(run_id)} >= {"agent[0]", "agent[1]", "agent[2]", "agent[3]"}


@pytest.mark.usefixtures("sums")
def test_a_call_that_fails_is_an_error_for_the_model_to_read(worker: StepWorker) -> None:
    run_id = worker.submit(FLOW, question="?")
    said = [says("", ("weather", {"city": "Lima"})), says("", ("sums", {"a": "x", "b": 1})), says("I cannot know.")]

    worker.work(
        **{"agent[0]": said[0], "agent[1]": failure("http_5xx", "it is down"), "agent[2]": said[1], "agent[4]": said[2]}
    )

    assert worker.run(run_id).state == "succeeded"
    assert [state for _, _, state in kinds(worker, run_id)] == [
        *("succeeded", "failed", "succeeded", "failed", "succeeded")
    ]
    assert "arguments.a" in worker.items(run_id, "agent")[3].error["message"]
    assert worker.step(run_id, "agent").output["failed_calls"] == 2


@pytest.mark.usefixtures("sums")
def test_a_retry_goes_on_after_the_last_item_that_ended_well(worker: StepWorker, runs: Runs) -> None:
    run_id = worker.submit(FLOW, question="?")
    calls = says("", ("weather", {"city": "Lima"}))
    worker.work(**{"agent[0]": calls, "agent[1]": "20 degrees", "agent[2]": failure()})
    assert worker.run(run_id).state == "failed"
    assert "turn 2" in worker.step(run_id, "agent").error["message"]
    done = list(worker.done)

    control.retry(runs, run_id)
    worker.work(**{"agent[2]": says("In Lima.")})

    assert worker.run(run_id).output == {"end": "In Lima."}
    assert worker.done[len(done) :] == ["agent", "agent[2]", "agent", "end"]
    assert worker.step(run_id, "agent").tokens_in == 20


@pytest.mark.usefixtures("sums")
def test_a_cancel_stops_calls_and_a_retry_repeats_only_those(worker: StepWorker, runs: Runs) -> None:
    run_id = worker.submit(FLOW, question="?")
    worker.do(worker.claim("agent"), {})
    worker.do(worker.claim("agent[0]"), {"agent[0]": says("", ("weather", {"city": "a"}), ("weather", {"city": "b"}))})
    worker.do(worker.claim("agent"), {})
    worker.do(worker.claim("agent[1]"), {"agent[1]": "1 degree"})
    held = worker.claim("agent[2]")

    runs.cancel(run_id)
    assert worker.run(run_id).state == "cancelling"
    worker.do(held, {"agent[2]": failure("cancelled")})
    assert worker.run(run_id).state == "cancelled"

    control.retry(runs, run_id)
    worker.done.clear()
    worker.work(**{"agent[2]": "2 degrees", "agent[3]": says("b")})
    assert worker.done == ["agent", "agent[2]", "agent", "agent[3]", "agent", "end"]
    assert worker.run(run_id).output == {"end": "b"}


@pytest.mark.usefixtures("sums")
def test_a_paused_run_begins_no_turn_and_a_lost_worker_repeats_no_call(worker: StepWorker, runs: Runs) -> None:
    run_id = worker.submit(FLOW, question="?")
    worker.do(worker.claim("agent"), {})
    worker.do(worker.claim("agent[0]"), {"agent[0]": says("", ("weather", {"city": "a"}))})
    worker.do(worker.claim("agent"), {})
    control.pause(runs, run_id)
    assert worker.ready(run_id)
    worker.work(run_id)
    assert worker.done == ["agent", "agent[0]", "agent"]

    control.resume(runs, run_id)
    worker.do(worker.claim("agent[1]"), {"agent[1]": "1 degree"})
    lost = worker.claim("agent")
    with runs.database.work() as work:
        from sqlalchemy import text

        work.run(text("UPDATE step SET lease_until = now() - interval '1 hour' WHERE id = :id"), {"id": lost.step_id})
    worker.sweep()
    worker.work(run_id, **{"agent[2]": says("a")})
    assert worker.done.count("agent[1]") == 1
    assert worker.run(run_id).output == {"end": "a"}


@pytest.mark.usefixtures("sums")
def test_a_fork_after_an_agent_keeps_its_items(worker: StepWorker, runs: Runs) -> None:
    run_id = worker.submit(FLOW, question="?")
    worker.work(**{"agent[0]": says("At once.")})

    later = fork(runs, run_id, "end", {}).id
    worker.work(later)
    assert worker.run(later).output == {"end": "At once."}
    assert kinds(worker, later) == [("agent[0]", "turn", "succeeded")]

    again = fork(runs, run_id, "agent", {"question": "Again?"}).id
    worker.work(again, **{"agent[0]": says("Anew.")})
    assert worker.run(again).output == {"end": "Anew."}


@pytest.mark.usefixtures("sums")
def test_the_time_bound_stops_a_call_that_waits(worker: StepWorker) -> None:
    run_id = worker.submit(FLOW.replace("tools:", "limits: {time: 60s}\n    tools:"), question="?")
    worker.do(worker.claim("agent"), {})
    assert worker.claim("agent[0]").remaining < timedelta(seconds=61)
    assert worker.run(run_id).state == "running"


@pytest.mark.usefixtures("sums")
def test_an_agent_for_each_element_is_a_map_of_calls_of_its_workflow(worker: StepWorker, runs: Runs) -> None:
    registry.put(runs.database, "asking", check.parse(FLOW + "outputs: {answer: steps.agent.output.text}\n"))
    flow = """
workflow: each
inputs: {questions: {type: array}}
steps:
  - id: answers
    kind: map
    over: inputs.questions
    step: {kind: workflow, workflow: asking, inputs: {question: item}}
"""
    run_id = worker.submit(flow, questions=["Where?", "When?"])

    def answer(claim: Claim) -> Success:
        return says(f"Asked: {claim.data['item']['opening']['messages'][-1]['content']}")

    worker.work(**{"agent[0]": answer})

    assert worker.run(run_id).output == {"answers": [{"answer": "Asked: Where?"}, {"answer": "Asked: When?"}]}
