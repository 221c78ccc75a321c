"""The resource `alerts/silences`: alerts that are not sent for a while."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated
from uuid import UUID

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.access.callers import KeyScope
from app.api import bodies, problems
from app.api.callers import InjectedCaller, ListedNamespace, requires
from app.api.governance.own_namespace import OwnNamespace
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.governance.alerts import silences
from app.governance.alerts.silences import AlertSilence
from app.kernel.errors import Conflict, NotFound
from app.kernel.units.durations import Duration

router = ApiRouter(prefix="/v1/alerts/silences", tags=["governance"], dependencies=[requires(KeyScope.READ)])

_Label = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
_Value = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00]*$")]


class SilenceIn(BaseModel):
    """Which alerts are not sent, and for how long."""

    model_config = ConfigDict(extra="forbid")

    matchers: dict[_Label, _Value] = Field(
        min_length=1,
        max_length=16,
        description="by label (also `rule` and `severity`), its value; with `*` at its end, its beginning",
        examples=[{"rule": "memory-high", "host": "gpu-*"}],
    )
    time: Duration = Field(gt=timedelta(0), le=silences.LONGEST, examples=["2h"])
    comment: str = Field(default="", max_length=500)


class SilenceOut(BaseModel):
    """A silence."""

    id: UUID
    namespace: str
    matchers: dict[str, str]
    starts_at: datetime
    ends_at: datetime
    comment: str
    author: str


class SilenceList(BaseModel):
    """Silences, the one that ends last first."""

    silences: list[SilenceOut]


@router.get("", summary="List silences", responses=problems.documented(422))
def page(
    services: InjectedServices,
    namespace: ListedNamespace,
    ended: Annotated[bool, Query(description="include those that have ended")] = False,
) -> SilenceList:
    """Silences that are in force."""
    with services.database.work() as work:
        return SilenceList(silences=[silence_out(one) for one in silences.page(work, namespace, ended=ended)])


@router.post(
    "",
    status_code=201,
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Silence alerts",
    responses=problems.documented(409, 413, 415, 422),
    openapi_extra=bodies.documented_as(SilenceIn),
)
def add(
    services: InjectedServices,
    caller: InjectedCaller,
    namespace: OwnNamespace,
    body: Annotated[SilenceIn, bodies.of(SilenceIn)],
) -> SilenceOut:
    """Send no alert with these labels from now on. What is still open when the silence ends is sent then."""
    with services.database.work() as work:
        if len(silences.active(work)) >= silences.MOST:
            raise Conflict(f"{silences.MOST} silences are in force; end some of them first")
        return silence_out(silences.add(work, namespace, body.matchers, body.time, body.comment, caller.name))


@router.delete(
    "/{silence_id}",
    dependencies=[requires(KeyScope.OPERATE)],
    summary="End a silence",
    responses=problems.documented(404, 422),
)
def end(services: InjectedServices, namespace: ListedNamespace, silence_id: UUID) -> SilenceOut:
    """End a silence now. It stays in the list of those that have ended."""
    with services.database.work() as work:
        found = silences.end(work, silence_id, namespace)
    if found is None:
        raise NotFound("silence", str(silence_id))
    return silence_out(found)


def silence_out(found: AlertSilence) -> SilenceOut:
    """Return the answer for a silence."""
    return SilenceOut.model_validate(found, from_attributes=True)
