"""The resource `retention` of a namespace: for how long it keeps its conversations."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.access import namespaces
from app.access.callers import KeyScope
from app.api import bodies, problems
from app.api.callers import InjectedCaller, requires
from app.api.memory.documents import Retention
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.kernel.errors import NotFound
from app.kernel.units import durations
from app.memory.conversations import retention

router = ApiRouter(prefix="/v1/namespaces/{name}/retention", tags=["memory"], dependencies=[requires(KeyScope.READ)])


class RetentionIn(BaseModel):
    """For how long the conversations of a namespace are kept."""

    model_config = ConfigDict(extra="forbid")

    conversations: Retention | None = Field(
        description="after the last message; null: for ever, whatever the setting says", examples=["90d"]
    )


class RetentionOut(BaseModel):
    """For how long the conversations of a namespace are kept."""

    namespace: str
    conversations: str | None = Field(description="after the last message; null: until somebody deletes them")
    origin: Literal["namespace", "settings"] = Field(description="who says so")


@router.get("", summary="The retention of a namespace", responses=problems.documented(404))
def get(name: str, services: InjectedServices, caller: InjectedCaller) -> RetentionOut:
    """For how long the conversations of a namespace are kept that have no retention of their own."""
    _require(name, caller.namespace)
    return _current(services, name)


@router.put(
    "",
    summary="Set the retention of a namespace",
    dependencies=[requires(KeyScope.ADMIN, all_namespaces=True)],
    responses=problems.documented(413, 415, 422),
    openapi_extra=bodies.documented_as(RetentionIn),
)
def put(name: str, services: InjectedServices, body: Annotated[RetentionIn, bodies.of(RetentionIn)]) -> RetentionOut:
    """Set it. It holds for the conversations that are there, too: the next deletion removes those that are older."""
    namespaces.require(name, "path.name", "request")
    with services.database.work() as work:
        retention.set_for(work, name, body.conversations)
    return _current(services, name)


@router.delete(
    "",
    summary="Remove the retention of a namespace",
    dependencies=[requires(KeyScope.ADMIN, all_namespaces=True)],
    responses=problems.documented(422),
)
def delete(name: str, services: InjectedServices) -> RetentionOut:
    """Return to the setting `conversations.retention`."""
    namespaces.require(name, "path.name", "request")
    with services.database.work() as work:
        retention.unset_for(work, name)
    return _current(services, name)


def _require(name: str, own: str | None) -> None:
    if own not in (None, name) or not namespaces.is_valid(name):
        raise NotFound("namespace", name[:100])


def _current(services: Services, name: str) -> RetentionOut:
    with services.database.work() as work:
        found = retention.find_for(work, name)
    kept: timedelta | None = services.settings.conversations.retention if found is None else found.retention
    shown = None if kept is None else durations.show(kept)
    return RetentionOut(namespace=name, conversations=shown, origin="settings" if found is None else "namespace")
