"""The job that carries out the actions of rules. Several control workers share the work; each action is done once."""

from __future__ import annotations

from collections.abc import Mapping

from app.governance.actions import store
from app.governance.actions.effects.effect import ActionContext
from app.governance.actions.runner import ActionRunner
from app.scheduler.wake_up import wake_reconciler
from workers import jobs
from workers.passes import in_turn, time_limit
from workers.runtime import Runtime

#: Most seconds of a pass.
_SECONDS = 10.0


def run_actions(runtime: Runtime) -> Mapping[str, object] | None:
    """Carry out the actions that are due, and take back those whose rule has cleared. Raises Unavailable."""
    with in_turn():
        done = ActionRunner(context_of(runtime)).run_due(time_limit(_SECONDS))
    if done:
        runtime.activity.note()
    jobs.note_if(runtime, store.is_near)
    return {"actions": done} if done else None


def context_of(runtime: Runtime) -> ActionContext:
    """Return the dependencies of actions in this process."""
    publisher = runtime.broker
    assert publisher is not None, "a control worker has it from its start"
    return ActionContext(
        runs=runtime.runs,
        publisher=publisher,
        base=runtime.base,
        settings=lambda: runtime.settings,
        catalog=lambda: runtime.catalog,
        wake=lambda: wake_reconciler(publisher),
        defragment=lambda: jobs.defragment(runtime),
    )
