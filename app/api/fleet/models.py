"""The resource `models`: the catalogue, with the number of steps that wait for each model."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from app.access.callers import Caller, KeyScope
from app.api import problems
from app.api.callers import InjectedCaller, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.catalog.model import Model
from app.catalog.serving import servability
from app.kernel.errors import ModelFileUnusable
from app.workflows.runs import views

router = ApiRouter(prefix="/v1/catalog", tags=["models"], dependencies=[requires(KeyScope.READ)])


#: The problem of a file for callers who do not see the folders of the host.
UNUSABLE = "its file cannot be used on this host; an operator sees why"


class ModelOut(BaseModel):
    """A model of the catalogue."""

    name: str
    description: str
    licence: str
    use_cases: list[str]
    reads_images: bool = Field(description="messages to it can have images: its entry has a projector (mmproj)")
    context: int = Field(description="tokens of one slot")
    slots: int = Field(description="requests that one pool serves at a time")
    aliases: list[str] = Field(description="other names of it")
    fallback: list[str] = Field(description="models that are tried after it, in order")
    source: dict[str, Any]
    remote: dict[str, Any] | None = Field(description="the server that serves it; null for a model with a file")
    present: bool = Field(description="its file is on the host of this API, or its server may be called")
    problem: str | None = Field(description="why its file or server cannot be used here, and how to solve it")
    steps_ready: int = Field(description="number of steps that wait for it")
    steps_running: int = Field(description="number of steps that use it")


class ModelList(BaseModel):
    """The catalogue."""

    models: list[ModelOut]


@router.get("", summary="List models", responses=problems.documented())
def page(services: InjectedServices, caller: InjectedCaller) -> ModelList:
    """Every model of the catalogue, in the order of the catalogue."""
    demand = views.demand(services.database, caller.namespace)
    return ModelList(models=[_out(model, demand, services, caller) for model in services.catalog.models])


@router.get("/{name}", summary="One model", responses=problems.documented(404))
def get(name: str, services: InjectedServices, caller: InjectedCaller) -> ModelOut:
    """A model of the catalogue."""
    return _out(services.catalog.get(name), views.demand(services.database, caller.namespace), services, caller)


def _out(model: Model, demand: dict[str, tuple[int, int]], services: Services, caller: Caller) -> ModelOut:
    problem = None
    try:
        servability.check(model, services.settings)
    except ModelFileUnusable as error:
        problem = str(error) if caller.namespace is None else UNUSABLE
    ready, running = demand.get(model.name, (0, 0))
    return ModelOut(
        name=model.name,
        description=model.description,
        licence=model.licence,
        use_cases=list(model.use_cases),
        reads_images=model.mmproj is not None,
        context=model.context,
        slots=model.slots,
        aliases=list(model.aliases),
        fallback=[one.name for one in services.catalog.chain(model.name)[1:]],
        remote=None if model.remote is None else model.remote.shown(),
        source=model.source.model_dump(mode="json", exclude_defaults=True),
        present=problem is None,
        problem=problem,
        steps_ready=ready,
        steps_running=running,
    )
