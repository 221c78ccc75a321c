"""The resource `consolidations`: what users say again and again becomes patterns, in the background."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any

from fastapi import Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from app.access.callers import KeyScope
from app.api import bodies, problems
from app.api.callers import InjectedCaller, ListedNamespace, NamedNamespace, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.catalog.serving import selector as selectors
from app.kernel.units import durations
from app.kernel.units.durations import Duration
from app.memory.consolidation import service
from app.memory.consolidation.consolidation import (
    Consolidation,
    ConsolidationPolicy,
    ConsolidationProgress,
    ConsolidationState,
    shown_consolidation,
)

router = ApiRouter(
    prefix="/v1/consolidations", tags=["memory"], dependencies=[requires(KeyScope.SUBMIT, KeyScope.READ)]
)

_Id = Annotated[str, Path(description="the id of a consolidation: cons_…", max_length=100)]
_Model = Annotated[str | None, Field(min_length=1, max_length=200, description="a model or a selector")]


class ConsolidationIn(BaseModel):
    """A consolidation of what is new in a namespace."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"model": "qwen3:4b"}]})

    model: _Model = None
    review_model: _Model = None


class ConsolidationScheduleIn(BaseModel):
    """How often a namespace has its new turns consolidated."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"every": "1d", "model": "qwen3:4b"}]})

    every: Duration | None = Field(description="1m to 366d; null: only by hand")
    model: _Model = None
    review_model: _Model = None


class ConsolidationProgressOut(BaseModel):
    """How much is done: two requests for each cluster."""

    requests: int
    done: int


class ConsolidationOut(BaseModel):
    """A consolidation."""

    id: str
    namespace: str
    state: ConsolidationState
    requested_by: str
    model: str
    review_model: str
    waits_for: str = Field(description="why its turns cannot be read yet; empty: it does not wait")
    turns: int = Field(description="turns and events that were read, with those left over before")
    leftovers: int = Field(description="of these, those that were in no cluster before")
    clusters: int
    has_more: bool = Field(description="whether turns beyond `consolidation.max_turns` are left for the next one")
    run: str | None = Field(description="the run that reads the clusters; it is removed at its end")
    progress: ConsolidationProgressOut
    written: int = Field(description="new patterns")
    merged: int = Field(description="known patterns that were found again")
    refused: int
    outcomes: Sequence[Mapping[str, Any]] = Field(
        description="what became of each cluster: the memory, or the reason; how near both passes were (`agreement`)"
    )
    tokens_in: int
    tokens_out: int
    cost: float | None = Field(description="by the prices of the models; null without prices")
    error: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class BegunConsolidationOut(ConsolidationOut):
    """The consolidation that answers a request for one."""

    created: bool = Field(description="false: the namespace had one that has not ended")


class ConsolidationListOut(BaseModel):
    """Consolidations, the newest first."""

    consolidations: list[ConsolidationOut]
    has_more: bool
    last_id: str | None


class ConsolidationScheduleOut(BaseModel):
    """What a namespace has chosen, and how far it was read."""

    namespace: str
    every: str | None
    next_at: datetime | None
    model: str | None = Field(description="null: as the setting `consolidation.model` has it")
    review_model: str | None
    effective_model: str
    effective_review_model: str


@router.post(
    "",
    summary="Consolidate",
    dependencies=[requires(KeyScope.SUBMIT)],
    responses=problems.documented(
        *(404, 409, 413, 415, 422), others={202: {"model": BegunConsolidationOut, "description": "Begun"}}
    ),
)
def begin(
    response: Response,
    services: InjectedServices,
    caller: InjectedCaller,
    namespace: NamedNamespace,
    body: Annotated[ConsolidationIn, bodies.of(ConsolidationIn)],
) -> BegunConsolidationOut:
    """
    Look for patterns in what is new in a namespace, in the background, by requests of the class `batch`.

    A consolidation that has not ended is returned instead (200, not 202).
    """
    _require_models(services, body.model, body.review_model)
    found = service.begin(
        services.database,
        services.settings.consolidation,
        namespace,
        caller.name,
        model=body.model,
        review_model=body.review_model,
    )
    response.status_code = 202 if found.created else 200
    shown, progress = service.get(services.database, shown_consolidation(found.consolidation.id), namespace)
    return BegunConsolidationOut(**_fields(shown, progress), created=found.created)


@router.get("", summary="Consolidations", responses=problems.documented(404, 422))
def page(
    services: InjectedServices,
    namespace: ListedNamespace,
    after: Annotated[str | None, Query(max_length=100, description="the last id of the part before")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> ConsolidationListOut:
    """The consolidations, the newest first; the last 200 of a namespace are kept."""
    found, has_more = service.page(services.database, namespace, after, limit)
    shown = [ConsolidationOut(**_fields(*one)) for one in found]
    return ConsolidationListOut(consolidations=shown, has_more=has_more, last_id=shown[-1].id if shown else None)


@router.get("/schedule", summary="How often a namespace is consolidated", responses=problems.documented(422))
def schedule(services: InjectedServices, namespace: NamedNamespace) -> ConsolidationScheduleOut:
    """What a namespace has chosen."""
    return _schedule(services, service.policy(services.database, namespace))


@router.put(
    "/schedule",
    summary="Choose how often a namespace is consolidated",
    dependencies=[requires(KeyScope.OPERATE)],
    responses=problems.documented(404, 422),
)
def set_schedule(
    services: InjectedServices,
    namespace: NamedNamespace,
    body: Annotated[ConsolidationScheduleIn, bodies.of(ConsolidationScheduleIn)],
) -> ConsolidationScheduleOut:
    """Choose for a namespace. The first consolidation begins after one interval; those that are missed are left out."""
    _require_models(services, body.model, body.review_model)
    found = service.set_policy(
        services.database, namespace, every=body.every, model=body.model, review_model=body.review_model
    )
    return _schedule(services, found)


@router.get("/{consolidation_id}", summary="A consolidation", responses=problems.documented(404))
def get(consolidation_id: _Id, services: InjectedServices, caller: InjectedCaller) -> ConsolidationOut:
    """A consolidation, with its progress and what it has cost so far."""
    return ConsolidationOut(**_fields(*service.get(services.database, consolidation_id, caller.namespace)))


@router.post(
    "/{consolidation_id}/cancel",
    summary="Cancel a consolidation",
    dependencies=[requires(KeyScope.SUBMIT)],
    responses=problems.documented(404, 409),
)
def cancel(consolidation_id: _Id, services: InjectedServices, caller: InjectedCaller) -> ConsolidationOut:
    """Cancel a consolidation that has not ended. Its turns are read by the next one."""
    found = service.cancel(services.runs, consolidation_id, caller.namespace)
    return ConsolidationOut(**_fields(found, ConsolidationProgress(2 * found.clusters)))


def _require_models(services: InjectedServices, *named: str | None) -> None:
    """Raises NotFound for a model that the catalogue does not have, InvalidInput for a selector that is none."""
    for model in named:
        if model is None:
            continue
        if selectors.is_selector(model):
            selectors.require_possible(selectors.parse(model), services.catalog.models)
        elif services.catalog.resolve(model) is None:
            services.catalog.get(model)


def _schedule(services: InjectedServices, found: ConsolidationPolicy) -> ConsolidationScheduleOut:
    settings = services.settings.consolidation
    model = found.model or settings.model
    return ConsolidationScheduleOut(
        namespace=found.namespace,
        every=None if found.every is None else durations.show(found.every),
        next_at=found.next_at,
        model=found.model,
        review_model=found.review_model,
        effective_model=model,
        effective_review_model=found.review_model or settings.review_model or model,
    )


def _fields(one: Consolidation, progress: ConsolidationProgress) -> dict[str, Any]:
    is_read = one.run_id is not None and one.clusters > 0
    return {
        "id": shown_consolidation(one.id),
        "namespace": one.namespace,
        "state": ConsolidationState(one.state),
        "requested_by": one.requested_by,
        "model": one.model,
        "review_model": one.review_model,
        "waits_for": one.waits_for,
        "turns": one.turns,
        "leftovers": one.leftovers,
        "clusters": one.clusters,
        "has_more": one.has_more,
        "run": str(one.run_id) if is_read else None,
        "progress": ConsolidationProgressOut(requests=progress.requests, done=progress.done),
        "written": one.written,
        "merged": one.merged,
        "refused": one.refused,
        "outcomes": one.outcomes,
        "tokens_in": progress.tokens_in,
        "tokens_out": progress.tokens_out,
        "cost": progress.cost,
        "error": one.error,
        "created_at": one.created_at,
        "started_at": one.started_at,
        "finished_at": one.finished_at,
    }
