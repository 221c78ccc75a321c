"""
Mail that machines write: replies of absence, reports of delivery, lists, and what Arriero itself has sent.

Such mail is never handed on, and so never answered (RFC 3834): two programs that answer each other do not end.
"""

from __future__ import annotations

from collections.abc import Collection

from app.handoffs.mail import headers
from app.handoffs.mail.headers import ContentHeaders, MailHeaders

#: The header of the answers that Arriero sends.
OWN_HEADER = "X-Arriero-Handoff"
#: Most servers that a mail has passed; one with more goes in a circle (RFC 5321, section 6.3).
_MAX_HOPS = 50
#: Names of mailboxes that no person reads.
_NOBODY = frozenset({"mailer-daemon", "postmaster", "noreply", "no-reply", "donotreply", "do-not-reply", "bounce"})
_BULK = frozenset({"bulk", "junk", "list", "auto_reply"})


def reason(found: MailHeaders, content: ContentHeaders, return_path: str | None, own: Collection[str]) -> str:
    """
    Return why a mail is not handed on; an empty text when a person may have written it.

    `return_path` is the sender of the envelope, None where it is not known. `own`: from where Arriero writes.
    """
    if found.first(OWN_HEADER.lower()):
        return "Arriero has sent it"
    submitted = found.first("auto-submitted").lower()
    if submitted and submitted.partition(";")[0].strip() != "no":
        return f"an automatic mail: Auto-Submitted is {submitted[:60]!r}"
    if content.type == "multipart/report":
        return f"a report: {content.report or 'of a kind that is not given'}"
    if return_path == "" or (return_path is None and found.first("return-path") == "<>"):
        return "a bounce: its return path is empty"
    precedence = found.first("precedence").lower()
    if precedence in _BULK:
        return f"an automatic mail: Precedence is {precedence!r}"
    for name in ("x-autoreply", "x-autorespond", "x-auto-reply"):
        if found.first(name):
            return f"an automatic reply: it has the header {name}"
    sender = next(iter(headers.addresses(found.first("from"))), None)
    address = "" if sender is None else sender.address.lower()
    if address.partition("@")[0] == "mailer-daemon":
        return "a bounce: a mail server has sent it"
    if address and address in {one.lower() for one in own}:
        return "it comes from the address of the answers"
    hops = len(found.all("received"))
    return f"it has passed {hops} servers: it goes in a circle" if hops > _MAX_HOPS else ""


def is_answerable(address: str) -> bool:
    """Whether a person may read what is sent to an address."""
    local = address.lower().partition("@")[0].partition("+")[0]
    return bool(address) and local not in _NOBODY and not local.startswith(("bounce", "no-reply", "noreply"))
