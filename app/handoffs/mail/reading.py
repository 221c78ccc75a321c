"""
A mail as a message of a hand-off: the fields that mappings see, its attachments, and why it is not handed on.

The text is that for people: `text/plain`, or else the HTML as text. Mail text is data: nothing in it is executed,
fetched or followed, and every length has a bound.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

from app.handoffs.mail import authentication, automatic, charsets, headers, html_text, structure
from app.handoffs.mail.headers import MailAddress, MailHeaders
from app.handoffs.mail.structure import MailPart, MailStructure

#: Most characters of the text of a mail, of its subject, and of the text of an attachment.
MAX_TEXT, MAX_SUBJECT, MAX_ATTACHED_TEXT = 200_000, 1_000, 100_000
#: Most attachments that are listed and stored.
MAX_ATTACHMENTS = 50


@dataclass(frozen=True, slots=True)
class MailEnvelope:
    """What the protocol says beside the mail."""

    #: How it came: `imap`, `smtp` or `http`.
    by: str
    #: The sender of the envelope, empty for a bounce; None where it is not known.
    sender: str | None = None
    recipients: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MailAttachment:
    """A file that came with a mail."""

    name: str
    type: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ReadMail:
    """A mail that was read."""

    #: The same for each delivery of the mail, by whatever way.
    key: str
    sender: str
    message: dict[str, Any] = field(repr=False)
    #: In the order of `message.attachments`.
    attachments: tuple[MailAttachment, ...] = field(repr=False)
    #: Message ids, its own first: of what belongs to the same thread.
    related: tuple[str, ...]
    skipped: str
    #: Something of it was not read.
    is_cut: bool


def read(
    raw: bytes, envelope: MailEnvelope, *, server: str = "", require: Iterable[str] = (), own: Collection[str] = ()
) -> ReadMail:
    """
    Read a mail. Never raises, whatever the bytes are.

    `server` is whose `Authentication-Results` count, `require` the methods that must say `pass`, and `own` are the
    addresses from which answers are sent.
    """
    found = structure.divide(raw)
    defects = list(found.defects)
    text, cut = _text(found.parts, defects)
    files = [part for part in found.parts if not _is_text(part)]
    attachments = [MailAttachment(part.content.filename, part.content.type, part.data) for part in files]
    if len(attachments) > MAX_ATTACHMENTS:
        defects.append(f"there are {len(attachments)} attachments; {MAX_ATTACHMENTS} were read")
        cut = True
    top = found.headers
    sender = _first(top, "from")
    said = authentication.results(top, server)
    ids = _ids(top)
    key = f"{ids[0]}#{_digest(found)}"
    message = {
        "message_id": ids[0],
        "in_reply_to": next(iter(headers.message_ids(top.first("in-reply-to"))), ""),
        "references": headers.message_ids(top.first("references")),
        "thread": thread_of(ids) or key,
        "from": _shown(sender),
        "reply_to": _shown(_first(top, "reply-to") if top.first("reply-to") else sender),
        "to": [_shown(one) for one in headers.addresses(top.first("to"))],
        "cc": [_shown(one) for one in headers.addresses(top.first("cc"))],
        "subject": headers.unencoded(top.first("subject"))[:MAX_SUBJECT],
        "date": _date(top.first("date")),
        "text": text,
        "attachments": [_listed(one) for one in attachments[:MAX_ATTACHMENTS]],
        "authentication": said,
        "received": {"by": envelope.by, "from": envelope.sender, "to": list(envelope.recipients)},
        "defects": defects[: structure.MAX_DEFECTS],
    }
    skipped = automatic.reason(top, found.content, envelope.sender, own) or _unproven(said, require)
    kept, related = tuple(attachments[:MAX_ATTACHMENTS]), tuple(one for one in ids if one)
    return ReadMail(key, sender.address.lower(), message, kept, related, skipped, cut or found.is_cut)


def thread_of(related: list[str]) -> str:
    """Return the thread of a mail by its headers alone: the first mail that it refers to, or itself."""
    return related[1] if len(related) > 1 else related[0]


def _ids(top: MailHeaders) -> list[str]:
    """Return the id of a mail, then those that it refers to, the oldest first."""
    own = next(iter(headers.message_ids(top.first("message-id"))), "")
    others = headers.message_ids(top.first("references")) + headers.message_ids(top.first("in-reply-to"))[:1]
    return [own, *dict.fromkeys(one for one in others if one != own)]


def _is_text(part: MailPart) -> bool:
    if part.content.is_attachment or part.content.filename:
        return False
    return part.content.type in ("text/plain", "text/html")


def _text(parts: Iterable[MailPart], defects: list[str]) -> tuple[str, bool]:
    """Return the text for people: of alternatives the plain one, unless it is empty."""
    groups: dict[object, list[MailPart]] = {}
    for at, part in enumerate(parts):
        if _is_text(part):
            groups.setdefault(("part", at) if part.alternative is None else part.alternative, []).append(part)
    found = []
    for group in groups.values():
        plain = [text for part in group if part.content.type == "text/plain" and (text := _decoded(part, defects))]
        found += plain or [
            text
            for part in group
            if part.content.type == "text/html" and (text := html_text.text_of(_decoded(part, defects)))
        ]
    text = "\n\n".join(found)
    if len(text) > MAX_TEXT:
        defects.append(f"the text has {len(text)} characters; {MAX_TEXT} were read")
    return text[:MAX_TEXT], len(text) > MAX_TEXT


def _decoded(part: MailPart, defects: list[str]) -> str:
    text, whole = charsets.decoded(part.data, part.content.charset)
    if not whole:
        defects.append(f"a text is not in the charset {part.content.charset[:40]!r}")
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def _listed(attachment: MailAttachment) -> dict[str, Any]:
    """Return what is said of an attachment. Texts are read here, PDFs later in a process of their own."""
    text = ""
    if attachment.type.startswith("text/"):
        text = charsets.decoded(attachment.data[: MAX_ATTACHED_TEXT * 4], "")[0]
        text = html_text.text_of(text) if attachment.type == "text/html" else text
    return {
        "name": attachment.name,
        "type": attachment.type,
        "bytes": len(attachment.data),
        "sha256": hashlib.sha256(attachment.data).hexdigest(),
        "file": None,
        "text": text[:MAX_ATTACHED_TEXT],
        "problem": "",
    }


def _first(top: MailHeaders, name: str) -> MailAddress:
    return next(iter(headers.addresses(top.first(name))), MailAddress("", ""))


def _shown(address: MailAddress) -> dict[str, str]:
    return {"name": address.name, "address": address.address}


def _date(value: str) -> str:
    """Return the instant that a mail says, in ISO 8601, or an empty text."""
    try:
        found: datetime = parsedate_to_datetime(value[:100])
        return found.isoformat()
    except (ValueError, TypeError, IndexError, OverflowError):
        return ""


def _unproven(said: dict[str, str], require: Iterable[str]) -> str:
    missing = [f"{method} is {said[method] or 'not given'}" for method in require if said[method] != "pass"]
    return f"its sender is not proven: {', '.join(missing)}" if missing else ""


def _digest(found: MailStructure) -> str:
    """
    Return a hash of what the sender wrote.

    Servers add headers and encode contents anew, so those do not count. A message id alone would let anybody who
    knows it keep the mail out that has it.
    """
    hashed = hashlib.sha256()
    for name in ("from", "date", "subject"):
        hashed.update(f"{name}:{found.headers.first(name)}\n".encode())
    for part in found.parts:
        hashed.update(hashlib.sha256(part.data.replace(b"\r\n", b"\n").strip()).digest())
    return hashed.hexdigest()[:32]
