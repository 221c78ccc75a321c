"""
Control of runs by people: pause and resume, cancel steps, send events, retry; for one run, and for many at a time.

Each function is one transaction on a run. `runs` is the service, with the database and the settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app import json_schema
from app.access import namespaces
from app.kernel import ids, log
from app.kernel.errors import (
    ConcurrencyLimitReached,
    Conflict,
    EventKeyReused,
    InvalidInput,
    InvalidTransition,
    NotFound,
    Unavailable,
)
from app.workflows.language.steps import WaitStep
from app.workflows.runs import admission
from app.workflows.runs.changes.change import open_change
from app.workflows.runs.changes.effects import AdmitRuns
from app.workflows.runs.changes.transactions import RunTransaction
from app.workflows.runs.maps import write_change
from app.workflows.runs.messages import StepMessage
from app.workflows.runs.recovery.abandon import reason_of
from app.workflows.runs.service import Runs
from app.workflows.runs.storage import agent_items, history, pauses, payloads, received_events, store
from app.workflows.runs.storage.history import HistoryEntry
from app.workflows.runs.storage.payloads import as_json
from app.workflows.runs.storage.selected import LockedRun
from app.workflows.state_machine import events
from app.workflows.state_machine.outcomes import TokenUsage
from app.workflows.state_machine.states import FINAL_RUNS, RunState, StepState

_log = log.get(__name__)

#: The most runs that one bulk request handles.
BULK = 1000

_OF_NAMESPACE = "namespace = :namespace AND"
_RENEW_DEADLINE = text("UPDATE run SET deadline_at = now() + (deadline_at - created_at) WHERE id = :id")
_MATCHING = """
    SELECT id FROM run
    WHERE {namespace} state = ANY(:states) AND (CAST(:workflow AS text) IS NULL OR workflow = :workflow)
      AND labels @> CAST(:labels AS jsonb)
      AND (CAST(:after AS timestamptz) IS NULL OR created_at >= :after)
      AND (CAST(:before AS timestamptz) IS NULL OR created_at < :before)
      AND (CAST(:ids AS uuid[]) IS NULL OR id = ANY(:ids))
    ORDER BY id LIMIT :limit
"""
#: With and without a condition on the namespace, so that each has a plan of its own.
_MATCHING_ALL, _MATCHING_OF = text(_MATCHING.format(namespace="")), text(_MATCHING.format(namespace=_OF_NAMESPACE))


@dataclass(frozen=True, slots=True)
class SentEvent:
    """An event that was received."""

    id: UUID
    #: The step that it answered; None while it waits for one.
    step: str | None
    #: False when the same key had come before.
    created: bool


@dataclass(frozen=True, slots=True)
class Filter:
    """A filter of runs. A field that is None excludes none."""

    states: Sequence[str] | None = None
    workflow: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    created_after: datetime | None = None
    created_before: datetime | None = None
    ids: Sequence[UUID] | None = None
    #: Only runs of this namespace.
    namespace: str | None = None


@dataclass(frozen=True, slots=True)
class Bulk:
    """The result of a bulk request."""

    done: Sequence[UUID]
    #: Runs that had changed in the meantime, and why nothing was done.
    refused: Mapping[UUID, str]
    #: Whether more runs match.
    more: bool


def pause(runs: Runs, run_id: UUID) -> bool:
    """Begin no further step of a run; running steps continue. False when it was paused. Raises NotFound, Conflict."""
    with runs.transaction() as transaction:
        _require_open(transaction, run_id)
        changed = pauses.set_run(transaction.work, run_id, paused=True)
        if changed:
            history.add(transaction.work, HistoryEntry(run_id, "paused"))
    return changed


def resume(runs: Runs, run_id: UUID) -> bool:
    """Resume a paused run. False when it was not paused. Raises NotFound, Conflict."""
    with runs.transaction() as transaction:
        locked = _require_open(transaction, run_id)
        changed = pauses.set_run(transaction.work, run_id, paused=False)
        if changed:
            history.add(transaction.work, HistoryEntry(run_id, "resumed"))
            _send_ready(transaction, run_id)
            if locked.concurrency_key:
                transaction.effects.append(AdmitRuns(locked.concurrency_key))
    return changed


def pause_workflow(runs: Runs, name: str, *, paused: bool, namespace: str = namespaces.DEFAULT) -> int:
    """Pause or resume the runs of a workflow, future ones included; returns the number of open runs concerned."""
    with runs.transaction() as transaction:
        # Submissions in flight end first: their runs are found below, and later ones see the pause.
        pauses.set_workflow(transaction.work, namespace, name, paused=paused)
    with runs.transaction() as transaction:
        found = pauses.stale_runs(transaction.work, namespace, name, paused=paused)
    keys: set[str] = set()
    marked = 0
    for run_id in found:
        with runs.transaction() as transaction:
            locked = store.lock_run(transaction.work, run_id)
            if locked is None or locked.state in FINAL_RUNS:
                continue
            now_paused = pauses.sync_run(transaction.work, run_id, namespace, name)
            if now_paused is None:
                continue
            marked += 1
            cause = {"message": f"the workflow {name} was"}
            history.add(transaction.work, HistoryEntry(run_id, "paused" if now_paused else "resumed", cause))
            if not now_paused:
                _send_ready(transaction, run_id)
                if locked.concurrency_key is not None:
                    keys.add(locked.concurrency_key)
    for key in keys:
        runs.admit(key)
    return marked


def cancel_step(runs: Runs, run_id: UUID, key: str) -> StepState:
    """
    Request the end of one step, or of one item of a map; returns its state then. One that has ended stays as it is.

    Raises NotFound.
    """
    with runs.transaction() as transaction:
        change = open_change(transaction, run_id, key)
        state = change.run.steps[key].state
        change.message = "cancelled on request"
        try:
            change.apply(events.StepCancelRequested(key))
        except InvalidTransition:
            return state
        write_change(change)
        return change.run.steps[key].state


def retry(runs: Runs, run_id: UUID) -> RunState:
    """
    Retry the steps that did not succeed in a failed or cancelled run. Outputs of steps and of items of maps that
    succeeded are kept. A deadline counts anew.

    Raises NotFound, Conflict when it is open or has succeeded, ConcurrencyLimitReached.
    """
    with runs.transaction() as transaction:
        work = transaction.work
        locked = store.lock_run(work, run_id)
        if locked is not None:
            # Its workflow may have been paused or resumed after its end.
            pauses.sync_run(work, run_id, locked.namespace, locked.workflow)
        change = open_change(transaction, run_id)
        key, rule = change.locked.concurrency_key, change.graph.definition.concurrency
        if key is not None and rule is not None and len(admission.in_flight(work, key)) >= rule.limit:
            raise ConcurrencyLimitReached(change.locked.workflow, admission.shown(key), rule.limit)
        change.message = "retried on request"
        change.apply(events.RetryRequested())
        change.write()
        agent_items.reopen(work, run_id)
        work.run(_RENEW_DEADLINE, {"id": run_id})
    _log.info("run_retried", run_id=str(run_id))
    return change.run.state


def send_event(runs: Runs, run_id: UUID, name: str, payload: Any, key: str | None = None) -> SentEvent:
    """
    Send an event to a run. It answers the step that waits for it, or the next one that will.

    The same key with the same event returns that event. Raises NotFound for a run, or an event for which none of its
    steps waits, InvalidInput when the payload breaks its schema, PayloadTooLarge, EventKeyReused when the key came with
    another event, Conflict when the run has ended.
    """
    given = payloads.encoded(payload, runs.policy.limits, "payload")
    with runs.transaction() as transaction:
        work = transaction.work
        change = open_change(transaction, run_id)
        earlier = None if key is None else received_events.of_key(work, run_id, key)
        if earlier is not None:
            if (earlier.name, payloads.text_of(work, earlier.payload, earlier.payload_sha256)) != (name, given):
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
        (kept,) = payloads.keep(work, [given], runs.policy.limits)
        received_events.insert(work, event_id, run_id, name, kept, key)
        history.add(work, HistoryEntry(run_id, "event", {"event": name}))
        if not open_now:
            return SentEvent(event_id, None, created=True)
        step = open_now[0]
        received_events.take(work, run_id, name, change.steps[step.id].id)
        attempt = change.run.steps[step.id].attempt
        change.succeed(step.id, attempt, payload, TokenUsage(), step.branch_of(payload), given)
        change.write()
        return SentEvent(event_id, step.id, created=True)


def cancel_all(runs: Runs, filter_: Filter) -> Bulk:
    """Cancel every open run that matches, the oldest first, at most `BULK`."""
    open_states = [state for state in RunState if state not in FINAL_RUNS and state is not RunState.CANCELLING]
    return _for_all(runs, filter_, open_states, lambda run_id: runs.cancel(run_id))


def retry_all(runs: Runs, filter_: Filter) -> Bulk:
    """Retry every run that matches and has failed or was cancelled, the oldest first, at most `BULK`."""
    return _for_all(runs, filter_, [RunState.FAILED, RunState.CANCELLED], lambda run_id: retry(runs, run_id))


def _for_all(runs: Runs, filter_: Filter, states: Sequence[RunState], act: Callable[[UUID], object]) -> Bulk:
    values = {
        "states": [state.value for state in states if filter_.states is None or state.value in filter_.states],
        "workflow": filter_.workflow,
        "labels": as_json(dict(filter_.labels)),
        "after": filter_.created_after,
        "before": filter_.created_before,
        "ids": None if filter_.ids is None else list(filter_.ids),
        "limit": BULK + 1,
        "namespace": filter_.namespace,
    }
    matching = _MATCHING_ALL if filter_.namespace is None else _MATCHING_OF
    with runs.transaction() as transaction:
        found = [row.id for row in transaction.work.rows(matching, values)]
    done, refused = [], {}
    for run_id in found[:BULK]:
        try:
            act(run_id)
            done.append(run_id)
        except (Conflict, NotFound) as error:
            refused[run_id] = str(error)
        except Unavailable:
            raise
        except Exception as error:  # noqa: BLE001 one run must not stop the others
            _log.exception("run_control_failed", run_id=str(run_id))
            refused[run_id] = reason_of(error, "handling this run")
    return Bulk(done, refused, more=len(found) > BULK)


def _require_open(transaction: RunTransaction, run_id: UUID) -> LockedRun:
    locked = store.lock_run(transaction.work, run_id)
    if locked is None:
        raise NotFound("run", str(run_id))
    if locked.state in FINAL_RUNS:
        raise InvalidTransition(f"run {run_id}", locked.state, "pause or resume")
    return locked


def _send_ready(transaction: RunTransaction, run_id: UUID) -> None:
    """Send the messages of the ready steps of a run, unless it is paused."""
    locked = store.lock_run(transaction.work, run_id)
    if locked is None or locked.paused:
        return
    ready = store.touch_run(transaction.work, run_id)
    transaction.effects.extend(StepMessage.of(step, locked.workflow) for step in ready)


def _check_payload(step: WaitStep, payload: Any) -> None:
    problems = json_schema.value_problems(step.payload, payload, "payload")
    if problems:
        raise InvalidInput(problems, "event")
