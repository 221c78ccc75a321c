"""
A change: one run, or one item of a map, under the lock of its run, the events that happen to it, and what they write.

Events pass through `run.advance`; what they change is written at the end, once, in the transaction that holds the lock.
Conditions, switches and the run's output are computed here, in between: they are bounded, and wait for nobody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Protocol
from uuid import UUID

from app.catalog.model import slug
from app.kernel import log
from app.kernel.broker import IO_QUEUE, Publisher, model_queue
from app.kernel.database import UnitOfWork
from app.kernel.errors import FailureReason, StepFailure, shortened
from app.workflows.language.graph import Graph, Reads
from app.workflows.language.rule import StepRule
from app.workflows.language.steps import MapStep, SwitchStep
from app.workflows.runs import decisions
from app.workflows.runs.messages import StepMessage, send_after_commit
from app.workflows.runs.storage import items, payloads, store
from app.workflows.runs.storage.payloads import Kept, PayloadLimits, as_json
from app.workflows.state_machine import events, fan_out
from app.workflows.state_machine import transitions as runs
from app.workflows.state_machine.events import Event
from app.workflows.state_machine.fan_out import FanOut
from app.workflows.state_machine.outcomes import TokenUsage
from app.workflows.state_machine.run import Run, RunStep
from app.workflows.state_machine.states import FINAL_STEPS, RunState, StepState

_log = log.get(__name__)

#: Kinds so short that their holder goes on with the next one of the run without a message in between.
SHORT = frozenset({"noop", "join", "transform"})
#: Failed steps that the error of a run tells of.
_STEPS_TOLD = 20
_FAILED = RunState.FAILED
_NOTHING = TokenUsage()


class Aftermath(Protocol):
    """What follows a change in transactions of their own, once it has committed. The sweep makes up what was lost."""

    def run_ended(self, run_id: UUID, parent_step_id: UUID | None, concurrency_key: str | None) -> None:
        """Answer the step that called the run, and let the next run of its concurrency key begin."""

    def stop_called(self, step_id: UUID) -> None:
        """Cancel the runs that a step has called."""


def queue_of(models: Sequence[str], index: int = 0) -> str:
    """The queue whose workers can do a step that asks these models."""
    return model_queue(slug(models[index])) if models else IO_QUEUE


class RunChange:
    """A run, or one item, under the run's lock: events are applied to it, then what they changed is written."""

    def __init__(
        self,
        work: UnitOfWork,
        graph: Graph,
        run_row: Any,
        rows: Sequence[Any],
        *,
        lease: timedelta,
        publisher: Publisher,
        aftermath: Aftermath,
        limits: PayloadLimits,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        self.work, self.graph, self.run_row = work, graph, run_row
        self.rows: dict[str, Any] = {row.key: row for row in rows}
        self._lease, self._publisher, self._aftermath = lease, publisher, aftermath
        self._limits, self._inputs = limits, inputs
        steps = {row.key: _step(row, _rule(graph, row)) for row in rows}
        ending = RunState(run_row.ending) if run_row.ending else None
        state = RunState(run_row.state)
        if any(row.parent_id is not None for row in rows):
            state = RunState.CANCELLING if rows[0].state == StepState.CANCELLING else RunState.RUNNING
            self.run = Run(str(run_row.id), state, steps)
        else:
            self.run = Run(str(run_row.id), state, steps, ending, computes_output=True)
        self._before, self.run = self.run, runs.started(self.run)
        self._commands: list[events.Command] = []
        self._extra: dict[str, dict[str, Any]] = {}
        self._values: dict[str, Any] = {}
        #: Which outputs were read last, and what they are: switches in a row often read the same.
        self._read: tuple[tuple[list[str], set[str]], dict[str, dict[str, Any]]] | None = None
        #: The values as JSON, and the run's output.
        self._texts: dict[str, str] = {}
        self._output: str | None = None
        #: Why the run will not succeed, where no step says it.
        self.run_error: str | None = None
        #: Why, for the history: what a caller knows and the states do not say.
        self.message: str | None = None

    @property
    def is_item(self) -> bool:
        """Whether this is the change of an item."""
        return len(self.rows) == 1 and next(iter(self.rows.values())).parent_id is not None

    def apply(self, event: Event) -> None:
        """Raises InvalidTransition when it cannot happen."""
        waiting: deque[Event] = deque([event])
        while waiting:
            advanced = runs.proceed(self.run, waiting.popleft())
            self.run = advanced.run
            for command in advanced.commands:
                following = self._follow(command)
                if following is not None:
                    waiting.append(following)

    def succeed(
        self, key: str, attempt: int, output: Any, usage: TokenUsage, branch: str | None = None, text: str | None = None
    ) -> None:
        """The work of a step is done. `text` is the output as JSON, where the caller has it."""
        self._used(key, usage)
        self._values[key] = output
        self._texts[key] = as_json(output) if text is None else text
        self.apply(events.StepSucceeded(key, attempt, branch))

    def succeed_delegated(self, key: str, attempt: int, usage: TokenUsage) -> None:
        """The items of a map are done; its output is theirs."""
        self._used(key, usage)
        self.apply(events.StepSucceeded(key, attempt))

    def fail(
        self,
        key: str,
        attempt: int,
        reason: FailureReason,
        message: str,
        *,
        chance: float,
        max_losses: int,
        usage: TokenUsage = _NOTHING,
        not_before: timedelta = timedelta(0),
        final: bool = False,
        story: Mapping[str, Any] | None = None,
    ) -> None:
        """An attempt of a step has failed."""
        self._used(key, usage)
        error = {"reason": reason, "message": shortened(message), "attempt": attempt, **(story or {})}
        noted = self.rows[key].error or {}
        if self.run.steps[key].state is StepState.CANCELLING:
            # Why it was stopped says more than that it has stopped.
            if noted.get("attempt") == attempt:
                error = noted
            elif reason is FailureReason.CANCELLED and (cause := (self.run_row.error or {}).get("message")):
                error["message"] = cause
        extra = self._extra.setdefault(key, {})
        extra["error"] = error
        retryable = self._retryable(key, error)
        late = bool(self.rows[key].late)
        self.apply(events.StepFailed(key, attempt, reason, chance, max_losses, retryable, late, not_before, final))

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
        """The holder leaves a step whose work goes on elsewhere."""
        self._extra.setdefault(key, {}).update(awaits=awaits, delay=delay, not_before=until)
        self.apply(events.StepAwaited(key, attempt, delegated))

    def note(self, key: str, error: Mapping[str, Any]) -> None:
        """An error to be kept with a step, whatever becomes of it."""
        self._extra.setdefault(key, {})["error"] = dict(error)

    def claim_short(self, key: str, owner: str) -> events.DispatchStep | None:
        """Claim one short step that follows on the queue of `key` at once, instead of sending a message about it."""
        queue = self.rows[key].queue
        if self.run_row.paused:
            return None
        for command in self._commands:
            if not isinstance(command, events.DispatchStep):
                continue
            row = self.rows[command.key]
            if row.kind in SHORT and queue == IO_QUEUE:
                self._commands.remove(command)
                self.apply(events.StepClaimed(command.key, command.attempt))
                self._extra.setdefault(command.key, {})["owner"] = owner
                return command
        return None

    def data(self, reads: Reads) -> dict[str, Any]:
        """
        What a text sees that reads so much of the run, with what this change has made of it.

        Raises StepFailure when that is too much.
        """
        if self._inputs is None and reads.inputs:
            self._inputs = store.inputs(self.work, self.run_row.id)
        stored = [key for key in reads.steps if key not in self._values]
        succeeded = {key for key in stored if self.run.steps[key].state is StepState.SUCCEEDED}
        if self._read is None or self._read[0] != (stored, succeeded):
            found = store.outputs(self.work, self.run_row.id, stored, self._limits.read, succeeded)
            self._read = ((stored, succeeded), found)
        found = self._read[1]
        steps = {}
        for key in reads.steps:
            state = self.run.steps[key].state
            earlier = found.get(key, {"output": None, "error": None})
            steps[key] = {
                "state": state.value,
                "output": self._values[key] if key in self._values else earlier["output"],
                "error": self._extra.get(key, {}).get("error") or earlier["error"],
            }
        return {"inputs": dict(self._inputs or {}), "steps": steps, "run": run_data(self.run_row, self.run)}

    def write(self) -> None:
        """Store what has changed, and send what follows from it once that is committed."""
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
                    raise AssertionError(f"it was followed at once: {command}")
        changed = [
            step for key, step in self.run.steps.items() if step != self._before.steps[key] or key in self._extra
        ]
        kept = payloads.keep(self.work, [self._texts.get(step.key) for step in changed], self._limits)
        values = [self._step_values(step, delays.get(step.key), kept[n]) for n, step in enumerate(changed)]
        store.move_steps(self.work, values)
        history = [self._told(step, delays.get(step.key)) for step in changed if step != self._before.steps[step.key]]
        if self.is_item:
            history = [entry for entry in history if entry["event"] in ("waiting", "failed", "cancelling", "cancelled")]
        elif self.run.state != self._before.state or self.run.ending != self._before.ending:
            history.append(self._write_run(ended))
        store.add_history(self.work, history)

    def _follow(self, command: events.Command) -> Event | None:
        """Do at once what a command asks for, or keep it for the end. Gives the event that comes of it."""
        match command:
            case events.DecideStep(key):
                return self._decide(key)
            case events.ComputeOutput():
                return self._compute_output()
            case events.StopStep(key):
                return self._stop(key)
            case events.NoteGivenUp(key, message):
                self._extra.setdefault(key, {}).setdefault("error", {})["given_up"] = message
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
            branch = self._values[key] = decisions.branch(step, data)
            self._texts[key] = as_json(branch)
            return events.StepDecided(key, holds=True, switch=True, branch=branch)
        except StepFailure as error:
            self.note(key, {"reason": error.reason, "message": shortened(error.message), "attempt": 0})
            return events.StepDecided(key, holds=None)

    def _compute_output(self) -> Event:
        try:
            data = self.data(self.graph.output_reads)
            made = decisions.output(self.graph.definition, data, iter(self.run.steps))
            self._output = payloads.encoded_output(made, self._limits)
        except StepFailure as error:
            self.run_error = shortened(f"the output of the run cannot be computed: {error.message}")
            return events.OutputComputed(made=False)
        return events.OutputComputed(made=True)

    def _stop(self, key: str) -> Event | None:
        """Tell the holder, at commit; stop the items now; cancel the called run after the commit."""
        row, step = self.rows[key], self.run.steps[key]
        if not step.delegated:
            store.notify_stop(self.work, row.id)
            return None
        if row.kind != "map":
            self.work.after_commit(partial(self._aftermath.stop_called, row.id))
            return None
        fan = stop_items(self.work, row.id, self._aftermath)
        if fan is None or fan.in_flight:
            return None
        return events.StepFailed(key, step.attempt, FailureReason.CANCELLED, 0.0, 1)

    def _retryable(self, key: str, error: dict[str, Any]) -> bool:
        """Whether its condition lets it be tried again; one that cannot be computed is told in `error`."""
        condition = self.run.steps[key].rule.retry.when
        if condition is None:
            return True
        try:
            return decisions.retryable(condition, error)
        except StepFailure as broken:
            error["given_up"] = shortened(broken.message)
            return False

    def _used(self, key: str, usage: TokenUsage) -> None:
        self._extra.setdefault(key, {}).update(tokens_in=usage.tokens_in, tokens_out=usage.tokens_out)

    def _send(self, key: str, attempt: int) -> None:
        row, index = self.rows[key], self.run.steps[key].model
        queue = row.queue if index == row.model_index else queue_of(self._models(row), index)
        name = f"{self.run_row.workflow}/{key}"
        message = StepMessage(row.id, attempt, queue, row.priority, row.rank, name)
        if not self.run_row.paused:
            send_after_commit(self.work, self._publisher, message)

    def _models(self, row: Any) -> tuple[str, ...]:
        key = row.key.partition("[")[0]
        step = self.graph.steps[key]
        return () if isinstance(step, MapStep) and row.parent_id is None else self.graph.models(key)

    def _step_values(self, step: RunStep, delay: timedelta | None, output: Kept) -> dict[str, Any]:
        extra, row = self._extra.get(step.key, {}), self.rows[step.key]
        error, awaits = extra.get("error"), extra.get("awaits")
        models = self._models(row)
        return output.columns("output") | {
            "id": row.id,
            "state": step.state,
            "attempt": step.attempt,
            "failures": step.failures,
            "losses": step.losses,
            "branch": step.branch,
            "delegated": step.delegated,
            "model": models[step.model] if models else None,
            "model_index": step.model,
            "queue": queue_of(models, step.model),
            "owner": extra.get("owner"),
            "lease": self._lease,
            "delay": delay or extra.get("delay"),
            "not_before": extra.get("not_before"),
            "total": getattr(self.graph.steps.get(step.key), "total_timeout", None),
            "awaits": None if awaits is None else as_json(awaits),
            "final": step.state in FINAL_STEPS,
            "has_output": step.key in self._texts,
            "error": None if error is None else as_json(error),
            "tokens_in": extra.get("tokens_in", 0),
            "tokens_out": extra.get("tokens_out", 0),
        }

    def _told(self, step: RunStep, delay: timedelta | None) -> dict[str, Any]:
        """What the history says of a step."""
        extra, before = self._extra.get(step.key, {}), self._before.steps[step.key]
        cause: dict[str, Any] = {}
        match step.state:
            case StepState.FAILED | StepState.WAITING:
                cause = dict(extra.get("error") or {})
                if delay is not None:
                    cause["again_in_s"] = round(delay.total_seconds(), 3)
            case StepState.SKIPPED:
                cause = self._missed(step)
            case StepState.AWAITING:
                cause = dict(extra.get("awaits") or {})
            case StepState.CANCELLING | StepState.CANCELLED:
                message = self.message or (extra.get("error") or {}).get("message")
                cause = {"message": message} if message else {}
            case StepState.SUCCEEDED if step.branch:
                cause = {"branch": step.branch}
            case StepState.READY if extra.get("error"):
                cause = {"after": extra["error"]}
        if step.model != before.model:
            cause["model"] = self._models(self.rows[step.key])[step.model]
        return self._entry(step.state, cause, step=step.key, attempt=step.attempt)

    def _missed(self, step: RunStep) -> dict[str, Any]:
        if step.rule.on_failure and self.run.state is RunState.SUCCEEDED:
            return {"message": "the run has not failed"}
        unmet = {}
        for key, branch in step.rule.needs:
            need = self.run.steps[key]
            if need.state is not StepState.SUCCEEDED:
                unmet[key] = need.state.value
            elif branch not in (None, need.branch):
                unmet[key] = f"took {need.branch or 'no branch'}, not {branch}"
        if unmet and step.rule.join != "all_done":
            return {"message": "what it needs did not come about", "needs": unmet}
        return {"message": "its condition does not hold"}

    def _entry(self, what: str, cause: Mapping[str, Any], **of: Any) -> dict[str, Any]:
        told = {"run_id": self.run_row.id, "step": None, "attempt": None, "event": what}
        return told | of | {"cause": as_json(cause) if cause else None}

    def _write_run(self, ended: RunState | None) -> dict[str, Any]:
        (output,) = payloads.keep(self.work, [self._output if ended is RunState.SUCCEEDED else None], self._limits)
        error = self._story(ended)
        store.move_run(
            self.work,
            output.columns("output")
            | {
                "id": self.run_row.id,
                "state": self.run.state,
                "ending": self.run.ending,
                "final": ended is not None,
                "error": None if error is None else as_json(error),
            },
        )
        if ended is not None:
            row = self.run_row
            ended_now = partial(self._aftermath.run_ended, row.id, row.parent_step_id, row.concurrency_key)
            self.work.after_commit(ended_now)
            _log.info("run_finished", run_id=self.run.id, state=ended)
        return self._entry(self.run.state, error or ({"message": self.message} if self.message else {}))

    def _story(self, ended: RunState | None) -> dict[str, Any] | None:
        """Why the run does not succeed, as far as it is known now."""
        earlier = (self.run_row.error or {}).get("message")
        told = [text for text in (earlier, self.run_error) if text]
        if ended in (None, RunState.SUCCEEDED):
            return {"message": "; ".join(told), "steps": {}} if self.run_error else None
        ended_badly = [
            key
            for key, step in self.run.steps.items()
            if step.state is StepState.FAILED or (step.state is StepState.CANCELLED and not told and ended is _FAILED)
        ]
        failed = {
            key: self._extra.get(key, {}).get("error") or self.rows[key].error or {"message": "cancelled on request"}
            for key in ended_badly[:_STEPS_TOLD]
        }
        told += [f"step {key}: {error['message']}" for key, error in failed.items()]
        if len(ended_badly) > len(failed):
            told.append(f"and {len(ended_badly) - len(failed)} other steps")
        return {"message": shortened("; ".join(told)), "steps": failed} if told else None


def stop_items(work: UnitOfWork, parent_id: UUID, aftermath: Aftermath) -> FanOut | None:
    """Let no other item of a map begin, and stop those that are under way; None when it has none."""
    fan = items.find(work, parent_id)
    if fan is None:
        return None
    for row in items.stop(work, parent_id):
        if row.state in ("ready", "waiting"):
            fan = fan_out.item_ended(fan, failed=False, collect=False)
        elif row.state == "awaiting":
            called: UUID = row.id
            work.after_commit(partial(aftermath.stop_called, called))
        else:
            store.notify_stop(work, row.id)
    fan = FanOut(fan.total, 0, fan.in_flight, fan.failed, stopping=True)
    items.keep(work, parent_id, fan)
    return fan


def run_data(run_row: Any, run: Run) -> dict[str, Any]:
    """What templates and expressions see of the run itself."""
    ending = run.ending.value if run.ending else None
    return {"id": run.id, "workflow": run_row.workflow, "state": ending or run.state.value}


def _step(row: Any, rule: StepRule) -> RunStep:
    return RunStep(
        row.key,
        StepState(row.state),
        rule,
        row.attempt,
        row.failures,
        row.losses,
        row.model_index,
        row.branch,
        row.delegated,
    )


def _rule(graph: Graph, row: Any) -> StepRule:
    return graph.item_rules[row.key.partition("[")[0]] if row.parent_id is not None else graph.rules[row.key]
