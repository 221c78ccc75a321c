"""Finish reasons: why the text of a step ended, from the engine to expressions, views and the history."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from app.api.workflows import runs as api
from app.catalog.catalog import Catalog
from app.kernel.activity import Activity
from app.kernel.errors import FailureReason
from app.kernel.security.secrets import Secrets
from app.kernel.settings import Settings
from app.scheduler.wake_up import AgentCalls
from app.workflows.runs import forks, views
from app.workflows.runs.service import Runs
from app.workflows.state_machine.outcomes import Failure, Success, TokenUsage
from tests.workflows.conftest import StepWorker
from workers.engine.engine import LlamaEngine
from workers.leases import Leases
from workers.runtime import Runtime
from workers.steps import run_step

pytestmark = pytest.mark.slow


class Worker:
    """A pool and a control worker in the process of the test."""

    def __init__(self, runs: Runs, engine: LlamaEngine, secrets: Path) -> None:
        self.steps, self._leases = StepWorker(runs), Leases(runs, "w@here/1/x", interval=timedelta(seconds=3))
        self._runtime = Runtime(
            Settings(),
            runs,
            self._leases,
            engine,
            Secrets(secrets),
            Catalog(),
            Activity("redis://127.0.0.1:1"),
            AgentCalls("redis://127.0.0.1:1"),
        )
        self._leases.start()

    def close(self) -> None:
        self._leases.close()

    def run(self, source: str, **inputs: Any) -> views.RunView:
        run_id = self.steps.submit(source, **inputs)
        self.work(run_id)
        return self.view(run_id)

    def work(self, run_id: UUID) -> None:
        while rows := self.steps.ready(run_id):
            run_step(self._runtime, rows[0].id, rows[0].attempt)

    def view(self, run_id: UUID) -> views.RunView:
        return views.run(self.steps.runs.database, run_id)


@pytest.fixture
def worker(runs: Runs, shared: LlamaEngine, tmp_path: Path) -> Iterator[Worker]:
    made = Worker(runs, shared, tmp_path)
    yield made
    made.close()


def step(view: views.RunView, key: str) -> Any:
    return next(step for step in api.out(view, sees_fleet=True).steps if step.key == key)


CUT = """
workflow: w
steps:
  - {id: cut, kind: generate, model: "m:1", prompt: Count to one hundred., max_tokens: 3, sampling: {temperature: 0}}
  - id: whole
    kind: generate
    model: "m:1"
    chat: false
    prompt: "1, 2, 3, 4,"
    stop: [" 7"]
    sampling: {temperature: 0}
  - {id: longer, kind: noop, needs: [cut], when: steps.cut.finish_reason == "length"}
  - id: shown
    kind: join
    needs: [cut, whole]
    template: "{{ steps.cut.finish_reason }} {{ steps.whole.finish_reason }}"
outputs: {reason: steps.cut.finish_reason, shown: steps.shown.output}
"""


def test_the_finish_reason_is_on_the_step_and_for_conditions_templates_outputs_and_history(worker: Worker) -> None:
    view = worker.run(CUT)

    cut, whole = step(view, "cut"), step(view, "whole")
    assert (cut.state, cut.finish_reason, cut.attempts[0].finish_reason) == ("succeeded", "length", "length")
    assert (whole.finish_reason, whole.attempts[0].finish_reason) == ("stop", "stop")
    assert step(view, "longer").state == "succeeded"
    assert step(view, "longer").finish_reason is None
    assert view.run.output == {"reason": "length", "shown": "length stop"}
    causes = {entry.step: entry.cause for entry in worker.steps.history(view.run.id) if entry.event == "succeeded"}
    assert (causes["cut"], causes["whole"]) == ({"finish_reason": "length"}, {"finish_reason": "stop"})


FAILS = """
workflow: w
steps:
  - id: cut
    kind: generate
    model: "m:1"
    prompt: Count to one hundred.
    max_tokens: 3
    sampling: {temperature: 0}
    on_length: fail
    retry: {max_attempts: 2, delay: 0s}
    SCHEMA
"""


@pytest.mark.parametrize(
    "schema",
    ["", "output: {schema: {type: object, required: [text], properties: {text: {type: string, minLength: 80}}}}"],
)
def test_a_cut_text_fails_where_the_step_says_so(worker: Worker, schema: str) -> None:
    view = worker.run(FAILS.replace("SCHEMA", schema))

    cut = step(view, "cut")
    assert (view.run.state, cut.state, cut.finish_reason, cut.error["reason"]) == (
        "failed",
        "failed",
        "length",
        "truncated",
    )
    assert [(one.outcome, one.finish_reason) for one in cut.attempts] == [("truncated", "length")] * 2
    assert "was cut at max_tokens (3)" in cut.error["message"]
    assert cut.attempts[0].text
    assert schema or cut.tokens_out == 6
    failed = [entry for entry in worker.steps.history(view.run.id) if entry.event == "failed" and entry.step]
    assert failed[0].cause["finish_reason"] == "length"


def test_a_json_text_that_is_cut_has_a_finish_reason_too(worker: Worker) -> None:
    schema = "output: {schema: {type: object, required: [text], properties: {text: {type: string, minLength: 80}}}}"
    view = worker.run(FAILS.replace("SCHEMA", schema).replace("on_length: fail", "on_length: keep"))

    assert (step(view, "cut").error["reason"], step(view, "cut").finish_reason) == ("invalid_output", "length")


MAP = """
workflow: w
steps:
  - id: each
    kind: map
    over: "['1, 2, 3, 4,', '1, 2, 3,', '1, 2, 3, 4, 5,']"
    step:
      {kind: generate, model: "m:1", chat: false, prompt: "{{ item }}", stop: [" 5", " 6"], max_tokens: 4,
       sampling: {temperature: 0}}
  - {id: after, kind: noop, needs: [each]}
outputs: {reasons: steps.each.finish_reason, texts: steps.each.output}
"""


def test_a_map_counts_its_cut_items_and_has_the_list_of_reasons(worker: Worker) -> None:
    view = worker.run(MAP)

    each = step(view, "each")
    assert view.run.output["reasons"] == ["stop", "length", "stop"]
    assert (each.items.total, each.items.truncated, each.finish_reason) == (3, 1, None)
    items = worker.steps.items(view.run.id, "each")
    assert [item.finish_reason for item in items] == ["stop", "length", "stop"]
    assert each.tokens_out == sum(item.tokens_out for item in items) > 0

    forked = worker.view(forks.fork(worker.steps.runs, view.run.id, "after", {}).id)
    assert (step(forked, "each").items.truncated, step(forked, "each").state) == (1, "succeeded")
    worker.work(forked.run.id)
    assert worker.view(forked.run.id).run.output == view.run.output


def test_a_new_attempt_forgets_the_reason_of_the_last_one(worker: Worker) -> None:
    run_id = worker.steps.submit(FAILS.replace("SCHEMA", ""))
    first = worker.steps.ready(run_id)[0]
    run_step(worker._runtime, first.id, first.attempt)
    claim = worker.steps.claim("cut", run_id)

    assert claim.attempt == 2
    assert worker.steps.step(run_id, "cut").finish_reason is None


def test_a_map_counts_the_tokens_of_every_attempt_once(runs: Runs) -> None:
    steps = StepWorker(runs)
    run_id = steps.submit(MAP.replace("id: each", "id: each\n    on_error: collect\n    retry: {max_attempts: 1}"))
    steps.do(steps.claim("each", run_id), {})
    usage = TokenUsage(10, 4, finish_reason="length")

    def listed() -> tuple[int, int]:
        (found,) = views.page(runs.database, limit=5).runs
        each = step(views.run(runs.database, run_id), "each")
        assert (found.tokens_in, found.tokens_out) == (each.tokens_in, each.tokens_out)
        return each.tokens_in, each.tokens_out

    first = steps.claim("each[0]", run_id)
    runs.fail(first, steps.owner, Failure(FailureReason.TRUNCATED, "cut", usage=usage))
    assert listed() == (10, 4), "the attempt has ended, the item has not"
    steps.pass_time(minutes=5)
    steps.sweep()
    for key in ("each[0]", "each[1]"):
        runs.succeed(steps.claim(key, run_id), steps.owner, Success("x", usage))
    assert listed() == (30, 12)
    runs.succeed(steps.claim("each[2]", run_id), steps.owner, Success("x", TokenUsage(1, 1, finish_reason="stop")))

    assert listed() == (31, 13)
    each = step(views.run(runs.database, run_id), "each")
    assert (each.state, each.items.truncated) == ("succeeded", 2)
