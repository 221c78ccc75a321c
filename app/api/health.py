"""Health: whether the process lives, and whether it can serve."""

from __future__ import annotations

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from app import __version__
from app.api import threads
from app.api.services import InjectedServices, Services
from app.kernel.errors import Unavailable

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """The process answers."""

    status: str = "ok"
    version: str = __version__


class Readiness(BaseModel):
    """Each part that requests need."""

    ready: bool
    database: str = Field(examples=["ok"], description="`ok`, or what is wrong")
    broker: str = Field(examples=["ok"], description="`ok`, or what is wrong")


@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> Health:
    """Answers while the process lives, whatever else is away."""
    return Health()


@router.get("/readyz", summary="Can it serve?", responses={503: {"model": Readiness, "description": "A part is away"}})
async def readyz(services: InjectedServices, response: Response) -> Readiness:
    """200 when the database is there with the schema of this version and the broker answers; else 503."""
    found = await threads.of_readiness(_readiness, services)
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
    return Readiness(ready=database == broker == "ok", database=database, broker=broker)
