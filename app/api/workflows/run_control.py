"""Control of runs: pause, resume, retry, fork, cancel steps, bulk cancel and retry, and pausing of workflows."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import Path, Response
from pydantic import BaseModel, ConfigDict, Field

from app.access.callers import KeyScope
from app.api import bodies, problems
from app.api.admission import admit_submission
from app.api.callers import InjectedCaller, ListedNamespace, NamedNamespace, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.api.workflows.run_documents import RunOut, out
from app.api.workflows.run_ids import ResolvedRunId
from app.workflows.runs import control, forks, views
from app.workflows.state_machine.states import RunState, StepState

router = ApiRouter(tags=["runs"], dependencies=[requires(KeyScope.SUBMIT)])

_Name = Annotated[str, Path(description="the name of the workflow", examples=["support-triage"])]


class PausedOut(BaseModel):
    """A run after a pause or a resume."""

    id: UUID
    paused: bool
    changed: bool = Field(description="false when the run was already in this state")


class WorkflowPausedOut(BaseModel):
    """A workflow after a pause or a resume."""

    name: str
    paused: bool
    runs: int = Field(description="number of open runs concerned")


class StepStateOut(BaseModel):
    """A step after a request."""

    key: str
    state: StepState


class RunStateOut(BaseModel):
    """A run after a request."""

    id: UUID
    state: RunState


class ForkIn(BaseModel):
    """The step from which a run is repeated, and its inputs."""

    model_config = ConfigDict(extra="forbid")

    step: str = Field(
        alias="from", description="the first step to run again, with all steps after it", examples=["reply"]
    )
    inputs: dict[str, Any] = Field(default={}, description="replace inputs with the same names")


class FilterIn(BaseModel):
    """A filter of runs: all conditions must match."""

    model_config = ConfigDict(extra="forbid")

    states: list[RunState] | None = None
    workflow: str | None = None
    labels: dict[str, str] = {}
    created_after: datetime | None = None
    created_before: datetime | None = None
    ids: list[UUID] | None = Field(default=None, max_length=control.BULK, description="only runs with these ids")


class BulkOut(BaseModel):
    """The result of a request for many runs."""

    done: list[UUID]
    refused: dict[UUID, str] = Field(
        description="runs that changed in the meantime, with the reason why nothing was done"
    )
    more: bool = Field(description=f"whether more runs match; one request handles at most {control.BULK}")


@router.post("/v1/runs/{run_id}/pause", summary="Pause a run", responses=problems.documented(404, 409, 422))
def pause(run_id: ResolvedRunId, services: InjectedServices) -> PausedOut:
    """No further step of the run starts. Running steps continue to their end, and waiting steps keep waiting."""
    return PausedOut(id=run_id, paused=True, changed=control.pause(services.runs, run_id))


@router.post("/v1/runs/{run_id}/resume", summary="Resume a run", responses=problems.documented(404, 409, 422))
def resume(run_id: ResolvedRunId, services: InjectedServices) -> PausedOut:
    """Resume a paused run."""
    return PausedOut(id=run_id, paused=False, changed=control.resume(services.runs, run_id))


@router.post("/v1/runs/{run_id}/retry", status_code=202, summary="Retry", responses=problems.documented(404, 409, 422))
def retry(run_id: ResolvedRunId, services: InjectedServices) -> RunStateOut:
    """
    Retry the steps that did not succeed in a failed or cancelled run.

    Steps and items of maps that succeeded keep their outputs.
    """
    return RunStateOut(id=run_id, state=control.retry(services.runs, run_id))


@router.post(
    "/v1/runs/{run_id}/fork",
    status_code=202,
    summary="Fork",
    responses=problems.documented(402, 404, 409, 413, 415, 422, 429),
    openapi_extra=bodies.documented_as(ForkIn),
)
def fork(
    run_id: ResolvedRunId,
    body: Annotated[ForkIn, bodies.of(ForkIn)],
    services: InjectedServices,
    caller: InjectedCaller,
    response: Response,
) -> RunOut:
    """
    Run a finished run again from a step on, as a new run.

    Inputs can be replaced. Earlier steps keep their outputs.
    """
    namespace = views.run(services.database, run_id, 0).run.namespace
    response.headers.update(admit_submission(services, caller, namespace))
    accepted = forks.fork(services.runs, run_id, body.step, body.inputs)
    response.headers["Location"] = f"/v1/runs/{accepted.id}"
    return out(views.run(services.database, accepted.id), sees_fleet=caller.namespace is None)


@router.post(
    "/v1/runs/{run_id}/steps/{key}/cancel",
    status_code=202,
    summary="Cancel a step, or an item",
    responses=problems.documented(404, 422),
)
def cancel_step(run_id: ResolvedRunId, key: str, services: InjectedServices) -> StepStateOut:
    """
    Request the end of one step, or of one item of a map (`read[12]`). The rest of the run continues.

    A cancelled step makes its run fail, unless the step has `allow_failure`.
    """
    return StepStateOut(key=key, state=control.cancel_step(services.runs, run_id, key))


@router.post(
    "/v1/bulk/cancel",
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Cancel many runs",
    responses=problems.documented(413, 415, 422),
    openapi_extra=bodies.documented_as(FilterIn),
)
def cancel_all(
    which: Annotated[FilterIn, bodies.of(FilterIn)], services: InjectedServices, namespace: ListedNamespace
) -> BulkOut:
    """Cancel every open run that matches the filter, the oldest first."""
    return _bulk(control.cancel_all(services.runs, _filter(which, namespace)))


@router.post(
    "/v1/bulk/retry",
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Retry many runs",
    responses=problems.documented(413, 415, 422),
    openapi_extra=bodies.documented_as(FilterIn),
)
def retry_all(
    which: Annotated[FilterIn, bodies.of(FilterIn)], services: InjectedServices, namespace: ListedNamespace
) -> BulkOut:
    """Retry every failed or cancelled run that matches the filter, the oldest first."""
    return _bulk(control.retry_all(services.runs, _filter(which, namespace)))


@router.post(
    "/v1/workflows/{name}/pause",
    dependencies=[requires(KeyScope.OPERATE)],
    tags=["workflows"],
    summary="Pause a workflow",
    responses=problems.documented(422),
)
def pause_workflow(name: _Name, namespace: NamedNamespace, services: InjectedServices) -> WorkflowPausedOut:
    """No further step of the workflow's runs starts, of future runs either."""
    runs = control.pause_workflow(services.runs, name, paused=True, namespace=namespace)
    return WorkflowPausedOut(name=name, paused=True, runs=runs)


@router.post(
    "/v1/workflows/{name}/resume",
    dependencies=[requires(KeyScope.OPERATE)],
    tags=["workflows"],
    summary="Resume a workflow",
    responses=problems.documented(422),
)
def resume_workflow(name: _Name, namespace: NamedNamespace, services: InjectedServices) -> WorkflowPausedOut:
    """Resume the runs of a paused workflow. Runs that were paused individually stay paused."""
    runs = control.pause_workflow(services.runs, name, paused=False, namespace=namespace)
    return WorkflowPausedOut(name=name, paused=False, runs=runs)


def _filter(which: FilterIn, namespace: str | None) -> control.Filter:
    return control.Filter(
        which.states, which.workflow, which.labels, which.created_after, which.created_before, which.ids, namespace
    )


def _bulk(bulk: control.Bulk) -> BulkOut:
    return BulkOut(done=list(bulk.done), refused=dict(bulk.refused), more=bulk.more)
