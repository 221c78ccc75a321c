"""
A change of one run, or of one item of a map, under the lock of the run: events are applied, then the result is written.

Every event passes through the transition table. What has changed is written once, at the end, in the transaction that
holds the lock; what follows the commit is added to the effects of that transaction.
Conditions, switches and the run's output are computed in between: they are bounded, and wait for nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from app.catalog.model import slug
from app.kernel import log
from app.kernel.broker import IO_QUEUE, model_queue
from app.kernel.errors import FailureReason, NotFound, StepFailure, shortened
from app.workflows.language.agent import CALL
from app.workflows.language.graph import Graph, Reads
from app.workflows.language.rule import StepRule
from app.workflows.language.steps import FANNED_KINDS, AgentStep, SwitchStep
from app.workflows.runs.changes import decisions, effects, explanations
from app.workflows.runs.changes.data import RunData
from app.workflows.runs.changes.effects import CancelCalledRuns
from app.workflows.runs.changes.transactions import RunTransaction
from app.workflows.runs.messages import StepMessage
from app.workflows.runs.storage import graphs, history, items, payloads, store
from app.workflows.runs.storage.history import HistoryEntry
from app.workflows.runs.storage.payloads import Kept, as_json
from app.workflows.runs.storage.selected import LockedItem, LockedRun, LockedStep
from app.workflows.state_machine import events, fan_out, transitions
from app.workflows.state_machine.events import Event
from app.workflows.state_machine.fan_out import FanOut
from app.workflows.state_machine.outcomes import TokenUsage
from app.workflows.state_machine.run import Run, RunStep
from app.workflows.state_machine.states import FINAL_STEPS, RunState, StepState

_log = log.get(__name__)

#: Kinds so short that their holder continues with the next one of the run without a message in between.
SHORT = frozenset({"noop", "join", "transform"})
#: States of the items of maps that the history has; it would be too long with all.
_ITEM_HISTORY = frozenset({StepState.WAITING, StepState.FAILED, StepState.CANCELLING, StepState.CANCELLED})
_NO_USAGE = TokenUsage()


def queue_of(models: Sequence[str], index: int = 0) -> str:
    """The queue of the workers for a step that needs one of these models."""
    return model_queue(slug(models[index])) if models else IO_QUEUE


@dataclass(slots=True)
class _StepNotes:
    """What is written about a step in addition to its state."""

    error: dict[str, Any] | None = None
    awaits: Mapping[str, Any] | None = None
    delay: timedelta | None = None
    not_before: datetime | None = None
    #: Who has claimed it in this transaction.
    owner: str | None = None
    usage: TokenUsage = _NO_USAGE


class RunChange:
    """A run, or one item of a map, under the run's lock."""

    def __init__(
        self,
        transaction: RunTransaction,
        graph: Graph,
        locked: LockedRun,
        steps: Sequence[LockedStep],
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        self.transaction, self.graph, self.locked = transaction, graph, locked
        self.steps = {step.key: step for step in steps}
        #: The item, where only one is changed.
        self.item = steps[0] if len(steps) == 1 and isinstance(steps[0], LockedItem) else None
        known = {step.key: _run_step(step, _rule(graph, step)) for step in steps}
        if self.item is not None:
            state = RunState.CANCELLING if self.item.state == StepState.CANCELLING else RunState.RUNNING
            before = Run(str(locked.id), state, known)
        else:
            ending = RunState(locked.ending) if locked.ending else None
            before = Run(str(locked.id), RunState(locked.state), known, ending, computes_output=True)
        self._before, self.run = before, transitions.tracked(before)
        self._data = RunData(transaction, locked, inputs)
        self._commands: list[events.Command] = []
        self._notes: dict[str, _StepNotes] = {}
        #: The run's output as JSON.
        self._output: str | None = None
        #: Why the run will not succeed, where no step says it.
        self.run_error: str | None = None
        #: Why, for the history: what a caller knows and the states do not say.
        self.message: str | None = None

    def apply(self, event: Event) -> None:
        """Apply an event and those that follow from it at once. Raises InvalidTransition when it cannot happen."""
        waiting: deque[Event] = deque([event])
        while waiting:
            advanced = transitions.proceed(self.run, waiting.popleft())
            self.run = advanced.run
            for command in advanced.commands:
                following = self._execute(command)
                if following is not None:
                    waiting.append(following)

    def succeed(
        self, key: str, attempt: int, output: Any, usage: TokenUsage, branch: str | None = None, text: str | None = None
    ) -> None:
        """A step has succeeded. `text` is its output as JSON, where the caller has it."""
        self._note(key).usage = usage
        self._data.put(key, output, text)
        self.apply(events.StepSucceeded(key, attempt, branch))

    def succeed_delegated(self, key: str, attempt: int, usage: TokenUsage) -> None:
        """The items of a map have ended well; their outputs are its output."""
        self._note(key).usage = usage
        self.apply(events.StepSucceeded(key, attempt))

    def fail(
        self,
        key: str,
        attempt: int,
        reason: FailureReason,
        message: str,
        *,
        usage: TokenUsage = _NO_USAGE,
        not_before: timedelta = timedelta(0),
        final: bool = False,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """An attempt of a step has failed; the retry rule decides what follows."""
        notes = self._note(key)
        notes.usage = usage
        error = {"reason": reason, "message": shortened(message), "attempt": attempt, **(details or {})}
        if self.run.steps[key].state is StepState.CANCELLING:
            # Why it was stopped says more than that it has stopped.
            earlier = self.steps[key].error or {}
            if earlier.get("attempt") == attempt:
                error = dict(earlier)
            elif reason is FailureReason.CANCELLED and (cause := (self.locked.error or {}).get("message")):
                error["message"] = cause
        notes.error = error
        policy, late = self.transaction.policy, bool(self.steps[key].late)
        retryable = self._retryable(key, error)
        self.apply(
            events.StepFailed(
                key, attempt, reason, policy.chance(), policy.max_worker_losses, retryable, late, not_before, final
            )
        )

    def leave(
        self,
        key: str,
        attempt: int,
        awaits: Mapping[str, Any],
        *,
        delegated: bool,
        delay: timedelta | None = None,
        until: datetime | None = None,
    ) -> None:
        """The holder leaves a step: it waits, or its work is delegated."""
        notes = self._note(key)
        notes.awaits, notes.delay, notes.not_before = awaits, delay, until
        self.apply(events.StepAwaited(key, attempt, delegated))

    def resume(self, key: str, attempt: int, usage: TokenUsage) -> None:
        """The items of an agent have ended: a worker decides how it goes on. `usage` is what they have used."""
        self._note(key).usage = usage
        self.apply(events.StepResumed(key, attempt))

    def note_error(self, key: str, error: Mapping[str, Any]) -> None:
        """Store an error with a step, whatever its state becomes."""
        self._note(key).error = dict(error)

    def claim_short(self, key: str, owner: str) -> events.DispatchStep | None:
        """Claim one short step that follows on the queue of `key`, instead of sending a message about it."""
        queue = self.steps[key].queue
        if self.locked.paused:
            return None
        for command in self._commands:
            if not isinstance(command, events.DispatchStep):
                continue
            if self.steps[command.key].kind in SHORT and queue == IO_QUEUE:
                self._commands.remove(command)
                self.apply(events.StepClaimed(command.key, command.attempt))
                self._note(command.key).owner = owner
                return command
        return None

    def data(self, reads: Reads) -> dict[str, Any]:
        """
        The data for an expression or a template that reads these parts of the run, this change included.

        Raises StepFailure when that is too much.
        """
        noted = {key: self._notes[key] for key in reads.steps if key in self._notes}
        errors = {key: notes.error for key, notes in noted.items() if notes.error}
        finish_reasons = {key: one for key, notes in noted.items() if (one := notes.usage.finish_reason)}
        return self._data.of(reads, self.run, errors, finish_reasons)

    def usage(self, key: str) -> TokenUsage:
        """What a step has used in this change."""
        return (self._notes.get(key) or _StepNotes()).usage

    def write(self) -> None:
        """Write what has changed, and add what follows to the effects of the transaction."""
        work = self.transaction.work
        delays: dict[str, timedelta] = {}
        ended: RunState | None = None
        for command in self._commands:
            match command:
                case events.DispatchStep(key, attempt):
                    self._send(key, attempt)
                case events.DelayStep(key, delay):
                    delays[key] = delay
                case events.FinishRun(state):
                    ended = state
                case _:
                    raise AssertionError(f"it was executed at once: {command}")
        changed = [
            step for key, step in self.run.steps.items() if step != self._before.steps[key] or key in self._notes
        ]
        texts = [self._data.texts.get(step.key) for step in changed]
        kept = payloads.keep(work, texts, self.transaction.policy.limits)
        store.move_steps(work, [self._columns(step, delays.get(step.key), kept[n]) for n, step in enumerate(changed)])
        moved = [step for step in changed if step != self._before.steps[step.key]]
        if self.item is not None and not isinstance(self.graph.steps[self.item.key.partition("[")[0]], AgentStep):
            moved = [step for step in moved if step.state in _ITEM_HISTORY]
        entries = [self._entry(step, delays.get(step.key)) for step in moved]
        if self.item is None and (self.run.state, self.run.ending) != (self._before.state, self._before.ending):
            entries.append(self._write_run(ended))
        history.add(work, *entries)

    def _note(self, key: str) -> _StepNotes:
        return self._notes.setdefault(key, _StepNotes())

    def _execute(self, command: events.Command) -> Event | None:
        """Execute a command now, or keep it for the end. Returns the event that follows."""
        match command:
            case events.DecideStep(key):
                return self._decide(key)
            case events.ComputeOutput():
                return self._compute_output()
            case events.StopStep(key):
                return self._stop(key)
            case events.NoteGivenUp(key, message):
                notes = self._note(key)
                notes.error = {"given_up": message} | (notes.error or {})  # a condition that failed is the reason
            case _:
                self._commands.append(command)
        return None

    def _decide(self, key: str) -> Event:
        step = self.graph.steps[key]
        try:
            data = self.data(self.graph.decision_reads[key])
            if not decisions.holds(step, data):
                return events.StepDecided(key, holds=False)
            if not isinstance(step, SwitchStep):
                return events.StepDecided(key, holds=True)
            branch = decisions.branch(step, data)
            self._data.put(key, branch)
            return events.StepDecided(key, holds=True, switch=True, branch=branch)
        except StepFailure as error:
            self.note_error(key, {"reason": error.reason, "message": shortened(error.message), "attempt": 0})
            return events.StepDecided(key, holds=None)

    def _compute_output(self) -> Event:
        try:
            data = self.data(self.graph.output_reads)
            output = decisions.output(self.graph.definition, data, iter(self.run.steps))
            self._output = payloads.encoded_output(output, self.transaction.policy.limits)
        except StepFailure as error:
            self.run_error = shortened(f"the output of the run cannot be computed: {error.message}")
            return events.OutputComputed(made=False)
        return events.OutputComputed(made=True)

    def _stop(self, key: str) -> Event | None:
        """Notify the holder at commit, stop the items now, or cancel the called run after the commit."""
        step, state = self.steps[key], self.run.steps[key]
        if not state.delegated:
            store.notify_stop(self.transaction.work, step.id)
            return None
        if step.parent_id is not None or not isinstance(self.graph.steps[key], FANNED_KINDS):
            self.transaction.effects.append(CancelCalledRuns(step.id))
            return None
        fan = stop_items(self.transaction, step.id)
        if fan is None or fan.in_flight:
            return None
        return events.StepFailed(key, state.attempt, FailureReason.CANCELLED, 0.0, 1)

    def _retryable(self, key: str, error: dict[str, Any]) -> bool:
        """Whether the condition of the retry rule holds; where it cannot be computed, `error` says why."""
        condition = self.run.steps[key].rule.retry.when
        if condition is None:
            return True
        try:
            return decisions.retryable(condition, error)
        except StepFailure as failure:
            error["given_up"] = shortened(failure.message)
            return False

    def _send(self, key: str, attempt: int) -> None:
        if self.locked.paused:
            return
        step, index = self.steps[key], self.run.steps[key].model
        queue = step.queue if index == step.model_index else queue_of(self._models(step), index)
        name = f"{self.locked.workflow}/{key}"
        self.transaction.effects.append(StepMessage(step.id, attempt, queue, step.priority, step.rank, name))

    def _models(self, step: LockedStep) -> tuple[str, ...]:
        definition = self.graph.steps[step.key.partition("[")[0]]
        if step.parent_id is None and isinstance(definition, FANNED_KINDS):
            return ()
        return () if step.kind == CALL else self.graph.models(definition.id)

    def _columns(self, step: RunStep, delay: timedelta | None, output: Kept) -> dict[str, Any]:
        """The values of the columns of a step."""
        notes, stored = self._notes.get(step.key) or _StepNotes(), self.steps[step.key]
        models = self._models(stored)
        return output.columns("output") | {
            "id": stored.id,
            "state": step.state,
            "attempt": step.attempt,
            "failures": step.failures,
            "losses": step.losses,
            "branch": step.branch,
            "delegated": step.delegated,
            "model": models[step.model] if models else None,
            "model_index": step.model,
            "queue": queue_of(models, step.model),
            "owner": notes.owner,
            "lease": self.transaction.policy.lease,
            "delay": delay or notes.delay,
            "not_before": notes.not_before,
            "total": getattr(self.graph.steps.get(step.key), "total_timeout", None),
            "awaits": None if notes.awaits is None else as_json(notes.awaits),
            "final": step.state in FINAL_STEPS,
            "has_output": step.key in self._data.texts,
            "error": None if notes.error is None else as_json(notes.error),
            "tokens_in": notes.usage.tokens_in,
            "tokens_out": notes.usage.tokens_out,
            "finish_reason": notes.usage.finish_reason,
        }

    def _entry(self, step: RunStep, delay: timedelta | None) -> HistoryEntry:
        notes = self._notes.get(step.key) or _StepNotes()
        delay_s = None if delay is None else delay.total_seconds()
        cause = explanations.of_step(self.run, step, notes.error, notes.awaits, self.message, delay_s)
        if notes.usage.finish_reason is not None and step.state in FINAL_STEPS | {StepState.WAITING}:
            cause["finish_reason"] = notes.usage.finish_reason
        if step.model != self._before.steps[step.key].model:
            cause["model"] = self._models(self.steps[step.key])[step.model]
        return HistoryEntry(self.locked.id, step.state, cause, step.key, step.attempt)

    def _write_run(self, ended: RunState | None) -> HistoryEntry:
        locked, output = self.locked, self._output if ended is RunState.SUCCEEDED else None
        (kept,) = payloads.keep(self.transaction.work, [output], self.transaction.policy.limits)
        errors = {key: step.error for key, step in self.steps.items() if step.error}
        errors |= {key: notes.error for key, notes in self._notes.items() if notes.error}
        error = explanations.run_error(self.run, ended, (locked.error or {}).get("message"), self.run_error, errors)
        store.move_run(
            self.transaction.work,
            kept.columns("output")
            | {
                "id": locked.id,
                "state": self.run.state,
                "ending": self.run.ending,
                "final": ended is not None,
                "error": None if error is None else as_json(error),
            },
        )
        if ended is not None:
            following = effects.of_ended_run(locked.id, locked.parent_step_id, locked.concurrency_key)
            self.transaction.effects.extend(following)
            _log.info("run_finished", run_id=self.run.id, state=ended)
        return HistoryEntry(locked.id, self.run.state, error or ({"message": self.message} if self.message else {}))


def open_change(transaction: RunTransaction, run_id: UUID, key: str | None = None) -> RunChange:
    """
    A change of a run, which is locked then; with the key of an item of a map, a change of that item alone.

    Raises NotFound.
    """
    if key is not None and "[" in key:
        locked, item = store.open_item(transaction.work, run_id, key)
        steps: list[LockedStep] = [] if item is None else [item]
    else:
        locked, steps = store.open_run(transaction.work, run_id)
    if locked is None:
        raise NotFound("run", str(run_id))
    if key is not None and all(step.key != key for step in steps):
        raise NotFound("step", key, [step.key for step in steps])
    return RunChange(transaction, graphs.of(transaction.work, locked.sha256), locked, steps)


def stop_items(transaction: RunTransaction, parent_id: UUID) -> FanOut | None:
    """Begin no further item of a map, and stop those in flight; returns the new counts, or None without items."""
    work = transaction.work
    fan = items.find(work, parent_id)
    if fan is None:
        return None
    for item in items.stop(work, parent_id):
        if item.state in (StepState.READY, StepState.WAITING):
            fan = fan_out.item_ended(fan, failed=False, collect=False)
        elif item.state == StepState.AWAITING:
            transaction.effects.append(CancelCalledRuns(item.id))
        else:
            store.notify_stop(work, item.id)
    fan = replace(fan, waiting=0, stopping=True)
    items.write_fan_out(work, parent_id, fan)
    return fan


def _run_step(step: LockedStep, rule: StepRule) -> RunStep:
    return RunStep(
        step.key,
        StepState(step.state),
        rule,
        step.attempt,
        step.failures,
        step.losses,
        step.model_index,
        step.branch,
        step.delegated,
    )


def _rule(graph: Graph, step: LockedStep) -> StepRule:
    if step.parent_id is None:
        return graph.rules[step.key]
    return graph.item_rule(step.key.partition("[")[0], step.kind)
