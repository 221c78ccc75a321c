"""The mailbox of a hand-off with mail: how far it has been read, and why it is not watched."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api import problems
from app.api.callers import requires
from app.api.handoffs.handoffs import HandoffName, InjectedHandoffs
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.handoffs.mail import mailboxes
from app.kernel.errors import NotFound

router = ApiRouter(prefix="/v1/handoffs/{name}/mailbox", tags=["hand-offs"], dependencies=[requires(KeyScope.READ)])


class MailboxOut(BaseModel):
    """A mailbox."""

    is_begun: bool = Field(description="false: nothing was read of it yet")
    next_uid: int = Field(description="the least UID that was not seen yet")
    failed: list[int] = Field(description="UIDs of mails that could not be stored yet, and are tried again")
    seen_at: datetime | None = Field(description="when it was last read to its end")
    error: str = Field(description="why it is not watched now; empty while it is")


@router.get("", summary="The mailbox of a hand-off", responses=problems.documented(404, 422))
def get(name: HandoffName, services: InjectedServices, handoffs: InjectedHandoffs) -> MailboxOut:
    """How far a mailbox (IMAP) has been read. 404 before a control worker has tried to."""
    with services.database.work() as work:
        found = mailboxes.find(work, handoffs.namespace, name)
    if found is None:
        raise NotFound("mailbox of hand-off", name)
    return MailboxOut(
        is_begun=found.uid_validity is not None,
        next_uid=found.next_uid,
        failed=sorted(int(uid) for uid in found.failed),
        seen_at=found.seen_at,
        error=found.error,
    )
