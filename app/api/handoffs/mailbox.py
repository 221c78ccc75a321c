"""The mailbox of a hand-off with mail: whether it is connected, how far it has been read, and why it is not watched."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api import problems
from app.api.callers import requires
from app.api.handoffs.handoffs import HandoffName, InjectedHandoffs
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.handoffs import check
from app.handoffs.connectors.email import EmailSource, ImapMailbox
from app.handoffs.mail import mailboxes
from app.handoffs.mail.mailboxes import MailboxPosition
from app.handoffs.service import HandoffService
from app.kernel.errors import NotFound

router = ApiRouter(prefix="/v1/handoffs/{name}/mailbox", tags=["hand-offs"], dependencies=[requires(KeyScope.READ)])


class MailboxOut(BaseModel):
    """A mailbox."""

    server: str = Field(description="host and port")
    folder: str
    is_connected: bool = Field(description="whether a control worker watches it now, and its server has answered")
    waits_for: str = Field(description="what it waits for, in words")
    is_begun: bool = Field(description="false: nothing was read of it yet")
    next_uid: int = Field(description="the least UID that was not seen yet")
    failed: list[int] = Field(description="UIDs of mails that could not be stored yet, and are tried again")
    seen_at: datetime | None = Field(description="when it was last read to its end")
    error: str = Field(description="why it is not watched now; empty while it is")
    next_try_at: datetime | None = Field(description="when it is tried again; null unless it failed")


@router.get("", summary="The mailbox of a hand-off", responses=problems.documented(404, 422))
def get(name: HandoffName, services: InjectedServices, handoffs: InjectedHandoffs) -> MailboxOut:
    """Whether a mailbox (IMAP) is connected, and how far it has been read. 404 for a hand-off without one."""
    found = find(name, services, handoffs)
    if found is None:
        raise NotFound("mailbox of hand-off", name)
    return found


def find(name: str, services: Services, handoffs: HandoffService) -> MailboxOut | None:
    """Return the mailbox of a hand-off; None when it has none. Raises NotFound, DatabaseUnreachable."""
    source = check.stored(handoffs.get(name).document).source
    mailbox = source.imap if isinstance(source, EmailSource) else None
    if mailbox is None:
        return None
    with services.database.work() as work:
        stored = mailboxes.find(work, handoffs.namespace, name)
    # What is stored of another mailbox says nothing about this one.
    known = stored if stored is not None and stored.place == mailboxes.place_of(mailbox) else None
    is_listed = mailboxes.is_listed(mailbox, services.settings.mail.imap_hosts)
    return MailboxOut(
        server=f"{mailbox.host}:{mailbox.server_port}",
        folder=mailbox.folder,
        is_connected=known is not None and known.is_connected,
        waits_for=_awaited(mailbox, known, is_listed=is_listed),
        is_begun=known is not None and known.uid_validity is not None,
        next_uid=1 if known is None else known.next_uid,
        failed=[] if known is None else sorted(int(uid) for uid in known.failed),
        seen_at=None if known is None else known.seen_at,
        error="" if known is None else known.error,
        next_try_at=None if known is None else known.next_try_at,
    )


def _awaited(mailbox: ImapMailbox, known: MailboxPosition | None, *, is_listed: bool) -> str:
    if known is not None and known.is_connected:
        return "new mail"
    if not is_listed:
        return f"the setting mail.imap_hosts to list {mailbox.host}:{mailbox.server_port}"
    if known is not None and known.is_held:
        return "an answer of the server"
    if known is not None and known.next_try_at is not None:
        return "the next try"
    return "a control worker that watches it"
