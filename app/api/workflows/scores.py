"""The scores of a run: what people and programs say of its output, for splits and reports."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import Path, Request
from pydantic import BaseModel, ConfigDict, Field

from app.access.audit import log as audit_log
from app.access.callers import KeyScope
from app.api import auditing, bodies, problems
from app.api.callers import InjectedCaller, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.api.workflows.run_ids import ResolvedRunId
from app.inference.splits import store
from app.inference.splits.service import MAX_SCORES
from app.kernel.errors import Conflict

router = ApiRouter(prefix="/v1/runs", tags=["runs"], dependencies=[requires(KeyScope.READ)])

_Name = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$", description="what was judged", examples=["helpful"])]


class ScoreIn(BaseModel):
    """A score."""

    model_config = ConfigDict(extra="forbid")

    value: float = Field(ge=0, le=1, description="from 0 to 1: a thumb up is 1, three stars of five are 0.5")
    comment: str = Field(default="", max_length=1000, pattern=r"^[^\x00]*$")


class ScoreOut(BaseModel):
    """A score of a run."""

    name: str
    value: float
    comment: str
    author: str = Field(description="the name of the key that gave it")
    at: datetime


class RunScoreList(BaseModel):
    """The scores of a run."""

    scores: list[ScoreOut]


@router.put(
    "/{run_id}/scores/{name}",
    dependencies=[requires(KeyScope.SUBMIT)],
    summary="Score a run",
    responses=problems.documented(404, 409, 413, 415, 422),
    openapi_extra=bodies.documented_as(ScoreIn),
)
def put(
    request: Request,
    run_id: ResolvedRunId,
    name: _Name,
    body: Annotated[ScoreIn, bodies.of(ScoreIn)],
    services: InjectedServices,
    caller: InjectedCaller,
) -> RunScoreList:
    """Say how good the output of a run is. The same name again replaces the score."""
    with services.database.work() as work:
        if not store.set_score(work, run_id, name, body.value, body.comment, caller.name, MAX_SCORES):
            raise Conflict(f"a run has at most {MAX_SCORES} scores: replace one of them")
        audit_log.add(work, auditing.record_of(request, caller, {"value": body.value}))
        found = store.scores_of(work, run_id)
    return RunScoreList(scores=[ScoreOut.model_validate(one, from_attributes=True) for one in found])


@router.get("/{run_id}/scores", summary="Scores of a run", responses=problems.documented(404, 422))
def page(run_id: ResolvedRunId, services: InjectedServices) -> RunScoreList:
    """What people and programs said of the output of a run."""
    with services.database.work() as work:
        found = store.scores_of(work, run_id)
    return RunScoreList(scores=[ScoreOut.model_validate(one, from_attributes=True) for one in found])
