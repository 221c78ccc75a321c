"""Explanations: why a step or a run changed its state, for its history and its error. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.kernel.errors import shortened
from app.workflows.state_machine.run import Run, RunStep
from app.workflows.state_machine.states import RunState, StepState

#: Failed steps that the error of a run names.
_MAX_STEPS = 20


def of_step(
    run: Run,
    step: RunStep,
    error: Mapping[str, Any] | None,
    awaits: Mapping[str, Any] | None,
    message: str | None,
    delay_s: float | None,
) -> dict[str, Any]:
    """
    The cause of a step's new state.

    `error` and `awaits` are what this transaction has noted about the step; `message` is why, where its caller knows;
    `delay_s` is the delay before another attempt.
    """
    match step.state:
        case StepState.FAILED | StepState.WAITING:
            return dict(error or {}) | ({} if delay_s is None else {"again_in_s": round(delay_s, 3)})
        case StepState.SKIPPED:
            return _skipped(run, step)
        case StepState.AWAITING:
            return dict(awaits or {})
        case StepState.CANCELLING | StepState.CANCELLED:
            message = message or (error or {}).get("message")
            return {"message": message} if message else {}
        case StepState.SUCCEEDED if step.branch:
            return {"branch": step.branch}
        case StepState.READY if error:
            return {"after": error}
    return {}


def _skipped(run: Run, step: RunStep) -> dict[str, Any]:
    if step.rule.on_failure and run.state is RunState.SUCCEEDED:
        return {"message": "the run has not failed"}
    unmet = {}
    for key, branch in step.rule.needs:
        need = run.steps[key]
        if need.state is not StepState.SUCCEEDED:
            unmet[key] = need.state.value
        elif branch not in (None, need.branch):
            unmet[key] = f"took {need.branch or 'no branch'}, not {branch}"
    if unmet and step.rule.join != "all_done":
        return {"message": "what it needs did not come about", "needs": unmet}
    return {"message": "its condition does not hold"}


def run_error(
    run: Run, ended: RunState | None, earlier: str | None, new: str | None, errors: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """
    The error of a run, as far as it is known now.

    `ended` is its final state, if it has one. `earlier` is the message of its error so far, `new` that of this
    transaction, and `errors` has the errors of its steps.
    """
    messages = [text for text in (earlier, new) if text]
    if ended in (None, RunState.SUCCEEDED):
        return {"message": "; ".join(messages), "steps": {}} if new else None
    cancels_count = not messages and ended is RunState.FAILED
    ended_badly = [
        key
        for key, step in run.steps.items()
        if step.state is StepState.FAILED or (step.state is StepState.CANCELLED and cancels_count)
    ]
    named = {key: errors.get(key) or {"message": "cancelled on request"} for key in ended_badly[:_MAX_STEPS]}
    messages += [f"step {key}: {error['message']}" for key, error in named.items()]
    if len(ended_badly) > len(named):
        messages.append(f"and {len(ended_badly) - len(named)} other steps")
    return {"message": shortened("; ".join(messages)), "steps": named} if messages else None
