"""
The runner: carries out requested actions, and takes them back.

A control worker takes one execution at a time under a lease; no other one has it meanwhile. Effects on rows are
recorded in the transaction that makes them. Executions are decided one after the other, so that limits are exact.
An execution that cannot be done now, because a server is unavailable, is tried again; one that fails is tried three
times. No execution stops the others.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import psycopg

from app.governance.actions import action as actions
from app.governance.actions import store
from app.governance.actions.action import ActionFields
from app.governance.actions.effects.effect import ActionContext, OutsideEffect, RowEffect
from app.governance.actions.effects.kinds import EFFECTS
from app.governance.actions.execution import ActionExecution
from app.governance.actions.outcome import ActionChange, ActionRefused, ExecutionState
from app.kernel import log
from app.kernel.database import UnitOfWork
from app.kernel.errors import ArrieroError, InvalidInput, NotFound, Unavailable

_log = log.get(__name__)

#: For how long nobody else takes an execution.
_LEASE = timedelta(minutes=1)
#: Attempts of an execution that raises.
_ATTEMPTS = 3
#: The pause before a further attempt.
_PAUSE = timedelta(seconds=5)
_OFF = "actions are off (the setting actions.mode)"


class _RolledBack(Exception):
    """Ends a transaction whose changes must not be stored."""


@dataclass(frozen=True, slots=True)
class ActionRunner:
    """Carries out requested actions."""

    context: ActionContext

    def run_due(self, in_time: Callable[[], bool]) -> int:
        """Carry out what is due, until nothing is or the time is over. Returns how many there were."""
        done = 0
        while in_time():
            with self.context.database.work() as work:
                execution = store.claim(work, _LEASE)
            if execution is None:
                break
            self._run(execution)
            done += 1
        return done

    def _run(self, execution: ActionExecution) -> None:
        undo = execution.state == ExecutionState.UNDOING
        try:
            if undo:
                self._undo(execution)
            else:
                self._apply(execution)
        except (ActionRefused, NotFound, InvalidInput) as refusal:
            self._refuse(execution, str(refusal), undo=undo)
        except Unavailable as error:
            self._later(execution, str(error))
        except Exception as error:  # noqa: BLE001 one execution must not stop the others
            _log.exception("action_failed", execution_id=str(execution.id), kind=execution.kind, undo=undo)
            reason = f"{type(error).__name__}: {error}"
            if execution.attempts < _ATTEMPTS:
                self._later(execution, reason)
            else:
                self._fail(execution, reason, undo=undo)

    def _apply(self, execution: ActionExecution) -> None:
        action = _action_of(execution)
        effect = EFFECTS[action.kind]
        if isinstance(effect, OutsideEffect):
            execution = self._admitted(execution, action, effect)
            change = None if execution.dry_run else effect.apply(self.context, action, execution)
            with self.context.database.work() as work:
                self._record(work, execution, action, execution.target, change)
            return
        if execution.dry_run:
            self._preview(execution, action, effect)
            return
        with self.context.database.work() as work:
            current, target = self._checked(work, execution, action, effect)
            change = effect.apply(self.context, work, action, current)
            self._record(work, current, action, target, change)

    def _preview(self, execution: ActionExecution, action: ActionFields, effect: RowEffect) -> None:
        """Make a change, take it back with its transaction, and record what it would have been."""
        made: list[tuple[str, ActionChange]] = []
        with suppress(_RolledBack), self.context.database.work() as work:
            current, target = self._checked(work, execution, action, effect)
            made.append((target, effect.apply(self.context, work, action, current)))
            _roll_back()
        ((target, change),) = made
        with self.context.database.work() as work:
            self._record(work, execution, action, target, change)

    def _admitted(self, execution: ActionExecution, action: ActionFields, effect: OutsideEffect) -> ActionExecution:
        """Check the limits of an effect with transactions of its own, and store what holds before it."""
        with self.context.database.work() as work:
            current, target = self._checked(work, execution, action, effect)
            if effect.before is not None and current.before is None:
                store.set_before(work, current.id, effect.before(work, action, current))
            store.set_target(work, current.id, target)
            found = store.get(work, current.id)
        assert found is not None, "it is locked"
        return found

    def _checked(
        self, work: UnitOfWork, execution: ActionExecution, action: ActionFields, effect: RowEffect | OutsideEffect
    ) -> tuple[ActionExecution, str]:
        """Return the execution as it is now, and its target. Raises ActionRefused when it must not be done."""
        store.lock(work)
        current = store.get(work, execution.id)
        if current is None or current.state != ExecutionState.PENDING:
            raise ActionRefused("it was done meanwhile")
        settings = self.context.settings().actions
        if settings.mode == "off":
            raise ActionRefused(_OFF)
        if current.cleared_at is not None and action.undone_on_clear:
            raise ActionRefused("its rule has cleared before it was done")
        target = current.target if effect.target is None else effect.target(self.context, work, action, current)
        recent = store.recent(work, current, target)
        if recent.same >= action.max_per_hour:
            often = f"it was done {recent.same} times within an hour for {target}"
            raise ActionRefused(f"{often}; its max_per_hour is {action.max_per_hour}")
        if recent.all >= settings.max_per_hour:
            raise ActionRefused(f"{recent.all} actions within an hour: actions.max_per_hour is reached")
        return current, target

    def _record(
        self,
        work: UnitOfWork,
        execution: ActionExecution,
        action: ActionFields,
        target: str,
        change: ActionChange | None,
    ) -> None:
        if execution.dry_run:
            detail = f"dry run: {change.detail}" if change is not None else "dry run: nothing was done"
            before, after = (None, None) if change is None else (change.before, change.after)
            store.finish(work, execution.id, ExecutionState.DONE, target, detail, before, after)
            return
        assert change is not None, "only a dry run has none"
        state = ExecutionState.APPLIED if change.holds and action.undone_on_clear else ExecutionState.DONE
        store.finish(work, execution.id, state, target, change.detail, change.before, change.after)
        _log.info(
            "action_done",
            execution_id=str(execution.id),
            kind=execution.kind,
            target=target,
            rule=execution.rule,
            detail=change.detail,
        )

    def _undo(self, execution: ActionExecution) -> None:
        """Take an execution back; when another one holds the same thing, that one will restore what was before."""
        action = _action_of(execution)
        effect = EFFECTS[action.kind]
        with self.context.database.work() as work:
            store.lock(work)
            current = store.get(work, execution.id)
            if current is None or current.state != ExecutionState.UNDOING:
                return
            later = [one for one in store.holders(work, current) if _finished(one) > _finished(current)]
            if later:
                store.set_before(work, later[0].id, current.before)
                detail = f"{_name(later[0])} holds it still"
                store.finish_undo(work, current.id, ExecutionState.KEPT, detail)
                return
            if effect.undo is None:
                store.finish_undo(work, current.id, ExecutionState.KEPT, "it cannot be taken back")
                return
            if isinstance(effect, RowEffect):
                detail = effect.undo(self.context, work, action, current)
                store.finish_undo(work, current.id, ExecutionState.UNDONE, detail)
        if isinstance(effect, OutsideEffect):
            detail = effect.undo(self.context, action, execution)
            with self.context.database.work() as work:
                store.finish_undo(work, execution.id, ExecutionState.UNDONE, detail)
        _log.info("action_undone", execution_id=str(execution.id), kind=execution.kind, rule=execution.rule)

    def _refuse(self, execution: ActionExecution, reason: str, *, undo: bool) -> None:
        with self.context.database.work() as work:
            if undo:
                store.finish_undo(work, execution.id, ExecutionState.KEPT, reason)
            else:
                store.finish(work, execution.id, ExecutionState.REFUSED, execution.target, reason)
        _log.info("action_refused", execution_id=str(execution.id), kind=execution.kind, reason=reason, undo=undo)

    def _fail(self, execution: ActionExecution, reason: str, *, undo: bool) -> None:
        with self.context.database.work() as work:
            if undo:
                store.finish_undo(work, execution.id, ExecutionState.FAILED, reason)
            else:
                store.finish(work, execution.id, ExecutionState.FAILED, execution.target, reason)

    def _later(self, execution: ActionExecution, reason: str) -> None:
        """Try it again after a pause. A database that is unavailable leaves it to the end of the lease."""
        try:
            with self.context.database.work() as work:
                store.retry(work, execution.id, _PAUSE, reason)
        except (Unavailable, psycopg.Error) as error:
            _log.warning("action_postponed", execution_id=str(execution.id), error=str(error))


def _roll_back() -> NoReturn:
    raise _RolledBack


def _action_of(execution: ActionExecution) -> Any:
    try:
        (found,) = actions.parse([execution.parameters])
    except ArrieroError as error:
        raise ActionRefused(f"its parameters are not valid in this version: {error}") from None
    return found


def _finished(execution: ActionExecution) -> float:
    return 0.0 if execution.finished_at is None else execution.finished_at.timestamp()


def _name(execution: ActionExecution) -> str:
    return f"the rule {execution.rule}" if execution.rule else f"the action {execution.id}"
