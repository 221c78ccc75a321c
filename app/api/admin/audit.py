"""The resource `audit`: who has changed what."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import Query
from pydantic import AwareDatetime, BaseModel, Field

from app.access.audit import log as audit_log
from app.access.audit.log import AuditFilter
from app.access.callers import KeyScope
from app.api import problems
from app.api.callers import ListedNamespace, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices

router = ApiRouter(prefix="/v1/audit", tags=["admin"], dependencies=[requires(KeyScope.ADMIN)])

_Text = Annotated[str | None, Query(max_length=200, pattern=r"^[^\x00]*$")]


class AuditEntryOut(BaseModel):
    """A change that was made, or refused."""

    id: UUID
    at: datetime
    namespace: str = Field(description="the namespace of who made it; empty for a caller without one")
    actor: str = Field(description="the name of the key, `local`, or `command line (USER)`")
    key_id: str | None
    action: str = Field(examples=["PUT /v1/workflows/{name}"])
    target: dict[str, str] = Field(description="the names and ids in the path")
    summary: str = Field(description="the body, shortened and without secrets")
    status: int = Field(description="the HTTP status; of a command, its exit code")
    address: str


class AuditPage(BaseModel):
    """Entries from the newest to the oldest."""

    entries: list[AuditEntryOut]
    next_cursor: UUID | None = Field(description="the value of `cursor` for the next page; null on the last page")


@router.get("", summary="The audit log", responses=problems.documented(422))
def page(
    services: InjectedServices,
    namespace: ListedNamespace,
    actor: _Text = None,
    action: Annotated[_Text, Query(description="a part of the action, such as `/v1/workflows`")] = None,
    target: Annotated[_Text, Query(description="a name or id in the path")] = None,
    since: Annotated[AwareDatetime | None, Query(description="with a time zone")] = None,
    until: Annotated[AwareDatetime | None, Query(description="with a time zone")] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    cursor: Annotated[UUID | None, Query(description="`next_cursor` of the previous page")] = None,
) -> AuditPage:
    """Changes from the newest to the oldest. A key of a namespace sees the entries of that namespace only."""
    wanted = AuditFilter(namespace, actor, action, target, since, until)
    with services.database.work() as work:
        found = audit_log.page(work, wanted, before=cursor, limit=limit + 1)
    entries = [AuditEntryOut.model_validate(one, from_attributes=True) for one in found[:limit]]
    return AuditPage(entries=entries, next_cursor=entries[-1].id if len(found) > limit else None)
