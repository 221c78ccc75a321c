"""The resource `shadows`: start, show and end shadows; their reports and pairs."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import Depends, Path, Query, Request, Response
from pydantic import BaseModel, Field

from app.access.audit import log as audit_log
from app.access.callers import KeyScope
from app.api import auditing, bodies, problems
from app.api.bodies import RequestBody
from app.api.callers import InjectedCaller, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.inference.shadows import definition, store
from app.inference.shadows.comparison import JudgePreference, PairMetric
from app.inference.shadows.definition import ShadowDefinition
from app.inference.shadows.rows import PairState, ShadowState, StoredShadow
from app.inference.shadows.service import ShadowReport, Shadows
from app.inference.splits.evidence import SplitVerdict

router = ApiRouter(prefix="/v1/shadows", tags=["trials"], dependencies=[requires(KeyScope.READ, all_namespaces=True)])

#: The types of endpoints' arguments: the name of a shadow, and the service.
ShadowName = Annotated[str, Path(description="the name of the shadow", examples=["next-model"], max_length=40)]
_OPERATE = requires(KeyScope.OPERATE, all_namespaces=True)


def _service(services: InjectedServices) -> Shadows:
    return Shadows(services.runs, lambda: services.catalog)


InjectedShadows = Annotated[Shadows, Depends(_service)]


class ShadowListed(BaseModel):
    """A shadow."""

    name: str
    state: ShadowState
    target: str = Field(description="the model or the workflow")
    candidate: dict[str, Any] = Field(description="what differs")
    share: float
    author: str
    created_at: datetime
    ended_at: datetime | None
    reason: str = Field(description="why it has ended")


class ShadowList(BaseModel):
    """Shadows: those that run, then the latest."""

    shadows: list[ShadowListed]


class PairEvidenceOut(BaseModel):
    """What all pairs say of one metric."""

    metric: PairMetric
    pairs: int
    difference: float = Field(description="the mean, candidate less original; of times and lengths relative")
    low: float | None = Field(description="the interval that covers the true mean, however often one looks")
    high: float | None
    verdict: SplitVerdict


class ShadowReportOut(ShadowListed):
    """A shadow, and what it has found."""

    definition: dict[str, Any]
    open: int = Field(description="runs of the candidate that wait or run")
    compared: int
    skipped: dict[str, int] = Field(description="by reason, what was not done again or not compared")
    metrics: list[PairEvidenceOut]
    similarity: float | None = Field(description="the mean cosine of the texts, from -1 to 1")
    similar_pairs: int
    preferences: dict[JudgePreference, int] = Field(description="what the judge prefers, asked in both orders")
    position_bias: float | None = Field(description="how often the judge named the first place; 0.5 is no bias")


class PairOut(BaseModel):
    """A pair."""

    run: UUID = Field(description="the run that was done again")
    candidate_run: UUID | None
    state: PairState
    reason: str
    differences: dict[PairMetric, float] = Field(description="candidate less original; logarithms of ratios")
    similarity: float | None
    preference: JudgePreference | None
    error: str | None = Field(description="why the candidate failed")
    at: datetime


class PairList(BaseModel):
    """Pairs, the newest first."""

    pairs: list[PairOut]


@router.get("", summary="List shadows", responses=problems.documented(422))
def page(
    services: InjectedServices, limit: Annotated[int, Query(ge=1, le=200, description="most shadows")] = 50
) -> ShadowList:
    """The shadows that run, then the latest that have ended."""
    with services.database.work() as work:
        found = store.page(work, limit)
    return ShadowList(shadows=[ShadowListed(**_listed(one)) for one in found])


@router.post(
    "",
    status_code=201,
    dependencies=[_OPERATE],
    summary="Start a shadow",
    responses=problems.documented(409, 413, 415, 422),
    openapi_extra=bodies.documented_as(ShadowDefinition),
)
def start(
    request: Request, body: RequestBody, services: InjectedServices, caller: InjectedCaller, shadows: InjectedShadows
) -> ShadowListed:
    """From now on a candidate does a share of the calls or runs again, and nobody sees what it says. JSON or YAML."""
    with services.database.work() as work:
        found = shadows.start(work, body.data, caller.name)
        audit_log.add(work, auditing.record_of(request, caller, body.data))
    return ShadowListed(**_listed(found))


@router.get("/{name}", summary="The report of a shadow", responses=problems.documented(404, 422))
def report(name: ShadowName, shadows: InjectedShadows) -> ShadowReportOut:
    """A shadow, and what its pairs say: at most the 10,000 newest."""
    return _report(shadows.report(name))


@router.get("/{name}/pairs", summary="Pairs of a shadow", responses=problems.documented(404, 422))
def pairs(
    name: ShadowName,
    services: InjectedServices,
    shadows: InjectedShadows,
    limit: Annotated[int, Query(ge=1, le=500, description="most pairs")] = 50,
    offset: Annotated[int, Query(ge=0, le=1_000_000, description="pairs that are passed over")] = 0,
) -> PairList:
    """The pairs of a shadow, the newest first. Their texts are in their runs."""
    with services.database.work() as work:
        found = store.pairs(work, shadows.get(work, name).id, limit, offset)
    return PairList(
        pairs=[
            PairOut(
                run=one.run_id,
                candidate_run=one.candidate_run_id,
                state=PairState(one.state),
                reason=one.reason,
                differences=(one.result or {}).get("differences", {}),
                similarity=(one.result or {}).get("similarity"),
                preference=(one.result or {}).get("preference"),
                error=(one.result or {}).get("error"),
                at=one.at,
            )
            for one in found
        ]
    )


@router.post(
    "/{name}/stop", dependencies=[_OPERATE], summary="Stop a shadow", responses=problems.documented(404, 409, 422)
)
def stop(
    name: ShadowName,
    services: InjectedServices,
    shadows: InjectedShadows,
    reason: Annotated[
        str, Query(max_length=1000, pattern=r"^[^\x00]*$", description="the reason, which is shown with the shadow")
    ] = "",
) -> ShadowListed:
    """End a shadow. Runs of its candidate that have begun end, and are compared."""
    with services.database.work() as work:
        found = shadows.stop(work, name, reason)
    return ShadowListed(**_listed(found))


@router.delete(
    "/{name}",
    status_code=204,
    dependencies=[_OPERATE],
    summary="Remove a shadow",
    responses=problems.documented(404, 409, 422),
)
def remove(name: ShadowName, services: InjectedServices, shadows: InjectedShadows) -> Response:
    """Remove a shadow that has ended, with its pairs. The runs of its candidate stay for their retention."""
    with services.database.work() as work:
        shadows.remove(work, name)
    return Response(status_code=204)


def _listed(found: StoredShadow) -> dict[str, Any]:
    given = definition.parse(found.definition)
    return {
        "name": found.name,
        "state": ShadowState(found.state),
        "target": given.model or given.workflow,
        "candidate": dict(given.candidate),
        "share": float(given.share),
        "author": found.author,
        "created_at": found.created_at,
        "ended_at": found.ended_at,
        "reason": found.reason,
    }


def _report(found: ShadowReport) -> ShadowReportOut:
    return ShadowReportOut(
        **_listed(found.stored),
        definition=found.stored.definition,
        open=found.open,
        compared=found.compared,
        skipped=dict(found.skipped),
        metrics=[PairEvidenceOut.model_validate(one, from_attributes=True) for one in found.metrics],
        similarity=found.similarity,
        similar_pairs=found.similar_pairs,
        preferences=dict(found.preferences),
        position_bias=found.position_bias,
    )
