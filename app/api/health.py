"""Health checks: liveness and readiness of the API."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Response
from pydantic import BaseModel, Field

from app import __version__
from app.api import threads
from app.api.callers import OPEN
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.governance.health import components
from app.governance.health.components import ESSENTIAL, Component, ComponentCondition

router = ApiRouter(tags=["health"], dependencies=[OPEN])


class Health(BaseModel):
    """The answer of the liveness check."""

    status: str = "ok"
    version: str = __version__
    instance: str = Field(description="the id of this start of the API; with `arriero up`, of the process tree")


class Readiness(BaseModel):
    """The answer of the readiness check: the state of each component, `ok` or what is wrong."""

    ready: bool = Field(description="requests are answered: the database, the broker and what is required are ok")
    degraded: bool = Field(description="some component is not ok, so something waits")
    instance: str = Field(description="as for `/healthz`")
    database: str = Field(examples=["ok"])
    broker: str = Field(examples=["ok"])
    beat: str = Field(examples=["ok"], description="triggers the scheduled jobs")
    control: str = Field(examples=["ok"], description="the control workers, which do them")
    agents: str = Field(examples=["ok"], description="the agents of the hosts, which start pools")


@router.get("/healthz", summary="Is the process alive?")
async def healthz(services: InjectedServices) -> Health:
    """Answers while the process runs, even when the database or the broker is unavailable."""
    return Health(instance=services.instance)


@router.get(
    "/readyz",
    summary="Can it serve?",
    responses={503: {"model": Readiness, "description": "A component that is needed is not ok"}},
)
async def readyz(
    services: InjectedServices,
    response: Response,
    require: Annotated[
        list[Component] | None, Query(max_length=5, description="components that must be ok, for monitoring")
    ] = None,
) -> Readiness:
    """
    200 when the broker answers and the database has the schema of this version; otherwise 503.

    The other components do not change the status, unless `require` names them: while they are down, requests are
    accepted, and what they start waits.
    """
    found = await threads.run_for_readiness(components.read, services.database, services.publisher)
    needed = ESSENTIAL | set(require or ())
    ready = all(found[one].works for one in needed)
    if not ready:
        response.status_code = 503
    shown = {name.value: str(state) for name, state in found.items()}
    degraded = any(state.condition is not ComponentCondition.OK for state in found.values())
    return Readiness(ready=ready, degraded=degraded, instance=services.instance, **shown)
