"""Steering: pause, resume, retry and fork runs, cancel parts of them; and many at a time."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Path, Response
from pydantic import BaseModel, ConfigDict, Field

from app.api import problems
from app.api.runs import RunOut, out
from app.api.services import Use
from app.workflows.runs import control, views
from app.workflows.state_machine.states import RunState, StepState

router = APIRouter(tags=["runs"])

_Name = Annotated[str, Path(description="the name of the workflow", examples=["support-triage"])]


class PausedOut(BaseModel):
    """A run after a pause or a resume."""

    id: UUID
    paused: bool
    changed: bool = Field(description="false when it was so before")


class WorkflowPausedOut(BaseModel):
    """A workflow after a pause or a resume."""

    name: str
    paused: bool
    runs: int = Field(description="open runs that it concerned")


class StepStateOut(BaseModel):
    """A step after a request."""

    key: str
    state: StepState


class RunStateOut(BaseModel):
    """A run after a request."""

    id: UUID
    state: RunState


class ForkIn(BaseModel):
    """From where a run is done anew, and with what."""

    model_config = ConfigDict(extra="forbid")

    step: str = Field(alias="from", description="this step and all that come after it", examples=["reply"])
    inputs: dict[str, Any] = Field(default={}, description="in the place of those of the same names")


class FilterIn(BaseModel):
    """Which runs: all that is given must hold."""

    model_config = ConfigDict(extra="forbid")

    states: list[RunState] | None = None
    workflow: str | None = None
    labels: dict[str, str] = {}
    created_after: datetime | None = None
    created_before: datetime | None = None


class BulkOut(BaseModel):
    """What became of many runs."""

    done: list[UUID]
    refused: dict[UUID, str] = Field(description="runs that had changed in the meantime, and why nothing was done")
    more: bool = Field(description=f"whether others match: at most {control.BULK} are done by one request")


@router.post("/v1/runs/{run_id}/pause", summary="Pause a run", responses=problems.documented(404, 409, 422))
def pause(run_id: UUID, services: Use) -> PausedOut:
    """Let nothing of a run begin. What runs goes on to its end; time that a step waits for passes."""
    return PausedOut(id=run_id, paused=True, changed=control.pause(services.runs, run_id))


@router.post("/v1/runs/{run_id}/resume", summary="Resume a run", responses=problems.documented(404, 409, 422))
def resume(run_id: UUID, services: Use) -> PausedOut:
    """Let a paused run go on."""
    return PausedOut(id=run_id, paused=False, changed=control.resume(services.runs, run_id))


@router.post("/v1/runs/{run_id}/retry", status_code=202, summary="Retry", responses=problems.documented(404, 409, 422))
def retry(run_id: UUID, services: Use) -> RunStateOut:
    """
    Do again what did not succeed in a run that failed or was cancelled.

    Outputs of what succeeded stay, and so do the items of a map that did.
    """
    return RunStateOut(id=run_id, state=control.retry(services.runs, run_id))


@router.post(
    "/v1/runs/{run_id}/fork", status_code=202, summary="Fork", responses=problems.documented(404, 409, 413, 422)
)
def fork(run_id: UUID, asked: ForkIn, services: Use, response: Response) -> RunOut:
    """Do a finished run anew from a step on, with other inputs if wanted. The steps before keep their outputs."""
    accepted = control.fork(services.runs, run_id, asked.step, asked.inputs)
    response.headers["Location"] = f"/v1/runs/{accepted.id}"
    return out(views.run(services.database, accepted.id))


@router.post(
    "/v1/runs/{run_id}/steps/{key}/cancel",
    status_code=202,
    summary="Cancel a step, or an item",
    responses=problems.documented(404, 422),
)
def cancel_step(run_id: UUID, key: str, services: Use) -> StepStateOut:
    """
    Ask one step to end, or one item of a map (`read[12]`). The rest of the run goes on.

    A cancelled step makes its run fail, unless the step has `allow_failure`.
    """
    return StepStateOut(key=key, state=control.cancel_step(services.runs, run_id, key))


@router.post("/v1/bulk/cancel", summary="Cancel many runs", responses=problems.documented(422))
def cancel_all(which: FilterIn, services: Use) -> BulkOut:
    """Cancel every open run that matches, the oldest first."""
    return _bulk(control.cancel_all(services.runs, _filter(which)))


@router.post("/v1/bulk/retry", summary="Retry many runs", responses=problems.documented(422))
def retry_all(which: FilterIn, services: Use) -> BulkOut:
    """Retry every run that matches and failed or was cancelled, the oldest first."""
    return _bulk(control.retry_all(services.runs, _filter(which)))


@router.post(
    "/v1/workflows/{name}/pause",
    tags=["workflows"],
    summary="Pause a workflow",
    responses=problems.documented(422),
)
def pause_workflow(name: _Name, services: Use) -> WorkflowPausedOut:
    """Let nothing of a workflow's runs begin, those that are still to come included."""
    return WorkflowPausedOut(name=name, paused=True, runs=control.pause_workflow(services.runs, name, paused=True))


@router.post(
    "/v1/workflows/{name}/resume",
    tags=["workflows"],
    summary="Resume a workflow",
    responses=problems.documented(422),
)
def resume_workflow(name: _Name, services: Use) -> WorkflowPausedOut:
    """Let the runs of a paused workflow go on; those that were paused by themselves stay so."""
    return WorkflowPausedOut(name=name, paused=False, runs=control.pause_workflow(services.runs, name, paused=False))


def _filter(which: FilterIn) -> control.Filter:
    return control.Filter(which.states, which.workflow, which.labels, which.created_after, which.created_before)


def _bulk(bulk: control.Bulk) -> BulkOut:
    return BulkOut(done=list(bulk.done), refused=dict(bulk.refused), more=bulk.more)
