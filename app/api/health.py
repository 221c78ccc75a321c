"""Health checks: liveness and readiness of the API."""

from __future__ import annotations

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from app import __version__
from app.api import threads
from app.api.callers import OPEN
from app.api.services import InjectedServices, Services
from app.kernel.errors import Unavailable

router = APIRouter(tags=["health"], dependencies=[OPEN])


class Health(BaseModel):
    """The answer of the liveness check."""

    status: str = "ok"
    version: str = __version__
    instance: str = Field(description="the id of this start of the API; with `arriero up`, of the process tree")


class Readiness(BaseModel):
    """The answer of the readiness check: the state of each part that requests need."""

    ready: bool
    instance: str = Field(description="as for `/healthz`")
    database: str = Field(examples=["ok"], description="`ok`, or what is wrong")
    broker: str = Field(examples=["ok"], description="`ok`, or what is wrong")


@router.get("/healthz", summary="Is the process alive?")
async def healthz(services: InjectedServices) -> Health:
    """Answers while the process runs, even when the database or the broker is unavailable."""
    return Health(instance=services.instance)


@router.get(
    "/readyz",
    summary="Can it serve?",
    responses={503: {"model": Readiness, "description": "A part is unavailable"}},
)
async def readyz(services: InjectedServices, response: Response) -> Readiness:
    """200 when the broker answers and the database has the schema of this version; otherwise 503."""
    found = await threads.run_for_readiness(_readiness, services)
    if not found.ready:
        response.status_code = 503
    return found


def _readiness(services: Services) -> Readiness:
    database = broker = "ok"
    try:
        services.database.require_head()
    except Unavailable as error:
        database = str(error)
    try:
        services.publisher.ping()
    except Unavailable as error:
        broker = str(error)
    ready = database == broker == "ok"
    return Readiness(ready=ready, instance=services.instance, database=database, broker=broker)
