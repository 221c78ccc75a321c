"""Effects on workflows: pause, resume, and run one."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.access import namespaces
from app.governance.actions.action import PauseWorkflowAction, ResumeWorkflowAction, RunWorkflowAction
from app.governance.actions.effects.effect import ActionContext, OutsideEffect
from app.governance.actions.execution import ActionExecution
from app.governance.actions.outcome import ActionChange, ActionRefused
from app.kernel.database import UnitOfWork
from app.kernel.errors import ArrieroError, IdempotencyKeyReused, Unavailable
from app.workflows import registry
from app.workflows.runs import control
from app.workflows.runs.submission import Submission

_IS_PAUSED = text("SELECT 1 FROM workflow_pause WHERE namespace = :namespace AND name = :name")


def namespace_of(execution: ActionExecution) -> str:
    """Return the namespace of the workflow: that of the rule, or the firing's label for a rule of the installation."""
    label = str(execution.cause.get("labels", {}).get("namespace", ""))
    return execution.namespace or (label if namespaces.is_valid(label) else "") or namespaces.DEFAULT


def _pause(context: ActionContext, action: PauseWorkflowAction, execution: ActionExecution) -> ActionChange:
    name, namespace = action.workflow or "", namespace_of(execution)
    registry.get(context.database, name, namespace=namespace)
    runs = control.pause_workflow(context.runs, name, paused=True, namespace=namespace)
    return ActionChange(f"{name} is paused, with {runs} open runs", execution.before, True, holds=True)


def _unpause(context: ActionContext, action: PauseWorkflowAction, execution: ActionExecution) -> str:
    name, namespace = action.workflow or "", namespace_of(execution)
    if not _is_paused(context, namespace, name):
        raise ActionRefused(f"{name} has been resumed since")
    if execution.before:
        raise ActionRefused(f"{name} was paused before, and stays so")
    runs = control.pause_workflow(context.runs, name, paused=False, namespace=namespace)
    return f"{name} is resumed, with {runs} open runs"


def _resume(context: ActionContext, action: ResumeWorkflowAction, execution: ActionExecution) -> ActionChange:
    name, namespace = action.workflow or "", namespace_of(execution)
    if not _is_paused(context, namespace, name):
        raise ActionRefused(f"{name} is not paused")
    runs = control.pause_workflow(context.runs, name, paused=False, namespace=namespace)
    return ActionChange(f"{name} is resumed, with {runs} open runs", True, False)


def _is_paused(context: ActionContext, namespace: str, name: str) -> bool:
    with context.database.work() as work:
        return work.row(_IS_PAUSED, {"namespace": namespace, "name": name}) is not None


def _paused_before(work: UnitOfWork, action: PauseWorkflowAction, execution: ActionExecution) -> bool:
    return work.row(_IS_PAUSED, {"namespace": namespace_of(execution), "name": action.workflow}) is not None


def _target(_: ActionContext, __: UnitOfWork, action: Any, execution: ActionExecution) -> str:
    return f"workflow {namespace_of(execution)}/{action.workflow}"


def _run(context: ActionContext, action: RunWorkflowAction, execution: ActionExecution) -> ActionChange:
    namespace = namespace_of(execution)
    found = registry.get(context.database, action.workflow, namespace=namespace)
    firing: dict[str, Any] = {"firing": {**execution.cause, "rule": execution.rule}} if action.with_firing else {}
    submission = Submission(
        found.definition,
        {**action.inputs, **firing},
        version=found.version,
        newest=True,
        priority=action.priority,
        idempotency_key=f"action-{execution.id}",
        labels={"rule": execution.rule} if execution.rule else {},
        namespace=namespace,
    )
    try:
        run_id = context.runs.submit(submission).id
    except IdempotencyKeyReused as error:
        # An earlier attempt submitted the run, and the workflow has changed since.
        run_id = UUID(error.run_id)
    except Unavailable:
        raise
    except ArrieroError as error:
        raise ActionRefused(str(error)) from None
    return ActionChange(f"run {run_id} of {action.workflow}", None, {"run_id": str(run_id)})


PAUSE = OutsideEffect(_pause, _unpause, _target, _paused_before)
RESUME = OutsideEffect(_resume, target=_target)
RUN = OutsideEffect(_run, target=_target)
