"""The resource `catalog/select`: which model a name, an alias or a selector means now, with the figures of all."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query
from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api.callers import InjectedCaller, requires
from app.api.openai import errors
from app.api.openai.errors import ModelNotFound, OpenAIRoute
from app.api.openai.road import InjectedRoad
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.catalog.serving import selector as selectors
from app.inference.routing import choice, ranking
from app.inference.routing.availability import ModelState
from app.kernel.errors import NotFound

router = ApiRouter(
    prefix="/v1/catalog/select",
    tags=["openai"],
    dependencies=[requires(KeyScope.SUBMIT, KeyScope.READ)],
    route_class=OpenAIRoute,
)


class RankedOut(BaseModel):
    """A model that suits a selector. The figures are from 0 to 1."""

    model: str
    score: float
    quality: float
    speed: float
    readiness: float
    state: ModelState
    expected_wait_s: float = Field(description="until a request gets a slot")
    bytes_to_free: int = Field(description="bytes that other pools would have to free")
    shares_file: bool = Field(description="another entry with the same file is loaded")


class SelectionOut(BaseModel):
    """What a name, an alias or a selector means now."""

    asked: str
    model: str
    reason: str
    tried: list[str] = Field(description="the models that a request would try now, in order")
    passed_over: dict[str, str] = Field(description="models of its fallbacks that would not be tried now, and why")
    ranking: list[RankedOut] = Field(description="for a selector, the models that suit, the best first")
    excluded: dict[str, str] = Field(description="for a selector, why other models do not suit")


@router.get("", summary="Select a model", responses=errors.documented(400, 404, 503))
def select(
    services: InjectedServices,
    road: InjectedRoad,
    caller: InjectedCaller,
    model: Annotated[str, Query(min_length=1, max_length=200, description="a name, an alias or a selector")],
    context: Annotated[int, Query(ge=0, le=16_777_216, description="tokens that the request needs")] = 0,
) -> SelectionOut:
    """
    The model that a request with this `model` would be sent to now, and why.

    With a key of a namespace, the reason why a model is unavailable is not told.
    """
    catalog = services.catalog
    fleet = road.fleet.current(catalog)
    if caller.namespace is not None:
        fleet = fleet.outlined()
    try:
        chosen = choice.choose(model, catalog, fleet, context)
    except NotFound:
        raise ModelNotFound("model", model, catalog.names) from None
    plan = choice.plan(chosen.model, catalog, fleet)
    found = ranking.Ranking((), {})
    if selectors.is_selector(model):
        found = ranking.rank(selectors.parse(model), catalog.models, fleet, context)
    return SelectionOut(
        asked=model,
        model=chosen.model.name,
        reason=chosen.reason,
        tried=[one.name for one in plan.tried],
        passed_over={one.model.name: one.reason for one in plan.passed_over},
        ranking=[
            RankedOut(
                model=one.model.name,
                **{name: round(getattr(one, name), 3) for name in ("score", "quality", "speed", "readiness")},
                state=one.state,
                expected_wait_s=round(one.wait, 2),
                bytes_to_free=one.to_free,
                shares_file=one.shares_file,
            )
            for one in found.ranked
        ],
        excluded=dict(found.excluded),
    )
