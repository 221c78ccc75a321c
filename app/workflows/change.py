"""
A change: one run under its lock, the events that happen to it, and what they write.

Events pass through `run.advance`; what they change is written at the end, once, in the transaction that holds the lock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from app.kernel import log
from app.kernel.broker import Publisher
from app.kernel.database import Work
from app.kernel.errors import FailureReason
from app.workflows import definition as definitions
from app.workflows import run as runs
from app.workflows import store
from app.workflows.definition import Definition
from app.workflows.messages import Message, send_after_commit
from app.workflows.outcomes import Usage
from app.workflows.run import FINAL_STEPS, Event, Run, RunState, StepClaimed, StepFailed, StepState

_log = log.get(__name__)

#: Kinds so short that their holder goes on with the next one of the run without a message in between.
SHORT = frozenset({"noop", "join"})


@dataclass(frozen=True, slots=True)
class Known:
    """A definition, and what follows from it."""

    definition: Definition
    #: For each step, the steps that are finished when it begins.
    before: Mapping[str, frozenset[str]]


_KNOWN: dict[str, Known] = {}


def known(work: Work, sha256: str) -> Known:
    """The definition of that hash. Definitions never change, so a process keeps those that it has read."""
    found = _KNOWN.get(sha256)
    if found is None:
        if len(_KNOWN) >= 256:
            _KNOWN.clear()
        definition = definitions.stored(store.document(work, sha256))
        found = _KNOWN[sha256] = Known(definition, definitions.ancestors(definition))
    return found


def as_json(value: Any) -> str:
    """JSON text for a column; Postgres keeps no NUL in it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("\\u0000", "\ufffd")


class Change:
    """A run under its lock: events are applied to it, then what they changed is written."""

    def __init__(
        self, work: Work, run_row: Any, rows: Mapping[str, Any], lease: timedelta, publisher: Publisher
    ) -> None:
        self._work, self.run_row, self.rows, self._lease, self._publisher = work, run_row, rows, lease, publisher
        self._definition = known(work, run_row.sha256).definition
        rules = {step.id: step for step in self._definition.steps}
        steps = {
            key: runs.Step(
                key, StepState(row.state), rules[key].needs, rules[key].retry, row.attempt, row.failures, row.losses
            )
            for key, row in rows.items()
        }
        self.run = self._before = Run(str(run_row.id), RunState(run_row.state), steps)
        self._commands: list[runs.Command] = []
        self._extra: dict[str, dict[str, Any]] = {}

    def apply(self, event: Event) -> None:
        """Raises InvalidTransition when it cannot happen."""
        advanced = runs.advance(self.run, event)
        self.run = advanced.run
        self._commands.extend(advanced.commands)

    def fail(self, key: str, attempt: int, reason: FailureReason, message: str, chance: float, max_losses: int) -> None:
        self.apply(StepFailed(key, attempt, reason, chance, max_losses))
        self._extra.setdefault(key, {})["error"] = {"reason": reason, "message": message, "attempt": attempt}

    def output(self, key: str, output: Any, usage: Usage, *, has_output: bool = True) -> None:
        extra = self._extra.setdefault(key, {})
        extra |= {"tokens_in": usage.tokens_in, "tokens_out": usage.tokens_out}
        if has_output:
            extra |= {"has_output": True, "output": as_json(output)}

    def claim_short(self, key: str, owner: str) -> runs.DispatchStep | None:
        """Claim one short step that follows on the queue of `key` at once, instead of sending a message about it."""
        queue = self.rows[key].queue
        for command in self._commands:
            if not isinstance(command, runs.DispatchStep):
                continue
            row = self.rows[command.key]
            if row.kind in SHORT and row.queue == queue:
                self._commands.remove(command)
                self.apply(StepClaimed(command.key, command.attempt))
                self._extra.setdefault(command.key, {})["owner"] = owner
                return command
        return None

    def write(self) -> None:
        """Store what has changed, and send what follows from it once that is committed."""
        delays: dict[str, timedelta] = {}
        ended: RunState | None = None
        for command in self._commands:
            match command:
                case runs.DispatchStep(key, attempt):
                    row = self.rows[key]
                    name = f"{self.run_row.workflow}/{key}"
                    message = Message(row.id, attempt, row.queue, row.priority, name)
                    send_after_commit(self._work, self._publisher, message)
                case runs.DelayStep(key, delay):
                    delays[key] = delay
                case runs.StopStep(key):
                    store.notify_stop(self._work, self.rows[key].id)
                case runs.NoteGivenUp(key, why):
                    self._extra[key]["error"]["given_up"] = why
                case runs.FinishRun(state):
                    ended = state
        changed = [
            step for key, step in self.run.steps.items() if step != self._before.steps[key] or key in self._extra
        ]
        store.move_steps(self._work, [self._step_values(step, delays.get(step.key)) for step in changed])
        if self.run.state != self._before.state:
            self._write_run(ended)

    def _step_values(self, step: runs.Step, delay: timedelta | None) -> dict[str, Any]:
        extra = self._extra.get(step.key, {})
        error = extra.get("error")
        return {
            "id": self.rows[step.key].id,
            "state": step.state,
            "attempt": step.attempt,
            "failures": step.failures,
            "losses": step.losses,
            "owner": extra.get("owner"),
            "lease": self._lease,
            "delay": delay,
            "final": step.state in FINAL_STEPS,
            "has_output": extra.get("has_output", False),
            "output": extra.get("output"),
            "error": None if error is None else as_json(error),
            "tokens_in": extra.get("tokens_in", 0),
            "tokens_out": extra.get("tokens_out", 0),
        }

    def _write_run(self, ended: RunState | None) -> None:
        output = error = None
        if ended is RunState.SUCCEEDED:
            output = self._final_output()
        elif ended is RunState.FAILED:
            error = self._story()
        store.move_run(
            self._work,
            {
                "id": self.run_row.id,
                "state": self.run.state,
                "final": ended is not None,
                "output": None if output is None else as_json(output),
                "error": None if error is None else as_json(error),
            },
        )
        if ended is not None:
            _log.info("run_finished", run_id=self.run.id, state=ended)

    def _final_output(self) -> dict[str, Any]:
        """The outputs of the steps that no other step needs."""
        needed = {need for step in self.run.steps.values() for need in step.needs}
        last = [key for key in self.run.steps if key not in needed]
        return store.outputs(self._work, self.run_row.id, last)

    def _story(self) -> dict[str, Any]:
        failed = {
            key: self._extra.get(key, {}).get("error") or self.rows[key].error
            for key, step in self.run.steps.items()
            if step.state is StepState.FAILED
        }
        told = "; ".join(f"step {key}: {error['message']}" for key, error in failed.items())
        return {"message": told, "steps": failed}
