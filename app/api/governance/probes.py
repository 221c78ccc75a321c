"""The resource `probes`: whether the pools that serve can write a token."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api import problems
from app.api.callers import requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.governance.probes import service
from app.governance.probes.probe import ProbeOutcome

router = ApiRouter(
    prefix="/v1/probes", tags=["governance"], dependencies=[requires(KeyScope.READ, all_namespaces=True)]
)


class ProbeOut(BaseModel):
    """The last probe of a pool."""

    pool: str = Field(description="its id")
    model: str
    sent_at: datetime
    outcome: ProbeOutcome | None = Field(description="`hung` and `failed` count as failures; null until one has ended")
    ended_at: datetime | None
    seconds: float | None = Field(description="until its token")
    detail: str = Field(description="why it is not well")
    failures: int = Field(description="failures in a row")


class ProbeList(BaseModel):
    """The last probe of each pool."""

    probes: list[ProbeOut]


@router.get("", summary="List probes", responses=problems.documented())
def page(services: InjectedServices) -> ProbeList:
    """The last probe of each pool that serves: one real token, one vector or one score."""
    found = service.all_probes(services.database)
    return ProbeList(probes=[ProbeOut.model_validate(one, from_attributes=True) for one in found])
