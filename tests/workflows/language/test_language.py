"""The semantics of the workflow language, on the real database, with a test worker."""

from __future__ import annotations

import threading
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from app.kernel.errors import ConcurrencyLimitReached, EventKeyReused, InvalidInput, InvalidTransition, NotFound
from app.kernel.units import durations
from app.workflows import registry, retention
from app.workflows.language import check
from app.workflows.runs import control, forks, submission
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from tests.workflows.conftest import StepWorker, fails_then, failure

NOW = "retry: {delay: 0s}"
ONCE = "retry: {max_attempts: 1}"


def flow(steps: str, *, name: str = "flow", head: str = "") -> str:
    return f"workflow: {name}\ndefaults: {{model: 'm:1'}}\n{head}\nsteps:\n{steps}"


def test_a_step_with_a_false_condition_is_skipped_with_its_dependents(worker: StepWorker) -> None:
    source = flow(
        """
  - {id: a, kind: generate, prompt: hi}
  - {id: b, kind: generate, prompt: hi, needs: [a], when: "steps.a.output == 'yes' && inputs.wanted"}
  - {id: c, kind: noop, needs: [b]}
""",
        head="inputs: {wanted: {type: boolean, default: true}}",
    )
    no, yes, off = worker.submit(source), worker.submit(source), worker.submit(source, wanted=False)
    worker.work(no, a="no")
    worker.work(yes, a="yes")
    worker.work(off, a="yes")

    assert worker.states(no) == {"a": "succeeded", "b": "skipped", "c": "skipped"}
    assert worker.run(no).state == "succeeded", "what was skipped did not fail"
    assert set(worker.states(yes).values()) == {"succeeded"}
    assert worker.states(off)["b"] == "skipped"
    skipped = [entry for entry in worker.history(no) if entry.event == "skipped"]
    assert [entry.cause["message"] for entry in skipped] == [
        "its condition does not hold",
        "what it needs did not come about",
    ]


def test_a_condition_on_inputs_alone_is_decided_at_submission(worker: StepWorker) -> None:
    source = flow("\n  - {id: a, kind: generate, prompt: hi, when: 'inputs.n > 3'}", head="inputs: {n: {type: number}}")

    assert worker.run(worker.submit(source, n=3)).state == "succeeded"
    assert worker.states(worker.submit(source, n=3.5)) == {"a": "ready"}


def test_a_condition_that_cannot_be_evaluated_fails_its_step_with_the_reason(worker: StepWorker) -> None:
    run_id = worker.submit(
        flow("""
  - {id: a, kind: generate, prompt: hi}
  - {id: b, kind: noop, needs: [a], when: "steps.a.output.missing > 3"}
""")
    )
    worker.work()

    assert (worker.states(run_id)["b"], worker.run(run_id).state) == ("failed", "failed")
    assert worker.step(run_id, "b").error["reason"] == "template_error"
    assert "step b" in worker.run(run_id).error["message"]


SWITCH = flow("""
  - {id: sort, kind: generate, prompt: hi}
  - id: route
    kind: switch
    needs: [sort]
    cases:
      refund: "steps.sort.output == 'refund'"
      question: "steps.sort.output.startsWith('q')"
    default: other
  - {id: pay, kind: noop, needs: [route.refund]}
  - {id: answer, kind: noop, needs: [route.question]}
  - {id: read, kind: noop, needs: [route.other]}
  - {id: end, kind: join, needs: [pay, answer, read], join: any}
""")


@pytest.mark.parametrize(("text", "taken"), [("refund", "pay"), ("query", "answer"), ("hm", "read")])
def test_a_switch_takes_one_branch(worker: StepWorker, text: str, taken: str) -> None:
    run_id = worker.submit(SWITCH)
    worker.work(sort=text)

    states = worker.states(run_id)
    assert {key for key in ("pay", "answer", "read") if states[key] == "succeeded"} == {taken}
    assert (states["end"], worker.run(run_id).state) == ("succeeded", "succeeded")
    assert worker.step(run_id, "end").output == dict.fromkeys(("pay", "answer", "read"))


def test_join_any_starts_after_the_first_need_and_all_done_after_the_last(worker: StepWorker) -> None:
    run_id = worker.submit(
        flow(f"""
  - {{id: a, kind: generate, prompt: hi}}
  - {{id: b, kind: generate, prompt: hi, allow_failure: true, {ONCE}}}
  - {{id: first, kind: generate, prompt: "{{{{ steps.b.state }}}}", needs: [a, b], join: any}}
  - {{id: last, kind: generate, prompt: "{{{{ steps.b.error.message }}}}", needs: [a, b], join: all_done}}
""")
    )
    worker.do(worker.claim("a"), {})
    first = worker.claim("first")
    assert first.data["steps"]["b"] == {"state": "ready", "output": None, "error": None, "finish_reason": None}
    assert worker.states(run_id)["last"] == "pending"
    worker.do(worker.claim("b"), {"b": failure()})
    assert worker.claim("last").data["steps"]["b"]["error"]["message"] == "it broke"


def test_an_allowed_failure_does_not_fail_the_run(worker: StepWorker) -> None:
    run_id = worker.submit(
        flow(f"""
  - {{id: a, kind: generate, prompt: hi, allow_failure: true, {ONCE}}}
  - {{id: b, kind: noop, needs: [a]}}
  - {{id: c, kind: noop, needs: [a], join: all_done}}
""")
    )
    worker.work(a=failure())

    assert worker.states(run_id) == {"a": "failed", "b": "skipped", "c": "succeeded"}
    assert worker.run(run_id).state == "succeeded"


def test_outputs_are_computed_by_expressions(worker: StepWorker) -> None:
    head = "inputs: {n: {type: integer}}\noutputs: {text: steps.a.output, twice: inputs.n * 2}"
    run_id = worker.submit(flow("\n  - {id: a, kind: generate, prompt: hi}\n  - {id: b, kind: noop}", head=head), n=4)
    worker.work(a="done")

    assert worker.run(run_id).output == {"text": "done", "twice": 8}


def test_an_output_must_conform_to_its_schema(worker: StepWorker) -> None:
    head = "outputs: {text: {value: steps.a.output, schema: {type: string, maxLength: 4}}}"
    source = flow("\n  - {id: a, kind: generate, prompt: hi}", head=head)
    fine, long = worker.submit(source), worker.submit(source)
    worker.work(fine, a="done")
    worker.work(long, a="too long")

    assert (worker.run(fine).output, worker.run(long).state) == ({"text": "done"}, "failed")
    assert "text does not conform to its schema" in worker.run(long).error["message"]


def test_an_output_that_cannot_be_computed_fails_the_run_and_on_failure_runs(worker: StepWorker) -> None:
    head = "outputs: {text: steps.a.output.missing}\non_failure: [{id: sorry, kind: noop}]"
    run_id = worker.submit(flow("\n  - {id: a, kind: generate, prompt: hi}", head=head))
    worker.work()

    assert (worker.run(run_id).state, worker.states(run_id)["sorry"]) == ("failed", "succeeded")
    assert "the output of the run cannot be computed" in worker.run(run_id).error["message"]


MAP = """
  - id: each
    kind: map
    over: inputs.items
    max_parallel: {parallel}
    on_error: {on_error}
    step: {{kind: generate, prompt: "{{{{ index }}}}: {{{{ item }}}}", retry: {{max_attempts: 2, delay: 0s}}}}
  - {{id: end, kind: join, needs: [each]}}
"""
ITEMS = "inputs: {items: {type: array}}"


def mapped(parallel: int = 2, on_error: str = "fail") -> str:
    return flow(MAP.format(parallel=parallel, on_error=on_error), head=ITEMS)


def test_a_map_limits_parallel_items_and_keeps_their_order(worker: StepWorker) -> None:
    run_id = worker.submit(mapped(2), items=["a", "b", "c", "d", "e"])
    worker.do(worker.claim("each"), {})

    assert [row.key for row in worker.ready()] == ["each[0]", "each[1]"]
    second, first = worker.claim("each[1]"), worker.claim("each[0]")
    assert (second.data["item"], second.data["index"]) == ("b", 1)
    assert second.data["inputs"] == {}, "an item does not carry the whole list"
    worker.do(second, {"each": "B"})
    assert [row.key for row in worker.ready()] == ["each[2]"]
    worker.do(first, {"each": "A"})
    worker.work(each=lambda claim: claim.data["item"].upper())

    assert worker.run(run_id).output == {"end": {"each": ["A", "B", "C", "D", "E"]}}
    view = worker.step(run_id, "each")
    assert (view.items, view.items_waiting, view.items_in_flight, view.items_failed) == (5, 0, 0, 0)


def test_a_map_over_an_empty_list_succeeds_at_once(worker: StepWorker) -> None:
    run_id = worker.submit(mapped(), items=[])
    worker.work()

    assert worker.run(run_id).output == {"end": {"each": []}}


def test_each_item_is_retried_separately(worker: StepWorker) -> None:
    run_id = worker.submit(mapped(), items=[1, 2, 3])
    worker.work(each=fails_then("ok"))

    assert worker.run(run_id).output == {"end": {"each": ["ok", "ok", "ok"]}}
    assert [row.failures for row in worker.items(run_id, "each")] == [1, 1, 1]


def test_an_item_that_fails_permanently_cancels_the_others(worker: StepWorker) -> None:
    run_id = worker.submit(mapped(2), items=[1, 2, 3, 4])
    worker.do(worker.claim("each"), {})
    held = worker.claim("each[1]")
    worker.do(worker.claim("each[0]"), {"each": failure()})
    worker.do(worker.claim("each[0]"), {"each": failure(message="not this one")})

    assert [row.state for row in worker.items(run_id, "each")] == ["failed", "cancelling", "cancelled", "cancelled"]
    assert worker.states(run_id)["each"] == "awaiting", "the holder of the second has not answered"
    worker.do(held, {"each": failure("cancelled")})
    assert (worker.states(run_id)["each"], worker.run(run_id).state) == ("waiting", "running")
    worker.pass_time(minutes=2)
    worker.sweep()
    worker.work(each=lambda claim: failure(message="not this one") if claim.data["item"] == 1 else "ok")
    for _ in range(3):
        worker.pass_time(minutes=2)
        worker.sweep()
        worker.work(each=lambda claim: failure(message="not this one") if claim.data["item"] == 1 else "ok")
    assert worker.run(run_id).state == "failed"
    assert "1 of 4 items failed; the first, item 0: not this one" in worker.run(run_id).error["message"]


def test_a_collecting_map_runs_all_items_and_names_the_failed_ones(worker: StepWorker) -> None:
    run_id = worker.submit(mapped(2, "collect"), items=[1, 2, 3, 4])
    worker.work(each=lambda claim: failure() if claim.data["item"] % 2 else claim.data["item"])

    assert worker.run(run_id).state == "succeeded"
    assert worker.run(run_id).output == {"end": {"each": [None, 2, None, 4]}}
    error = worker.step(run_id, "each").error
    assert (error["items"], error["reason"]) == ([0, 2], "child_failed")


def test_a_map_over_a_value_that_is_not_a_list_fails(worker: StepWorker) -> None:
    run_id = worker.submit(
        flow("\n  - {id: e, kind: map, over: inputs.x, step: {kind: noop}}", head="inputs: {x: {}}"), x=3
    )
    worker.work()

    assert "expected a list" in worker.run(run_id).error["message"]


def test_the_cancel_of_a_map_waits_for_the_workers_of_its_items(worker: StepWorker) -> None:
    run_id = worker.submit(mapped(2), items=[1, 2, 3])
    worker.do(worker.claim("each"), {})
    held = worker.claim("each[0]")
    worker.runs.cancel(run_id)

    assert [row.state for row in worker.items(run_id, "each")] == ["cancelling", "cancelled", "cancelled"]
    assert worker.run(run_id).state == "cancelling"
    worker.do(held, {"each": failure("cancelled")})
    assert worker.run(run_id).state == "cancelled"
    assert worker.ready() == []


def test_an_item_can_be_cancelled_before_it_starts(worker: StepWorker) -> None:
    run_id = worker.submit(mapped(1, "collect"), items=[1, 2, 3])
    worker.do(worker.claim("each"), {})
    assert control.cancel_step(worker.runs, run_id, "each[1]") == "cancelled"
    worker.work(each="ok")

    assert worker.run(run_id).output == {"end": {"each": ["ok", None, "ok"]}}


def test_a_cancelled_item_counts_as_failed(worker: StepWorker) -> None:
    run_id = worker.submit(mapped(2, "collect"), items=[1, 2])
    worker.do(worker.claim("each"), {})
    control.cancel_step(worker.runs, run_id, "each[0]")
    worker.work(each="ok")

    assert worker.run(run_id).output == {"end": {"each": [None, "ok"]}}


CHILD = flow(
    "\n  - {id: a, kind: generate, prompt: '{{ inputs.word }}', retry: {max_attempts: 1}}",
    name="child",
    head="inputs: {word: {type: string}}\noutputs: {said: steps.a.output}",
)
PARENT = flow(
    """
  - {id: ask, kind: workflow, workflow: child, inputs: {word: inputs.word}, retry: {max_attempts: 1}}
  - {id: end, kind: join, needs: [ask]}
""",
    name="parent",
    head="inputs: {word: {type: string}}",
)


def store(worker: StepWorker, source: str) -> None:
    definition = check.parse(source)
    registry.put(worker.runs.database, definition.workflow, definition)


def test_a_workflow_calls_another_and_uses_its_output(worker: StepWorker) -> None:
    store(worker, CHILD)
    run_id = worker.submit(PARENT, word="hello")
    worker.work(a=lambda claim: claim.work.prompt and claim.data["inputs"]["word"] + "!")

    assert worker.run(run_id).output == {"end": {"ask": {"said": "hello!"}}}
    child = worker.run(worker.step(run_id, "ask").called_run_id)
    assert (child.workflow, child.state, child.parent_run_id) == ("child", "succeeded", run_id)


def test_a_failed_called_run_fails_the_step_with_its_error(worker: StepWorker) -> None:
    store(worker, CHILD)
    run_id = worker.submit(PARENT, word="hello")
    worker.work(a=failure())

    assert worker.run(run_id).state == "failed"
    assert "step a: it broke" in worker.run(run_id).error["message"]


def test_a_cancel_reaches_the_called_run_and_waits_for_its_end(worker: StepWorker) -> None:
    store(worker, CHILD)
    run_id = worker.submit(PARENT, word="hello")
    worker.do(worker.claim("ask"), {})
    held = worker.claim("a")
    worker.runs.cancel(run_id)

    child = worker.step(run_id, "ask").called_run_id
    assert (worker.run(run_id).state, worker.run(child).state) == ("cancelling", "cancelling")
    worker.do(held, {"a": failure("cancelled")})
    assert (worker.run(run_id).state, worker.run(child).state) == ("cancelled", "cancelled")


def test_the_sweep_delivers_a_lost_result_of_a_called_run(worker: StepWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    store(worker, CHILD)
    run_id = worker.submit(PARENT, word="hello")
    with monkeypatch.context() as patched:
        patched.setattr(type(worker.runs), "_carry_out", lambda *_: None)
        worker.work()
    assert worker.states(run_id)["ask"] == "awaiting"
    worker.pass_time(seconds=5)

    assert worker.sweep().repeated == 1
    worker.work()
    assert worker.run(run_id).state == "succeeded"


def test_recursive_calls_are_limited(worker: StepWorker) -> None:
    store(worker, flow("\n  - {id: again, kind: workflow, workflow: loop, retry: {max_attempts: 1}}", name="loop"))
    found = registry.get(worker.runs.database, "loop")
    from app.workflows.runs.submission import Submission

    run_id = worker.runs.submit(Submission(found.definition, {}, found.version)).id
    worker.work()
    assert worker.run(run_id).state == "failed"
    assert "more than 16 deep" in worker.run(run_id).error["message"]


def test_a_too_deep_recursion_is_not_retried_at_each_level(worker: StepWorker) -> None:
    """With a retry at each level, one submission would start 3^15 runs."""
    store(worker, flow("\n  - {id: again, kind: workflow, workflow: own}", name="own"))
    run_id = worker.submit(flow("\n  - {id: call, kind: workflow, workflow: own}"))
    worker.work()

    with worker.runs.database.work() as work:
        assert work.rows(text("SELECT count(*) AS runs FROM run"))[0].runs <= 17
    assert worker.run(run_id).state == "failed"
    assert "more than 16 deep" in worker.run(run_id).error["message"]


def test_items_can_call_workflows(worker: StepWorker) -> None:
    store(worker, CHILD)
    run_id = worker.submit(
        flow(
            """
  - {id: each, kind: map, over: inputs.items, step: {kind: workflow, workflow: child, inputs: {word: item}}}
""",
            head=ITEMS,
        ),
        items=["x", "y"],
    )
    worker.work(a=lambda claim: claim.data["inputs"]["word"] * 2)

    assert worker.run(run_id).output == {"each": [{"said": "xx"}, {"said": "yy"}]}


def test_a_timed_wait_needs_no_worker(worker: StepWorker) -> None:
    run_id = worker.submit(flow("\n  - {id: nap, kind: wait, for: 1h}\n  - {id: end, kind: noop, needs: [nap]}"))
    worker.work()
    assert worker.step(run_id, "nap").state == "awaiting"
    worker.sweep()
    assert worker.step(run_id, "nap").state == "awaiting"
    worker.pass_time(hours=1)
    worker.sweep()
    worker.work()
    assert worker.run(run_id).state == "succeeded"


def test_a_step_waits_until_an_instant(worker: StepWorker) -> None:
    source = flow(
        "\n  - {id: nap, kind: wait, until: inputs.at, retry: {max_attempts: 1}}", head="inputs: {at: {type: string}}"
    )
    past, future = (
        worker.submit(source, at="2020-01-01T00:00:00Z"),
        worker.submit(source, at="2999-01-01T00:00:00+02:00"),
    )
    wrong = worker.submit(source, at="tomorrow")
    worker.work()
    worker.sweep()

    assert (worker.run(past).state, worker.run(future).state) == ("succeeded", "running")
    assert worker.step(future, "nap").not_before.year == 2998
    assert "tomorrow" in worker.run(wrong).error["message"]


EVENT = flow("""
  - id: paid
    kind: wait
    event: payment
    schema: {type: object, required: [amount], properties: {amount: {type: number, minimum: 1}}}
    expires: 1h
    on_timeout: continue
  - {id: thanks, kind: transform, cel: steps.paid.output.amount, needs: [paid], when: "steps.paid.output != null"}
  - {id: remind, kind: noop, needs: [paid.timed_out]}
""")


def test_an_event_completes_the_step_that_waits_for_it(worker: StepWorker) -> None:
    run_id = worker.submit(EVENT)
    worker.work()
    with pytest.raises(InvalidInput, match=r"payload\.amount"):
        worker.send_event(run_id, "payment", {"amount": 0})
    with pytest.raises(NotFound, match="payment"):
        worker.send_event(run_id, "paiment", {})
    assert worker.send_event(run_id, "payment", {"amount": 7}, "k").step == "paid"
    assert worker.send_event(run_id, "payment", {"amount": 7}, "k").created is False
    worker.work()

    assert worker.states(run_id) == {"paid": "succeeded", "thanks": "succeeded", "remind": "skipped"}
    assert worker.run(run_id).output == {"thanks": 7, "remind": None}
    with pytest.raises(InvalidTransition):
        worker.send_event(run_id, "payment", {"amount": 7})


def test_an_early_event_is_kept(worker: StepWorker) -> None:
    run_id = worker.submit(EVENT)
    assert worker.send_event(run_id, "payment", {"amount": 7}).step is None
    worker.work()

    assert worker.states(run_id)["paid"] == "succeeded"


def test_a_wait_that_times_out_takes_its_branch_or_fails(worker: StepWorker) -> None:
    run_id = worker.submit(EVENT)
    strict = worker.submit(
        EVENT.replace("    on_timeout: continue\n", "").replace("needs: [paid.timed_out]", "needs: [paid]")
    )
    worker.work()
    worker.pass_time(hours=1)
    worker.sweep()
    worker.work()

    assert worker.states(run_id) == {"paid": "succeeded", "thanks": "skipped", "remind": "succeeded"}
    assert "no event 'payment' came in time" in worker.run(strict).error["message"]


def test_an_approval_takes_the_branch_of_the_decision(worker: StepWorker) -> None:
    source = flow("""
  - {id: draft, kind: generate, prompt: hi}
  - {id: ok, kind: wait, needs: [draft], approval: {message: "Send {{ steps.draft.output }}?"}}
  - {id: send, kind: noop, needs: [ok.approved]}
  - {id: drop, kind: noop, needs: [ok.rejected]}
""")
    yes, no = worker.submit(source), worker.submit(source)
    worker.work(draft="the letter")
    assert worker.step(yes, "ok").awaits == {"event": "ok", "message": "Send the letter?"}
    worker.send_event(yes, "ok", {"approved": True, "by": "ana"})
    worker.send_event(no, "ok", {"approved": False})
    worker.work()

    assert (worker.states(yes)["send"], worker.states(yes)["drop"]) == ("succeeded", "skipped")
    assert (worker.states(no)["send"], worker.states(no)["drop"]) == ("skipped", "succeeded")
    assert worker.step(yes, "ok").output["by"] == "ana"


def test_retries_depend_on_the_error(worker: StepWorker) -> None:
    def attempts(rule: str, reason: str, message: str = "x") -> int:
        worker.done.clear()
        run_id = worker.submit(flow(f"\n  - {{id: a, kind: generate, prompt: hi, retry: {{delay: 0s, {rule}}}}}"))
        worker.work(run_id, a=failure(reason, message))
        assert worker.run(run_id).state == "failed"
        return len(worker.done)

    assert attempts("max_attempts: 3", "timeout") == 3
    assert attempts("on: [timeout]", "timeout") == 3
    assert attempts("on: [timeout]", "engine_error") == 1
    assert attempts("non_retryable: [timeout]", "timeout") == 1
    assert attempts("on: [http_4xx]", "http_4xx") == 3, "what is asked for counts more than the default"
    assert attempts("on: [timeout, http_4xx], non_retryable: [http_4xx]", "http_4xx") == 1
    assert attempts("""when: 'error.message.contains("again")'""", "timeout", "try again") == 3
    assert attempts("""when: 'error.message.contains("again")'""", "timeout", "never") == 1
    assert attempts("when: error.attempt < 2", "timeout") == 2


def test_the_next_model_is_tried_when_the_reason_matches(worker: StepWorker) -> None:
    run_id = worker.submit(
        flow("""
  - id: a
    kind: generate
    model: "big:1"
    prompt: hi
    fallback: {models: ["small:1", "tiny:1"], on: [timeout]}
    retry: {max_attempts: 1}
""")
    )
    models = []

    def answer(claim: Any) -> Any:
        models.append(claim.model)
        return failure("timeout") if len(models) < 3 else "done"

    worker.work(a=answer)
    assert models == ["big:1", "small:1", "tiny:1"]
    assert worker.run(run_id).state == "succeeded"
    assert worker.step(run_id, "a").model == "tiny:1"
    assert {entry.cause["model"] for entry in worker.history(run_id) if entry.cause and "model" in entry.cause} == {
        "small:1",
        "tiny:1",
    }


def test_another_reason_keeps_the_model(worker: StepWorker) -> None:
    run_id = worker.submit(
        flow(f"""
  - {{id: a, kind: generate, prompt: hi, fallback: {{models: ["b:1"], on: [timeout]}}, {NOW}}}
""")
    )
    worker.work(a=fails_then("ok", 2))

    assert worker.step(run_id, "a").model == "m:1"


def test_the_total_timeout_ends_the_retries_of_a_step(worker: StepWorker) -> None:
    run_id = worker.submit(
        flow("""
  - {id: a, kind: generate, prompt: hi, total_timeout: 10m, retry: {delay: 1h, cap: 1h, max_attempts: 9}}
""")
    )
    worker.do(worker.claim("a"), {"a": failure()})
    assert worker.states(run_id)["a"] == "waiting"
    worker.pass_time(minutes=11)
    assert worker.sweep().out_of_time == 1

    assert worker.run(run_id).state == "failed"
    assert "total_timeout" in worker.run(run_id).error["message"]


def test_the_total_timeout_of_a_map_cancels_its_items_and_is_the_reason(worker: StepWorker) -> None:
    run_id = worker.submit(
        flow("\n  - {id: each, kind: map, over: '[1, 2]', total_timeout: 1h, step: {kind: generate, prompt: hi}}")
    )
    worker.do(worker.claim("each"), {})
    held = worker.claim("each[0]")
    worker.pass_time(hours=2)
    worker.sweep()
    assert worker.states(run_id) == {"each": "cancelling"}
    worker.do(held, {"each": failure("cancelled")})
    worker.work()

    assert (worker.run(run_id).state, worker.states(run_id)["each"]) == ("failed", "cancelled")
    assert "total_timeout" in worker.run(run_id).error["message"]


def test_a_deadline_ends_the_run_as_failed(worker: StepWorker) -> None:
    run_id = worker.submit(
        flow(
            "\n  - {id: a, kind: generate, prompt: hi}\n  - {id: b, kind: generate, prompt: hi}",
            head="deadline: 1h\non_failure: [{id: sorry, kind: noop}]",
        )
    )
    held = worker.claim("a")
    worker.pass_time(hours=2)
    assert worker.sweep().out_of_time == 1
    assert worker.states(run_id) == {"a": "cancelling", "b": "cancelled", "sorry": "pending"}
    worker.do(held, {"a": failure("cancelled")})
    worker.work()

    assert (worker.run(run_id).state, worker.states(run_id)["sorry"]) == ("failed", "succeeded")
    assert "deadline" in worker.run(run_id).error["message"]
    control.retry(worker.runs, run_id)
    assert worker.sweep().out_of_time == 0, "it counts anew"


COMPENSATED = flow(
    """
  - {id: book, kind: generate, prompt: hi}
  - {id: pay, kind: generate, prompt: hi, needs: [book], retry: {max_attempts: 1}}
""",
    head="""on_failure:
  - {id: undo, kind: generate, prompt: "{{ steps.book.output }}", when: "steps.book.state == 'succeeded'"}
  - {id: tell, kind: noop, needs: [undo]}""",
)


def test_on_failure_runs_only_after_a_failure_or_a_cancel(worker: StepWorker) -> None:
    failed, cancelled, fine = (worker.submit(COMPENSATED) for _ in range(3))
    seen: list[Any] = []

    def undo(claim: Any) -> Any:
        seen.append(claim.data["run"]["state"])
        return "undone"

    worker.work(failed, pay=failure(), undo=undo)
    worker.do(worker.claim("book", cancelled), {})
    worker.runs.cancel(cancelled)
    assert worker.run(cancelled).state == "compensating"
    worker.work(cancelled, undo=undo)
    worker.work(fine)

    assert [worker.run(run_id).state for run_id in (failed, cancelled, fine)] == ["failed", "cancelled", "succeeded"]
    assert [worker.states(run_id)["tell"] for run_id in (failed, cancelled, fine)] == [
        "succeeded",
        "succeeded",
        "skipped",
    ]
    assert seen == ["failed", "cancelled"]


def test_on_failure_is_skipped_when_no_step_started(worker: StepWorker) -> None:
    head = "concurrency: {limit: 1}\non_failure: [{id: undo, kind: noop}]"
    source = flow("\n  - {id: a, kind: generate, prompt: hi}", head=head)
    worker.submit(source)
    blocked = worker.submit(source)
    worker.runs.cancel(blocked)

    assert (worker.run(blocked).state, worker.states(blocked)["undo"]) == ("cancelled", "skipped")


def limited(policy: str, limit: int = 1) -> str:
    head = f"""inputs: {{user: {{type: string}}}}
concurrency: {{key: "{{{{ inputs.user }}}}", limit: {limit}, policy: {policy}}}"""
    return flow("\n  - {id: a, kind: generate, prompt: hi}", head=head)


def test_runs_with_the_same_concurrency_key_wait_for_each_other(worker: StepWorker) -> None:
    first, second, third = (worker.submit(limited("queue"), user="ana") for _ in range(3))
    other = worker.submit(limited("queue"), user="ben")

    states = [worker.run(run_id).state for run_id in (first, second, third, other)]
    assert states == ["queued", "blocked", "blocked", "queued"]
    worker.work(first)
    assert [worker.run(run_id).state for run_id in (second, third)] == ["queued", "blocked"]
    worker.runs.cancel(second)
    worker.work(third)
    assert worker.run(third).state == "succeeded"


def test_a_run_beyond_the_concurrency_limit_is_rejected(worker: StepWorker) -> None:
    worker.submit(limited("reject", 2), user="ana")
    worker.submit(limited("reject", 2), user="ana")

    with pytest.raises(ConcurrencyLimitReached, match=r"2 run\(s\) of flow with the concurrency key 'ana'"):
        worker.submit(limited("reject", 2), user="ana")


def test_a_newer_run_cancels_the_older(worker: StepWorker) -> None:
    first = worker.submit(limited("cancel_running"), user="ana")
    held = worker.claim("a")
    second, third = (worker.submit(limited("cancel_running"), user="ana") for _ in range(2))

    assert [worker.run(run_id).state for run_id in (first, second, third)] == ["cancelling", "cancelled", "blocked"]
    worker.do(held, {"a": failure("cancelled")})
    assert [worker.run(run_id).state for run_id in (first, third)] == ["cancelled", "queued"]


def test_duplicate_submissions_within_the_window_return_one_run(worker: StepWorker) -> None:
    head = 'inputs: {id: {type: string}}\ndeduplicate: {key: "{{ inputs.id }}", window: 1h}'
    source = flow("\n  - {id: a, kind: generate, prompt: hi}", head=head)
    first = worker.submit(source, id="x")

    assert worker.submit(source, id="x") == first
    assert worker.submit(source, id="y") != first
    worker.pass_time(hours=2)
    assert worker.submit(source, id="x") != first


def test_calls_are_never_deduplicated(worker: StepWorker) -> None:
    store(worker, CHILD.replace("workflow: child", "workflow: child\ndeduplicate: {key: x, window: 1h}"))
    parents = [worker.submit(PARENT, word="x") for _ in range(2)]
    worker.work()

    assert {worker.run(run_id).state for run_id in parents} == {"succeeded"}
    assert worker.step(parents[0], "ask").called_run_id != worker.step(parents[1], "ask").called_run_id


def test_no_step_of_a_paused_run_starts(worker: StepWorker) -> None:
    run_id = worker.submit(
        flow("\n  - {id: a, kind: generate, prompt: hi}\n  - {id: b, kind: generate, prompt: hi, needs: [a]}")
    )
    held = worker.claim("a")
    assert control.pause(worker.runs, run_id)
    worker.do(held, {})
    (ready,) = worker.ready()
    assert worker.runs.claim(ready.id, ready.attempt, "w") is None
    depth = worker.runs.publisher.depth("model.m-1")
    assert control.resume(worker.runs, run_id)
    assert worker.runs.publisher.depth("model.m-1") == depth + 1, "it is sent"
    worker.work()

    assert worker.run(run_id).state == "succeeded"
    assert [entry.event for entry in worker.history(run_id) if entry.step is None] == [
        "submitted",
        "paused",
        "resumed",
        "succeeded",
    ]


def test_a_paused_workflow_pauses_its_current_and_future_runs(worker: StepWorker) -> None:
    source = flow("\n  - {id: a, kind: generate, prompt: hi}")
    before = worker.submit(source)
    assert control.pause_workflow(worker.runs, "flow", paused=True) == 1
    after = worker.submit(source)
    worker.work()
    assert {worker.run(before).state, worker.run(after).state} == {"queued"}
    assert worker.run(after).paused
    assert control.pause_workflow(worker.runs, "flow", paused=False) == 2
    worker.work()
    assert {worker.run(before).state, worker.run(after).state} == {"succeeded"}


def test_a_retry_repeats_the_steps_that_did_not_succeed(worker: StepWorker) -> None:
    run_id = worker.submit(
        flow(f"""
  - {{id: a, kind: generate, prompt: hi}}
  - {{id: b, kind: generate, prompt: hi, needs: [a], {ONCE}}}
  - {{id: c, kind: noop, needs: [b]}}
""")
    )
    with pytest.raises(InvalidTransition):
        control.retry(worker.runs, run_id)
    worker.work(b=failure())
    assert worker.run(run_id).state == "failed"
    worker.done.clear()
    control.retry(worker.runs, run_id)
    assert worker.run(run_id).error is None
    worker.work(b="well")

    assert (worker.done, worker.run(run_id).state) == (["b", "c"], "succeeded")
    with pytest.raises(InvalidTransition):
        control.retry(worker.runs, run_id)


def test_a_retry_of_a_map_repeats_only_the_failed_items(worker: StepWorker) -> None:
    source = mapped(10).replace("kind: map", "kind: map\n    retry: {max_attempts: 1}")
    run_id = worker.submit(source, items=[1, 2, 3])
    worker.work(each=lambda claim: failure() if claim.data["item"] == 3 else claim.data["item"])
    assert worker.run(run_id).state == "failed"
    worker.done.clear()
    control.retry(worker.runs, run_id)
    worker.work(each=lambda claim: claim.data["item"] * 10)

    assert worker.done == ["each", "each[2]", "end"]
    assert worker.run(run_id).output == {"end": {"each": [1, 2, 30]}}


def test_a_fork_continues_from_a_step_with_other_inputs(worker: StepWorker) -> None:
    source = flow(
        """
  - {id: each, kind: map, over: "[1, 2]", step: {kind: generate, prompt: hi}}
  - {id: a, kind: generate, prompt: hi}
  - {id: b, kind: generate, prompt: "{{ inputs.word }} {{ steps.a.output }} {{ steps.each.output }}", needs: [a, each]}
  - {id: c, kind: noop, needs: [b]}
""",
        head="inputs: {word: {type: string}}",
    )
    run_id = worker.submit(source, word="old")
    with pytest.raises(InvalidTransition):
        forks.fork(worker.runs, run_id, "b", {})
    worker.work(a="A")
    with pytest.raises(NotFound, match="each, a, b, c"):
        forks.fork(worker.runs, run_id, "x", {})
    worker.done.clear()
    forked = forks.fork(worker.runs, run_id, "b", {"word": "new"}).id
    seen: list[Any] = []

    def answer(claim: Any) -> Any:
        seen.append(claim.data)
        return "B"

    worker.work(b=answer)
    assert worker.done == ["b", "c"]
    assert worker.step(forked, "each").items == 2
    assert seen[0]["inputs"] == {"word": "new"}
    assert seen[0]["steps"]["each"]["output"] == ["the text of each[0]", "the text of each[1]"]
    assert (worker.run(forked).state, worker.run(forked).forked_from) == ("succeeded", run_id)


def test_runs_are_cancelled_and_retried_in_bulk(worker: StepWorker) -> None:
    source = flow("\n  - {id: a, kind: generate, prompt: hi}", head="labels: {team: red}")
    red = [worker.submit(source) for _ in range(3)]
    blue = worker.submit(source.replace("red", "blue"))
    bulk = control.cancel_all(worker.runs, control.Filter(workflow="flow", labels={"team": "red"}))

    assert (list(bulk.done), bulk.more) == (red, False)
    assert worker.run(blue).state == "queued"
    assert list(control.retry_all(worker.runs, control.Filter(states=["cancelled"])).done) == red
    worker.work()
    assert {worker.run(run_id).state for run_id in red} == {"succeeded"}


def test_a_cancelled_step_fails_the_run_after_the_other_steps(worker: StepWorker) -> None:
    run_id = worker.submit(
        flow(
            "\n  - {id: a, kind: generate, prompt: hi}\n  - {id: b, kind: generate, prompt: hi}\n"
            "  - {id: c, kind: noop, needs: [a]}"
        )
    )
    held = worker.claim("a")
    assert control.cancel_step(worker.runs, run_id, "a") == "cancelling"
    worker.do(held, {"a": failure("cancelled", "cancelled on request")})
    worker.work()

    assert worker.states(run_id) == {"a": "cancelled", "b": "succeeded", "c": "skipped"}
    assert "step a: cancelled on request" in worker.run(run_id).error["message"]


def test_runs_are_removed_after_their_retention_with_their_called_runs(worker: StepWorker) -> None:
    store(worker, CHILD)
    short = worker.submit(PARENT.replace("workflow: parent", "workflow: parent\nretention: 1h"), word="x")
    kept = worker.submit(PARENT, word="x")
    worker.work()
    child = worker.step(short, "ask").called_run_id
    worker.pass_time(hours=2)

    assert retention.remove_runs(worker.runs.database) == 1
    for run_id in (short, child):
        with pytest.raises(NotFound):
            worker.run(run_id)
    assert worker.run(kept).state == "succeeded"


def test_the_history_lists_transitions_in_order(worker: StepWorker) -> None:
    run_id = worker.submit(flow(f"\n  - {{id: a, kind: generate, prompt: hi, {NOW}}}"))
    worker.work(a=fails_then("ok"))

    entries = [(entry.step, entry.event, entry.attempt) for entry in worker.history(run_id)]
    assert entries == [
        (None, "submitted", None),
        ("a", "ready", 1),
        ("a", "ready", 2),
        ("a", "succeeded", 2),
        (None, "succeeded", None),
    ]
    assert worker.history(run_id)[2].cause["after"]["message"] == "it broke"


def test_a_nested_call_of_the_same_key_shares_the_callers_slot(worker: StepWorker) -> None:
    """a calls b and b calls a, with a limit of one run of a: the inner run of a does not wait for the outer one."""
    head = "inputs: {deep: {type: boolean, default: true}}\nconcurrency: {limit: 1}"
    inner = (
        "\n  - {id: call, kind: workflow, workflow: b, when: inputs.deep}\n  - {id: own, kind: generate, prompt: hi}"
    )
    store(worker, flow(inner, name="a", head=head))
    store(worker, flow("\n  - {id: back, kind: workflow, workflow: a, inputs: {deep: 'false'}}", name="b"))
    outer = worker.submit(flow(inner, name="a", head=head))
    other = worker.submit(flow(inner, name="a", head=head))
    worker.work(outer)
    worker.work()
    assert [worker.run(run_id).state for run_id in (outer, other)] == ["succeeded", "succeeded"]


@pytest.mark.parametrize("policy", ["reject", "cancel_running"])
def test_a_called_run_neither_rejects_nor_cancels_its_caller(worker: StepWorker, policy: str) -> None:
    head = f"inputs: {{deep: {{type: boolean, default: true}}}}\nconcurrency: {{limit: 1, policy: {policy}}}"
    steps = "\n  - {id: call, kind: workflow, workflow: a, when: inputs.deep, inputs: {deep: 'false'}}"
    store(worker, flow(steps, name="a", head=head))
    outer = worker.submit(flow(steps, name="a", head=head))
    worker.work()
    assert worker.run(outer).state == "succeeded"


def test_a_called_run_waits_for_other_runs_of_its_key(worker: StepWorker) -> None:
    store(worker, limited("queue"))
    other = worker.submit(limited("queue"), user="ana")
    caller = worker.submit(
        flow("\n  - {id: ask, kind: workflow, workflow: flow, inputs: {user: '\"ana\"'}}", name="caller")
    )
    worker.do(worker.claim("ask", caller), {})
    assert worker.run(worker.step(caller, "ask").called_run_id).state == "blocked"
    worker.work()
    assert [worker.run(run_id).state for run_id in (other, caller)] == ["succeeded", "succeeded"]


def test_the_same_idempotency_key_with_another_event_is_rejected(worker: StepWorker) -> None:
    long = "x" * 100_000
    run_id = worker.submit(flow("\n  - {id: wait, kind: wait, event: paid}\n  - {id: more, kind: wait, event: seen}"))
    event = worker.send_event(run_id, "paid", {"amount": 7, "note": long}, key="k")
    assert worker.send_event(run_id, "paid", {"amount": 7, "note": long}, key="k").id == event.id
    for name, payload in (("paid", {"amount": 8, "note": long}), ("paid", None), ("seen", {"amount": 7, "note": long})):
        with pytest.raises(EventKeyReused, match="'k' belongs to event"):
            worker.send_event(run_id, name, payload, key="k")


def test_a_repeated_event_after_the_end_is_the_same_event(worker: StepWorker) -> None:
    run_id = worker.submit(flow("\n  - {id: wait, kind: wait, event: paid}"))
    worker.work()
    event = worker.send_event(run_id, "paid", 7, key="k")
    assert worker.run(run_id).state == "succeeded"
    assert worker.send_event(run_id, "paid", 7, key="k").id == event.id


def test_a_submission_during_a_resume_is_not_left_paused(worker: StepWorker) -> None:
    """The run is written while its workflow is paused, and commits after the resume."""
    source = flow("\n  - {id: a, kind: generate, prompt: hi}")
    control.pause_workflow(worker.runs, "flow", paused=True)
    assert submitted_during(worker, source, paused=False).paused is False


def test_a_submission_during_a_pause_is_paused(worker: StepWorker) -> None:
    source = flow("\n  - {id: a, kind: generate, prompt: hi}")
    assert submitted_during(worker, source, paused=True).paused is True


def submitted_during(worker: StepWorker, source: str, *, paused: bool) -> Any:
    """Return a run that is written before its workflow is paused or resumed, and commits afterwards."""
    waits = text("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
    prepared = submission.prepare(Submission(check.parse(source), {}), worker.runs.policy)
    steer = threading.Thread(target=control.pause_workflow, args=(worker.runs, "flow"), kwargs={"paused": paused})
    with worker.runs.transaction() as transaction:
        submission.create(transaction, prepared)
        transaction.work.rows(text("SELECT 1"))
        steer.start()
        while steer.is_alive() and not transaction.work.rows(waits):
            pass
    steer.join()
    return worker.run(prepared.id)


def test_a_retried_run_follows_the_current_pause_of_its_workflow(worker: StepWorker) -> None:
    source = flow("\n  - {id: a, kind: generate, prompt: hi, retry: {max_attempts: 1}}")
    before, during = worker.submit(source), worker.submit(source)
    held = worker.claim("a", during)
    worker.work(before, a=failure())
    control.pause_workflow(worker.runs, "flow", paused=True)
    worker.do(held, {"a": failure()})
    control.retry(worker.runs, before)
    assert worker.run(before).paused

    control.pause_workflow(worker.runs, "flow", paused=False)
    control.retry(worker.runs, during)
    assert not worker.run(during).paused
    worker.work()
    assert {worker.run(run_id).state for run_id in (before, during)} == {"succeeded"}


def test_a_cancelled_run_has_the_reason(worker: StepWorker) -> None:
    run_id = worker.submit(flow("\n  - {id: a, kind: generate, prompt: hi}\n  - {id: b, kind: noop, needs: [a]}"))
    held = worker.claim("a")
    worker.runs.cancel(run_id, message="a person wanted that")
    worker.do(held, {"a": failure("cancelled", "cancelled on request")})

    assert worker.run(run_id).error["message"] == "a person wanted that"
    assert worker.step(run_id, "a").error["message"] == "a person wanted that"
    ends = [entry for entry in worker.history(run_id) if entry.event in ("cancelling", "cancelled")]
    assert len(ends) == 5
    assert all("a person wanted that" in str(entry.cause) for entry in ends)


def test_error_messages_have_a_limited_length(worker: StepWorker) -> None:
    """A message can quote a value of any length."""
    long = "x\x00\ud800" + "y" * 1_000_000
    run_id = worker.submit(flow("\n  - {id: a, kind: generate, prompt: hi, retry: {max_attempts: 1}}"))
    worker.work(a=failure("internal", long))

    run = worker.run(run_id)
    assert run.error["message"].startswith("step a: x\ufffd")
    with worker.runs.database.work() as work:
        sizes = work.rows(
            text(
                "SELECT length(error::text) AS n FROM run UNION ALL SELECT length(error::text) FROM step"
                " UNION ALL SELECT length(cause::text) FROM history UNION ALL SELECT length(message) FROM attempt"
            )
        )
    assert max(row.n or 0 for row in sizes) < 10_000


def test_the_error_of_a_run_lists_some_failed_steps_and_counts_the_others(worker: StepWorker) -> None:
    steps = "".join(f"\n  - {{id: s{n}, kind: generate, prompt: hi, retry: {{max_attempts: 1}}}}" for n in range(30))
    run_id = worker.submit(flow(steps))
    worker.work(**{f"s{n}": failure() for n in range(30)})
    error = worker.run(run_id).error
    assert len(error["steps"]) == 20
    assert error["message"].endswith("and 10 other steps")


def test_a_run_that_cannot_be_removed_does_not_block_the_others(worker: StepWorker) -> None:
    """Another transaction has locked one of its steps."""
    source = flow("\n  - {id: a, kind: noop}", head="retention: 1s")
    locked, free = worker.submit(source), worker.submit(source)
    worker.work()
    worker.pass_time(hours=1)
    with worker.runs.database.work() as work:
        work.rows(text("SELECT FROM step WHERE run_id = :id FOR UPDATE"), {"id": locked})
        assert retention.remove_runs(worker.runs.database) == 1
        with pytest.raises(NotFound):
            worker.run(free)
    assert retention.remove_runs(worker.runs.database) == 1


def test_a_large_run_is_removed_in_several_transactions(worker: StepWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The items of its map, and the runs that they called, need several transactions."""
    monkeypatch.setattr(retention, "_ITEMS", 3)
    monkeypatch.setattr(retention, "_RUNS", 2)
    store(worker, flow("\n  - {id: each, kind: map, over: '[1, 2]', step: {kind: noop}}", name="child"))
    calls = "\n  - {id: calls, kind: map, over: '[1, 2, 3]', step: {kind: workflow, workflow: child}}"
    for _ in range(3):
        worker.submit(flow(calls, head="retention: 1s"))
    worker.work()
    worker.pass_time(hours=1)
    assert retention.remove_runs(worker.runs.database) == 3
    with worker.runs.database.work() as work:
        assert work.rows(text("SELECT FROM run")) == work.rows(text("SELECT FROM step")) == []


@pytest.mark.parametrize(("until", "over"), [("0001-01-01T00:00:00+14:00", True), ("9999-12-31T23:59:59-14:00", False)])
def test_waits_until_extreme_instants(worker: StepWorker, until: str, over: bool) -> None:
    """Postgres can store these instants, but Python cannot read them."""
    source = flow("\n  - {id: pause, kind: wait, until: inputs.at}", head="inputs: {at: {type: string}}")
    run_id = worker.submit(source, at=until)
    worker.work()
    assert worker.step(run_id, "pause").state == "awaiting"
    worker.sweep()
    assert (worker.run(run_id).state == "succeeded") is over


@pytest.mark.parametrize("value", [10**400, -(10**400), 1e308, float("inf"), float("nan"), "9" * 400])
def test_huge_durations_are_rejected(value: Any) -> None:
    with pytest.raises(ValueError, match="between 0 and ten years"):
        durations.parse(value)


def test_a_run_that_raises_does_not_stop_a_bulk_cancel(worker: StepWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = (worker.submit(flow("\n  - {id: a, kind: generate, prompt: hi}")) for _ in range(2))
    real = Runs.cancel

    def cancel(runs: Runs, run_id: UUID, **more: Any) -> Any:
        return 1 / 0 if run_id == bad else real(runs, run_id, **more)

    monkeypatch.setattr(Runs, "cancel", cancel)
    bulk = control.cancel_all(worker.runs, control.Filter())
    assert bulk.done == [good]
    assert "ZeroDivisionError" in bulk.refused[bad]
