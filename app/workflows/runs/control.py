"""
Steering: what people do to runs that are under way or over. Pause them, tell them something, cancel a part, do again
what did not succeed, repeat from some step on; one by one, and many at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app import json_schema
from app.kernel import ids, log
from app.kernel.database import UnitOfWork
from app.kernel.errors import (
    ConcurrencyLimitReached,
    Conflict,
    EventKeyReused,
    InvalidInput,
    InvalidTransition,
    NotFound,
    Unavailable,
)
from app.workflows.language import definition as definitions
from app.workflows.language.steps import WaitStep
from app.workflows.runs import messages, submission
from app.workflows.runs.change import RunChange
from app.workflows.runs.claims import known
from app.workflows.runs.messages import send_after_commit
from app.workflows.runs.recovery.abandon import reason_of
from app.workflows.runs.service import Runs
from app.workflows.runs.storage import payloads, store
from app.workflows.runs.storage.payloads import as_json
from app.workflows.runs.submission import Accepted, Submission
from app.workflows.state_machine import events
from app.workflows.state_machine.outcomes import TokenUsage
from app.workflows.state_machine.states import FINAL_RUNS, RunState, StepState

_log = log.get(__name__)

#: Runs of one request in bulk.
BULK = 1000

_PAUSE = text("UPDATE run SET paused = :paused WHERE id = :id AND paused <> :paused")
_PAUSE_WORKFLOW = text("INSERT INTO workflow_pause (name) VALUES (:name) ON CONFLICT DO NOTHING")
_RESUME_WORKFLOW = text("DELETE FROM workflow_pause WHERE name = :name")
_OPEN_RUNS = text("""
    SELECT id FROM run WHERE workflow = :name AND workflow_paused <> :paused AND finished_at IS NULL ORDER BY id
""")
_RENEW_DEADLINE = text("UPDATE run SET deadline_at = now() + (deadline_at - created_at) WHERE id = :id")
_INSERT_EVENT = text("""
    INSERT INTO event (id, run_id, name, payload, payload_sha256, payload_bytes, key)
    VALUES (:id, :run_id, :name, CAST(:payload AS json), :payload_sha256, :payload_bytes, :key)
""")
_COPY_STEPS = text("""
    UPDATE step AS copy SET state = 'succeeded', output = old.output, output_sha256 = old.output_sha256,
                            output_bytes = old.output_bytes, error = old.error, branch = old.branch,
                            attempt = old.attempt, ready_at = now(), started_at = now(), finished_at = now()
    FROM step AS old
    WHERE copy.run_id = :run_id AND old.run_id = :old_id AND old.key = copy.key AND old.parent_id IS NULL
      AND old.key = ANY(:keys) AND old.state = 'succeeded'
    RETURNING copy.key
""")
_COPY_ITEMS = text("""
    INSERT INTO step (id, run_id, parent_id, item, input, input_sha256, input_bytes, key, position, kind, model,
                      model_index, queue, priority, rank, state, delegated, attempt, failures, losses, tokens_in,
                      tokens_out, output, output_sha256, output_bytes, error, branch, finished_at)
    SELECT gen_random_uuid(), :run_id, copy.id, old.item, old.input, old.input_sha256, old.input_bytes, old.key,
           old.position, old.kind, old.model, old.model_index, old.queue, copy.priority, copy.rank, old.state, false,
           old.attempt, 0, 0, 0, 0, old.output, old.output_sha256, old.output_bytes, old.error, old.branch, now()
    FROM step AS old JOIN step AS map ON map.id = old.parent_id
                     JOIN step AS copy ON copy.run_id = :run_id AND copy.key = map.key
    WHERE old.run_id = :old_id AND map.key = ANY(:keys)
""")
_COPY_FAN_OUTS = text("""
    INSERT INTO fan_out (step_id, total, waiting, in_flight, failed, stopping)
    SELECT copy.id, total, 0, 0, failed, false
    FROM fan_out JOIN step AS map ON map.id = fan_out.step_id
                 JOIN step AS copy ON copy.run_id = :run_id AND copy.key = map.key
    WHERE map.run_id = :old_id AND map.key = ANY(:keys)
""")
# Held, so that what is copied from it stays until it is copied.
_RUN = text("""
    SELECT id, workflow, version, sha256, state, priority, rank, labels, inputs, inputs_sha256 FROM run
    WHERE id = :id FOR KEY SHARE
""")
_MATCHING = text("""
    SELECT id FROM run
    WHERE state = ANY(:states) AND (CAST(:workflow AS text) IS NULL OR workflow = :workflow)
      AND labels @> CAST(:labels AS jsonb)
      AND (CAST(:after AS timestamptz) IS NULL OR created_at >= :after)
      AND (CAST(:before AS timestamptz) IS NULL OR created_at < :before)
    ORDER BY id LIMIT :limit
""")


@dataclass(frozen=True, slots=True)
class SentEvent:
    """An event that was taken."""

    id: UUID
    #: The step that it answered; None while it waits for one.
    step: str | None
    #: False when the same key had come before.
    created: bool


@dataclass(frozen=True, slots=True)
class Filter:
    """Which runs. What is None excludes none."""

    states: Sequence[str] | None = None
    workflow: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    created_after: datetime | None = None
    created_before: datetime | None = None


@dataclass(frozen=True, slots=True)
class Bulk:
    """What became of many runs."""

    done: Sequence[UUID]
    #: Runs that had changed in the meantime, and why nothing was done.
    refused: Mapping[UUID, str]
    #: Whether others match that were not looked at.
    more: bool


def pause(runs: Runs, run_id: UUID) -> bool:
    """Let nothing of a run begin; what runs goes on to its end. False when it was paused. Raises NotFound, Conflict."""
    with runs.database.work() as work:
        _open(runs, work, run_id)
        changed = work.run(_PAUSE, {"id": run_id, "paused": True}) == 1
        if changed:
            store.add_event(work, run_id, "paused")
    return changed


def resume(runs: Runs, run_id: UUID) -> bool:
    """Let a paused run go on. False when it was not paused. Raises NotFound, Conflict."""
    with runs.database.work() as work:
        change = _open(runs, work, run_id)
        changed = work.run(_PAUSE, {"id": run_id, "paused": False}) == 1
        if changed:
            store.add_event(work, run_id, "resumed")
            _send_ready(runs, work, run_id)
    if changed and change.run_row.concurrency_key:
        runs.admit(change.run_row.concurrency_key)
    return changed


def pause_workflow(runs: Runs, name: str, *, paused: bool) -> int:
    """Let nothing of a workflow's runs begin, those that are still to come too; or let them go on. Gives how many."""
    with runs.database.work() as work:
        # Submissions under way are waited for: they are found below, and later ones see what is written here.
        store.lock_pause(work, name)
        work.run(_PAUSE_WORKFLOW if paused else _RESUME_WORKFLOW, {"name": name})
    with runs.database.work() as work:
        found = [row.id for row in work.rows(_OPEN_RUNS, {"name": name, "paused": paused})]
    keys: set[str] = set()
    marked = 0
    for run_id in found:
        with runs.database.work() as work:
            row = store.lock_run(work, run_id)
            now_paused = None if row is None or row.state in FINAL_RUNS else store.mark_pause(work, run_id, name)
            if row is None or now_paused is None:
                continue
            marked += 1
            cause = {"message": f"the workflow {name} was"}
            store.add_event(work, run_id, "paused" if now_paused else "resumed", cause)
            if not now_paused:
                _send_ready(runs, work, run_id)
                keys.update({row.concurrency_key} - {None})
    for key in keys:
        runs.admit(key)
    return marked


def cancel_step(runs: Runs, run_id: UUID, key: str) -> StepState:
    """
    Ask one step, or one item of a map, to end; gives its state after that. One that has ended stays as it is.

    Raises NotFound.
    """
    with runs.database.work() as work:
        change = runs.open(work, run_id, key)
        state = change.run.steps[key].state
        change.message = "cancelled on request"
        try:
            change.apply(events.StepCancelRequested(key))
        except InvalidTransition:
            return state
        runs.written(work, change)
        return change.run.steps[key].state


def retry(runs: Runs, run_id: UUID) -> RunState:
    """
    Do again what did not succeed in a run that has failed or was cancelled. Outputs of what succeeded stay, and so do
    the items of a map that did. A deadline counts anew.

    Raises NotFound, Conflict when it goes on or has succeeded, ConcurrencyLimitReached.
    """
    with runs.database.work() as work:
        row = store.lock_run(work, run_id)
        if row is not None:
            # It may have been over when its workflow was paused or resumed.
            store.mark_pause(work, run_id, row.workflow)
        change = runs.open(work, run_id)
        key, rule = change.run_row.concurrency_key, change.graph.definition.concurrency
        if key is not None and rule is not None:
            free = rule.limit - submission.going_on(work, key)
            if free <= 0:
                raise ConcurrencyLimitReached(change.run_row.workflow, key.partition("/")[2], rule.limit)
        change.message = "retried on request"
        change.apply(events.RetryRequested())
        change.write()
        work.run(_RENEW_DEADLINE, {"id": run_id})
    _log.info("run_retried", run_id=str(run_id))
    return change.run.state


def fork(runs: Runs, run_id: UUID, step: str, inputs: Mapping[str, Any]) -> Accepted:
    """
    Run a finished run anew from a step on: that step and all that come after it. The others keep their outputs.

    `inputs` replace those of the same names. Raises NotFound, Conflict when the run goes on, InvalidInput.
    """
    with runs.database.work() as work:
        row = next(iter(payloads.filled(work, work.rows(_RUN, {"id": run_id}), "inputs")), None)
        if row is None:
            raise NotFound("run", str(run_id))
        if row.state not in FINAL_RUNS:
            raise InvalidTransition(f"run {run_id}", row.state, "fork")
        graph = known(work, row.sha256)
        regular = [one.id for one in graph.definition.steps]
        if step not in regular:
            raise NotFound("step", step, regular)
        before = definitions.ancestors(graph.definition)
        kept = [key for key in regular if key != step and step not in before[key]]
        asked = Submission(
            graph.definition,
            {**row.inputs, **inputs},
            row.version,
            row.priority,
            rank=row.rank,
            labels=row.labels,
        )
        prepared = submission.prepare(asked, runs.retention, runs.limits, forked_from=run_id)

        def copy() -> None:
            of = {"run_id": prepared.id, "old_id": run_id, "keys": kept}
            copied = [one.key for one in work.rows(_COPY_STEPS, of)]
            work.run(_COPY_ITEMS, of | {"keys": copied})
            work.run(_COPY_FAN_OUTS, of | {"keys": copied})

        return runs.write(work, prepared, copy)


def send_event(runs: Runs, run_id: UUID, name: str, payload: Any, key: str | None = None) -> SentEvent:
    """
    Give a run an event. It answers the step that waits for it, or the next one that will.

    The same key with the same event gives that again. Raises NotFound for a run, or an event that no step of it waits
    for, InvalidInput when the payload breaks its schema, PayloadTooLarge, EventKeyReused when the key came with another
    event, Conflict when the run has ended.
    """
    given = payloads.encoded(payload, runs.limits, "payload")
    with runs.database.work() as work:
        change = runs.open(work, run_id)
        earlier = None if key is None else store.event_of_key(work, run_id, key)
        if earlier is not None:
            if (earlier.name, payloads.text_of(work, earlier, "payload")) != (name, given):
                raise EventKeyReused(str(key), str(earlier.id), earlier.name)
            return SentEvent(earlier.id, earlier.step, created=False)
        waits = [step for step in change.graph.steps.values() if isinstance(step, WaitStep) and step.signal == name]
        if not waits:
            known_names = {s.signal for s in change.graph.steps.values() if isinstance(s, WaitStep) and s.signal}
            raise NotFound("event of this run", name, sorted(known_names))
        if change.run.state in FINAL_RUNS:
            raise InvalidTransition(f"run {run_id}", change.run.state, f"event {name}")
        open_now = [step for step in waits if change.run.steps[step.id].state is StepState.AWAITING]
        _check_payload((open_now or waits)[0], payload)
        event_id = ids.new_id()
        (kept,) = payloads.keep(work, [given], runs.limits)
        values = {"id": event_id, "run_id": run_id, "name": name, "key": key}
        work.ask(_INSERT_EVENT, values | kept.columns("payload"))
        store.add_event(work, run_id, "event", {"event": name})
        if not open_now:
            return SentEvent(event_id, None, created=True)
        step = open_now[0]
        store.take_event(work, run_id, name, change.rows[step.id].id)
        attempt = change.run.steps[step.id].attempt
        change.succeed(step.id, attempt, payload, TokenUsage(), step.branch_of(payload), given)
        change.write()
        return SentEvent(event_id, step.id, created=True)


def cancel_all(runs: Runs, which: Filter) -> Bulk:
    """Cancel every open run that matches, the oldest first, at most `BULK`."""
    open_states = [state for state in RunState if state not in FINAL_RUNS and state is not RunState.CANCELLING]
    return _all(runs, which, open_states, lambda run_id: runs.cancel(run_id))


def retry_all(runs: Runs, which: Filter) -> Bulk:
    """Retry every run that matches and has failed or was cancelled, the oldest first, at most `BULK`."""
    return _all(runs, which, [RunState.FAILED, RunState.CANCELLED], lambda run_id: retry(runs, run_id))


def _all(runs: Runs, which: Filter, states: Sequence[RunState], act: Any) -> Bulk:
    wanted = [state.value for state in states if which.states is None or state.value in which.states]
    values = {
        "states": wanted,
        "workflow": which.workflow,
        "labels": as_json(dict(which.labels)),
        "after": which.created_after,
        "before": which.created_before,
        "limit": BULK + 1,
    }
    with runs.database.work() as work:
        found = [row.id for row in work.rows(_MATCHING, values)]
    done, refused = [], {}
    for run_id in found[:BULK]:
        try:
            act(run_id)
            done.append(run_id)
        except (Conflict, NotFound) as error:
            refused[run_id] = str(error)
        except Unavailable:
            raise
        except Exception as error:  # noqa: BLE001 the shell of one run among many
            _log.exception("run_broke", run_id=str(run_id))
            refused[run_id] = reason_of(error, "handling this run")
    return Bulk(done, refused, more=len(found) > BULK)


def _open(runs: Runs, work: UnitOfWork, run_id: UUID) -> RunChange:
    change = runs.open(work, run_id)
    if change.run.state in FINAL_RUNS:
        raise InvalidTransition(f"run {run_id}", change.run.state, "pause or resume")
    return change


def _send_ready(runs: Runs, work: UnitOfWork, run_id: UUID) -> None:
    row = store.lock_run(work, run_id)
    if row is None or row.paused:
        return
    for step in store.touch_run(work, run_id):
        send_after_commit(work, runs.publisher, messages.of(step, row.workflow))


def _check_payload(step: WaitStep, payload: Any) -> None:
    problems = json_schema.value_problems(step.payload, payload, "payload")
    if problems:
        raise InvalidInput(problems, "event")
