"""The resource `models`: the catalogue, with the number of steps that wait for each model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api import problems
from app.api.callers import requires
from app.api.services import InjectedServices, Services
from app.catalog import files
from app.catalog.model import Model
from app.kernel.errors import ModelFileUnusable
from app.workflows.runs import views

router = APIRouter(prefix="/v1/catalog", tags=["models"], dependencies=[requires(KeyScope.READ)])


class ModelOut(BaseModel):
    """A model of the catalogue."""

    name: str
    description: str
    licence: str
    use_cases: list[str]
    context: int = Field(description="tokens of one slot")
    slots: int = Field(description="requests that one pool serves at a time")
    source: dict[str, Any]
    present: bool = Field(description="its file is on the host of this API")
    problem: str | None = Field(description="why the file cannot be used here, and how to solve it")
    steps_ready: int = Field(description="number of steps that wait for it")
    steps_running: int = Field(description="number of steps that use it")


class ModelList(BaseModel):
    """The catalogue."""

    models: list[ModelOut]


@router.get("", summary="List models", responses=problems.documented())
def page(services: InjectedServices) -> ModelList:
    """Every model of the catalogue, in the order of the catalogue."""
    demand = views.demand(services.database)
    return ModelList(models=[_out(model, demand, services) for model in services.catalog.models])


@router.get("/{name}", summary="One model", responses=problems.documented(404))
def get(name: str, services: InjectedServices) -> ModelOut:
    """A model of the catalogue."""
    return _out(services.catalog.get(name), views.demand(services.database), services)


def _out(model: Model, demand: dict[str, tuple[int, int]], services: Services) -> ModelOut:
    problem = None
    try:
        files.check(model, services.settings.data_dir)
    except ModelFileUnusable as error:
        problem = str(error)
    ready, running = demand.get(model.name, (0, 0))
    return ModelOut(
        name=model.name,
        description=model.description,
        licence=model.licence,
        use_cases=list(model.use_cases),
        context=model.context,
        slots=model.slots,
        source=model.source.model_dump(mode="json", exclude_defaults=True),
        present=problem is None,
        problem=problem,
        steps_ready=ready,
        steps_running=running,
    )
