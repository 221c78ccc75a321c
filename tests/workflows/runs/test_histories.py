"""Random histories on the real database: maps, calls, waits and limits, with deaths, cancels, pauses and retries."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from app.kernel.errors import FailureReason, LeaseLost
from app.workflows import registry
from app.workflows.language import check
from app.workflows.runs import control
from app.workflows.runs.service import Runs
from app.workflows.state_machine.outcomes import Failure
from app.workflows.state_machine.states import FINAL_RUNS
from tests.workflows.conftest import StepWorker, failure
from tests.workflows.language.test_language import flow

CALLED = flow("\n  - {id: inner, kind: generate, prompt: hi, retry: {max_attempts: 2, delay: 0s}}", name="called")
EVERYTHING = flow(
    """
  - id: each
    kind: map
    over: "[1, 2, 3, 4]"
    max_parallel: 2
    on_error: {on_error}
    retry: {max_attempts: 2, delay: 0s}
    step: {kind: generate, prompt: "{{ item }}", retry: {max_attempts: 2, delay: 0s}}
  - {id: calls, kind: map, over: "[1, 2]", step: {kind: workflow, workflow: called, retry: {max_attempts: 1}}}
  - {id: call, kind: workflow, workflow: called, needs: [each], join: all_done, retry: {max_attempts: 2, delay: 0s}}
  - {id: nap, kind: wait, event: wake, expires: 1h, on_timeout: continue, needs: [calls]}
  - {id: late, kind: generate, prompt: hi, needs: [nap.timed_out], retry: {max_attempts: 1}}
  - {id: end, kind: join, needs: [call, late], join: any}
""",
    head="concurrency: {limit: 2}\non_failure: [{id: undo, kind: generate, prompt: hi}]",
)
_GOING_ON = text("""
    SELECT count(*) AS n FROM run
    WHERE workflow = 'flow' AND state NOT IN ('blocked', 'succeeded', 'failed', 'cancelled')
""")
_TWICE = text("""
    SELECT step.key, count(*) FROM attempt JOIN step ON step.id = attempt.step_id
    WHERE outcome = 'succeeded' GROUP BY step.id HAVING count(*) > 1
""")
_LEFT_OPEN = text("""
    SELECT step.key, step.state FROM step JOIN run ON run.id = step.run_id
    WHERE run.finished_at IS NOT NULL AND step.state NOT IN ('succeeded', 'failed', 'skipped', 'cancelled')
""")
_COUNTS = text("""
    SELECT fan_out.total, fan_out.waiting, fan_out.in_flight, step.state,
           (SELECT count(*) FROM step AS item WHERE item.parent_id = step.id AND item.state = 'pending') AS pending,
           (SELECT count(*) FROM step AS item WHERE item.parent_id = step.id
            AND item.state IN ('ready', 'waiting', 'running', 'awaiting', 'cancelling')) AS open
    FROM fan_out JOIN step ON step.id = fan_out.step_id WHERE step.state IN ('awaiting', 'cancelling')
""")
_END_LEASES = text("UPDATE step SET lease_until = now() - interval '1 s' WHERE id = :id AND lease_until IS NOT NULL")

ACTIONS = ("claim", "claim", "claim", "done", "done", "done", "fails", "dies", "late", "again", "time", "rare")
RARE = ("cancel", "cancel step", "cancel item", "pause", "resume", "retry", "wake", "submit")


class World:
    """Workers, a sweep and people, with random actions."""

    def __init__(self, runs: Runs, on_error: str) -> None:
        self.worker = StepWorker(runs)
        definition = check.parse(CALLED)
        registry.put(runs.database, "called", definition)
        self.source = EVERYTHING.replace("{on_error}", on_error)
        self.run_ids = [self.worker.submit(self.source) for _ in range(3)]
        self.held: list[Any] = []
        #: Claims whose holder was taken for dead, and may still come.
        self.dead: list[Any] = []

    def act(self, data: st.DataObject) -> None:
        action = data.draw(st.sampled_from(ACTIONS), label="action")
        runs, worker = self.worker.runs, self.worker
        match action:
            case "claim" if ready := worker.ready():
                row = data.draw(st.sampled_from(ready[:4]))
                claim = runs.claim(row.id, row.attempt, worker.owner)
                self.held += [claim] if claim else []
            case "done" | "fails" if self.held:
                claim = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
                answer = "text" if action == "done" else failure()
                self.held += [following] if (following := worker.do(claim, dict.fromkeys(_KEYS, answer))) else []
            case "dies" if self.held:
                claim = self.held.pop()
                with runs.database.work() as work:
                    work.run(_END_LEASES, {"id": claim.step_id})
                self.dead.append(claim)
                worker.sweep()
            case "late" if self.dead:
                worker.do(self.dead.pop(), {})
            case "again" if self.held:
                claim = self.held[-1]
                assert runs.claim(claim.step_id, claim.attempt, "another") is None, "no attempt is claimed twice"
            case "time":
                worker.pass_time(minutes=data.draw(st.sampled_from([1, 90])))
                worker.sweep()
            case "rare":
                self.rare(data)

    def rare(self, data: st.DataObject) -> None:
        runs, run_id = self.worker.runs, data.draw(st.sampled_from(self.run_ids))
        ended = self.worker.run(run_id).state in FINAL_RUNS
        match data.draw(st.sampled_from(RARE), label="rare"):
            case "cancel":
                runs.cancel(run_id)
            case "cancel step":
                control.cancel_step(runs, run_id, data.draw(st.sampled_from(["each", "calls", "call", "nap", "undo"])))
            case "cancel item" if self.worker.step(run_id, "each").items:
                control.cancel_step(runs, run_id, f"each[{data.draw(st.integers(0, 3))}]")
            case "pause" if not ended:
                control.pause(runs, run_id)
            case "resume" if not ended:
                control.resume(runs, run_id)
            case "retry" if self.worker.run(run_id).state in ("failed", "cancelled"):
                if self.going_on() < 2:
                    control.retry(runs, run_id)
            case "wake" if not ended:
                self.worker.send_event(run_id, "wake")
            case "submit" if len(self.run_ids) < 5:
                self.run_ids.append(self.worker.submit(self.source))

    def going_on(self) -> int:
        with self.worker.runs.database.work() as work:
            row = work.row(_GOING_ON)
            assert row is not None
            count: int = row.n
            return count

    def check(self) -> None:
        assert self.going_on() <= 2, "the limit holds"
        with self.worker.runs.database.work() as work:
            assert work.rows(_LEFT_OPEN) == [], "a run that has ended leaves nothing open"
            for row in work.rows(_COUNTS):
                assert (row.waiting, row.in_flight) == (row.pending, row.open), "the counts are those of the items"

    def finish(self) -> None:
        """Resume paused runs, do all work and let time pass: every run ends."""
        worker = self.worker
        for run_id in self.run_ids:
            if worker.run(run_id).state not in FINAL_RUNS:
                control.resume(worker.runs, run_id)
        for claim in self.held:
            outcome = Failure(FailureReason.CANCELLED, "stopped")
            with contextlib.suppress(LeaseLost):
                worker.runs.fail(claim, worker.owner, outcome)
        for _ in range(12):
            worker.work()
            worker.pass_time(hours=2)
            worker.sweep()
        states = Counter(worker.run(run_id).state for run_id in self.run_ids)
        assert set(states) <= FINAL_RUNS, states
        self.check()


_KEYS = ("each", "inner", "late", "undo")


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["fail", "collect"]), st.data())
def test_every_run_ends_and_every_step_is_done_once(runs: Runs, on_error: str, data: st.DataObject) -> None:
    """No step succeeds twice, ended runs leave no step open, limits hold and items are counted correctly."""
    with runs.database.work() as work:
        work.run(text("TRUNCATE definition CASCADE"))
    world = World(runs, on_error)
    for _ in range(data.draw(st.integers(5, 60), label="actions")):
        world.act(data)
        world.check()
    world.finish()
