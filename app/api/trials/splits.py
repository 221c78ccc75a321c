"""The resource `splits`: start, show, end and change splits, and say how many outcomes one needs."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Any

from fastapi import Depends, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from app.access.audit import log as audit_log
from app.access.callers import KeyScope
from app.api import auditing, bodies, problems
from app.api.bodies import RequestBody
from app.api.callers import InjectedCaller, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.inference.splits import definition, evidence, judgement, service, store
from app.inference.splits.definition import CONTROL, SplitDefinition, SplitMetric
from app.inference.splits.evidence import SplitVerdict, VariantSample
from app.inference.splits.rows import SplitState, StoredSplit
from app.inference.splits.service import Splits
from app.kernel.live import notices
from app.kernel.live.notices import ChangeTopic

router = ApiRouter(prefix="/v1/splits", tags=["trials"], dependencies=[requires(KeyScope.READ, all_namespaces=True)])

#: The types of endpoints' arguments: the name of a split, and the service.
SplitInPath = Annotated[str, Path(description="the name of the split", examples=["shorter-answers"], max_length=40)]
_Reason = Annotated[
    str, Query(max_length=1000, pattern=r"^[^\x00]*$", description="the reason, which is shown with the split")
]
_OPERATE = requires(KeyScope.OPERATE, all_namespaces=True)


def _service(services: InjectedServices) -> Splits:
    return Splits(services.database, lambda: services.catalog)


InjectedSplits = Annotated[Splits, Depends(_service)]


class VariantOut(BaseModel):
    """What the runs of one variant have come to."""

    name: str
    share: float = Field(description="the part of the traffic that it gets now, pins aside")
    units: int = Field(description="users, sessions or runs with an outcome")
    runs: int
    failed: int
    error: float | None = Field(description="failed runs, by runs")
    seconds_p50: float | None
    seconds_p95: float | None
    first_token_p50: float | None
    first_token_p95: float | None
    score: float | None = Field(description="the mean")
    scored: int


class ComparisonOut(BaseModel):
    """A candidate beside the control in one metric."""

    candidate: str
    metric: SplitMetric
    difference: float | None = Field(
        description="candidate less control; of times the relative difference of the geometric means"
    )
    low: float | None = Field(description="the interval that covers the true difference, however often one looks")
    high: float | None
    verdict: SplitVerdict
    is_goal: bool


class SplitListed(BaseModel):
    """A split."""

    name: str
    state: SplitState
    target: str = Field(description="the model or the workflow")
    share: float = Field(description="of each candidate")
    stage: int = Field(description="of its ramp, from 1")
    stages: int
    author: str
    created_at: datetime
    ended_at: datetime | None
    reason: str = Field(description="why it has ended")


class SplitOut(SplitListed):
    """A split with its outcomes."""

    definition: dict[str, Any]
    variants: list[VariantOut]
    comparisons: list[ComparisonOut]


class SplitList(BaseModel):
    """Splits: those that run, then the latest."""

    splits: list[SplitListed]


class ShareIn(BaseModel):
    """The share of each candidate."""

    model_config = ConfigDict(extra="forbid")

    share: float = Field(gt=0, le=1)


class NeededIn(BaseModel):
    """What a split should find."""

    model_config = ConfigDict(extra="forbid")

    metric: SplitMetric = SplitMetric.SCORE
    effect: float = Field(gt=0.0005, le=1, description="the smallest difference that matters; of times relative")
    base: float | None = Field(
        default=None, ge=0, le=1, description="of `error` and `score`: the mean that is expected"
    )
    deviation: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="of one unit; of times that of the logarithm; else it follows from `base`",
    )
    share: float = Field(default=0.5, gt=0, lt=1, description="of the candidate")
    alpha: float = Field(default=0.05, ge=0.0001, le=0.2)
    power: float = Field(default=0.8, ge=0.5, le=0.999)


class NeededOut(BaseModel):
    """How many units a split needs; a larger difference is found sooner."""

    units: int | None = Field(description="control and candidate together; null: more than a billion")
    deviation: float = Field(description="what was taken as the standard deviation of one unit")


@router.get("", summary="List splits", responses=problems.documented(422))
def page(
    services: InjectedServices, limit: Annotated[int, Query(ge=1, le=200, description="most splits")] = 50
) -> SplitList:
    """The splits that run, then the latest that have ended."""
    with services.database.work() as work:
        found = store.page(work, limit)
    return SplitList(splits=[SplitListed(**_listed(one)) for one in found])


@router.post(
    "",
    status_code=201,
    dependencies=[_OPERATE],
    summary="Start a split",
    responses=problems.documented(409, 413, 415, 422),
    openapi_extra=bodies.documented_as(SplitDefinition),
)
def start(
    request: Request, body: RequestBody, services: InjectedServices, caller: InjectedCaller, splits: InjectedSplits
) -> SplitOut:
    """Divide the calls of a model, or the runs of a workflow, from now on. As JSON or YAML."""
    with services.database.work() as work:
        found = splits.start(work, body.data, caller.name)
        audit_log.add(work, auditing.record_of(request, caller, body.data))
    _announce(services)
    return _out(services, found)


@router.post("/size", summary="How many outcomes a split needs", responses=problems.documented(413, 415, 422))
def size(body: Annotated[NeededIn, bodies.of(NeededIn)]) -> NeededOut:
    """How many users, sessions or runs it takes to find a difference."""
    base = body.base if body.base is not None else 0.5
    deviation = body.deviation or (1.0 if body.metric.is_logarithmic else math.sqrt(max(base * (1 - base), 0.0001)))
    effect = math.log1p(body.effect) if body.metric.is_logarithmic else body.effect
    units = evidence.units_needed(deviation, effect, body.alpha, body.power, body.share)
    return NeededOut(units=units, deviation=round(deviation, 6))


@router.get("/{name}", summary="One split", responses=problems.documented(404, 422))
def get(name: SplitInPath, services: InjectedServices, splits: InjectedSplits) -> SplitOut:
    """A split, the outcomes of its variants, and what they say."""
    return _out(services, splits.get(name))


@router.post(
    "/{name}/stop", dependencies=[_OPERATE], summary="Stop a split", responses=problems.documented(404, 409, 422)
)
def stop(name: SplitInPath, services: InjectedServices, splits: InjectedSplits, reason: _Reason = "") -> SplitOut:
    """End a split: everything goes to the control."""
    with services.database.work() as work:
        found = splits.stop(work, name, reason)
    _announce(services)
    return _out(services, found)


@router.put(
    "/{name}/share",
    dependencies=[_OPERATE],
    summary="Change the share",
    responses=problems.documented(404, 409, 413, 415, 422),
    openapi_extra=bodies.documented_as(ShareIn),
)
def set_share(
    name: SplitInPath, body: Annotated[ShareIn, bodies.of(ShareIn)], services: InjectedServices, splits: InjectedSplits
) -> SplitOut:
    """Set the share of each candidate, in the place of its ramp. A larger one adds units and takes none away."""
    with services.database.work() as work:
        found = splits.set_share(work, name, body.share)
    _announce(services)
    return _out(services, found)


@router.delete(
    "/{name}",
    status_code=204,
    dependencies=[_OPERATE],
    summary="Remove a split",
    responses=problems.documented(404, 409, 422),
)
def remove(name: SplitInPath, services: InjectedServices, splits: InjectedSplits) -> Response:
    """Remove a split that has ended, with its outcomes. The labels of its runs stay."""
    with services.database.work() as work:
        splits.remove(work, name)
    return Response(status_code=204)


def _announce(services: Services) -> None:
    services.splits.refresh()
    notices.send(services.publisher, ChangeTopic.SPLITS)


def _listed(found: StoredSplit) -> dict[str, Any]:
    given = definition.parse(found.definition)
    return {
        "name": found.name,
        "state": SplitState(found.state),
        "target": given.model or given.workflow,
        "share": service.share_of(found),
        "stage": found.stage + 1,
        "stages": len(given.ramp),
        "author": found.author,
        "created_at": found.created_at,
        "ended_at": found.ended_at,
        "reason": found.reason,
    }


def _out(services: Services, found: StoredSplit) -> SplitOut:
    given = definition.parse(found.definition)
    with services.database.work() as work:
        sampled, counts = store.samples(work, found.id), store.quantiles(work, found.id)
    share = service.share_of(found) if found.state == SplitState.RUNNING else 0.0
    shares = {CONTROL: 1 - share * len(given.candidates)}
    return SplitOut(
        **_listed(found),
        definition=found.definition,
        variants=[
            _variant(name, shares.get(name, share), counts.get(name), sampled.get((name, SplitMetric.ERROR)))
            for name in judgement.variants_of(given)
        ],
        comparisons=[
            _comparison(given, sampled, one.name, metric) for one in given.candidates for metric in SplitMetric
        ],
    )


def _variant(name: str, share: float, counts: Any, sample: VariantSample | None) -> VariantOut:
    seconds = (counts and counts.seconds) or (None, None)
    first = (counts and counts.first_token) or (None, None)
    return VariantOut(
        name=name,
        share=share,
        units=sample.units if sample is not None else 0,
        runs=counts.runs if counts else 0,
        failed=counts.failed if counts else 0,
        error=counts.failed / counts.runs if counts else None,
        seconds_p50=seconds[0],
        seconds_p95=seconds[1],
        first_token_p50=first[0],
        first_token_p95=first[1],
        score=counts.score if counts else None,
        scored=counts.scored if counts else 0,
    )


def _comparison(
    given: SplitDefinition, sampled: dict[tuple[str, SplitMetric], VariantSample], candidate: str, metric: SplitMetric
) -> ComparisonOut:
    found = judgement.evidence_of(given, sampled, candidate, metric)
    values = (found.comparison.difference, found.comparison.low, found.comparison.high)
    difference, low, high = (_shown(metric, value) for value in values)
    return ComparisonOut(
        candidate=candidate,
        metric=metric,
        difference=difference,
        low=low,
        high=high,
        verdict=found.verdict,
        is_goal=metric is given.goal.metric,
    )


def _shown(metric: SplitMetric, value: float | None) -> float | None:
    """A difference for people: of times relative. None for one that is not known, or without a limit."""
    if value is None or math.isinf(value):
        return None
    if metric.is_logarithmic:
        return None if value > 20 else math.expm1(value)  # a factor of half a billion says nothing
    return value
