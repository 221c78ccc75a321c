"""The resource `models` in OpenAI's form, with what it says of a model here: its state, context, use cases, size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, Field

from app.access.callers import Caller, KeyScope
from app.api.callers import InjectedCaller, requires
from app.api.fleet.models import UNUSABLE
from app.api.openai import errors
from app.api.openai.errors import ModelNotFound, OpenAIRoute
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.catalog.model import Model
from app.catalog.serving import servability
from app.fleet import views
from app.fleet.pool import PoolPhase
from app.fleet.views import PoolView
from app.inference.routing.availability import ModelState
from app.kernel.errors import ModelFileUnusable

router = ApiRouter(
    prefix="/v1/models",
    tags=["openai"],
    dependencies=[requires(KeyScope.SUBMIT, KeyScope.READ)],
    route_class=OpenAIRoute,
)


#: Phases of pools that will not serve.
_ENDING = (PoolPhase.DRAINING, PoolPhase.UNLOADING, PoolPhase.REFUSED, PoolPhase.FAILED)


class ServedModelOut(BaseModel):
    """A model. The fields from `state` on are Arriero's."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="always 0: the catalogue has no dates")
    owned_by: str = Field(description="its licence holder is not known here: always `arriero`")
    state: ModelState
    problem: str | None = Field(description="why it is unavailable")
    aliases: list[str] = Field(description="other names of it")
    remote: bool = Field(description="whether a server serves it, and no host")
    use_cases: list[str]
    context: int = Field(description="tokens of one slot, prompt and answer together")
    slots: int = Field(description="requests that one pool serves at a time")
    bytes: int | None = Field(description="bytes that its largest pool reserves; null while there is none")


class ServedModels(BaseModel):
    """The models of the catalogue."""

    object: Literal["list"] = "list"
    data: list[ServedModelOut]


@router.get("", summary="Models", responses=errors.documented(503))
def page(services: InjectedServices, caller: InjectedCaller) -> ServedModels:
    """Every model of the catalogue, and whether it answers at once."""
    pools = _pools(services)
    return ServedModels(data=[_out(model, pools, services, caller) for model in services.catalog.models])


@router.get("/{name:path}", summary="A model", responses=errors.documented(404, 503))
def get(name: str, services: InjectedServices, caller: InjectedCaller) -> ServedModelOut:
    """A model of the catalogue, and whether it answers at once."""
    found = services.catalog.resolve(name)
    if found is None:
        raise ModelNotFound("model", name, services.catalog.names)
    return _out(found, _pools(services), services, caller)


def _pools(services: Services) -> Mapping[str, list[PoolView]]:
    pools = defaultdict(list)
    for pool in views.pools(services.database):
        pools[pool.model].append(pool)
    return pools


def _out(model: Model, pools: Mapping[str, list[PoolView]], services: Services, caller: Caller) -> ServedModelOut:
    own = pools.get(model.name, [])
    state, problem = ModelState.COLD, None
    serving = [pool for pool in own if pool.phase == PoolPhase.SERVING]
    if model.remote is not None and serving and serving[0].detail:
        state, problem = ModelState.UNAVAILABLE, serving[0].detail
    elif serving:
        state = ModelState.RESIDENT
    elif any(pool.phase not in _ENDING for pool in own):
        state = ModelState.LOADING
    else:
        try:
            servability.check(model, services.settings)
        except ModelFileUnusable as error:
            state, problem = ModelState.UNAVAILABLE, str(error) if caller.namespace is None else UNUSABLE
    return ServedModelOut(
        id=model.name,
        created=0,
        owned_by="arriero",
        state=state,
        problem=problem,
        aliases=list(model.aliases),
        remote=model.remote is not None,
        use_cases=list(model.use_cases),
        context=model.context,
        slots=model.slots,
        bytes=max((sum(pool.bytes.values()) for pool in own), default=None),
    )
