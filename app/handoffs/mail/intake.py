"""
The intake of a message with files: its files, its thread and itself are stored in one transaction, once.

PDFs wait until a worker has read their texts, for `HOLD` at most; the message is handed on after that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.files import storage
from app.files.file import FilePurpose, shown_id
from app.handoffs.connectors.connector import InboundMessage
from app.handoffs.mail import threads
from app.handoffs.store import HandoffVersion
from app.kernel.database import UnitOfWork
from app.kernel.sections.files import FileSettings

#: The longest that a message waits for the texts of its attachments.
HOLD = timedelta(minutes=10)
#: Most PDFs of a message that are read, and most bytes of one.
MAX_PDFS, MAX_PDF_BYTES = 5, 16 << 20
#: How long a worker may take for one.
LEASE = timedelta(minutes=1)
#: How often that is tried.
MAX_TAKES = 3

_LOCK_KEY = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 6160931847))")
_KNOWN = text("""
    SELECT id FROM handoff_message WHERE namespace = :namespace AND handoff = :handoff AND key = :key
""")
_WAIT = text("""
    INSERT INTO mail_attachment (message_id, position, file_id, takes, due_at)
    VALUES (:message_id, :position, :file_id, 0, now())
""")
_HOLD = text("""
    UPDATE handoff_message SET due_at = now() + CAST(:hold AS interval) WHERE id = :id AND state = 'received'
""")
_TAKE = text("""
    UPDATE mail_attachment SET due_at = now() + CAST(:lease AS interval), takes = takes + 1
    WHERE (message_id, position) = (  -- evaluated once: with IN, a plan may take more than one
        SELECT message_id, position FROM mail_attachment WHERE due_at <= now()
        ORDER BY due_at LIMIT 1 FOR UPDATE SKIP LOCKED
    )
    RETURNING message_id, position, file_id, takes
""")
_DONE = text("DELETE FROM mail_attachment WHERE message_id = :message_id AND position = :position")
_READ = text("""
    UPDATE handoff_message SET message = jsonb_set(jsonb_set(
        message::jsonb, ARRAY['attachments', CAST(:position AS text), 'text'], to_jsonb(CAST(:text AS text))),
        ARRAY['attachments', CAST(:position AS text), 'problem'], to_jsonb(CAST(:problem AS text)))::json
    WHERE id = :message_id AND state = 'received' AND sending = 1
""")
_RELEASE = text("""
    UPDATE handoff_message SET due_at = now()
    WHERE id = :message_id AND state = 'received' AND takes = 0
        AND NOT EXISTS (SELECT FROM mail_attachment WHERE message_id = :message_id)
""")
_IS_NEAR = text("SELECT EXISTS (SELECT FROM mail_attachment WHERE due_at <= now() + CAST(:within AS interval)) AS near")


@dataclass(frozen=True, slots=True)
class StoredParts:
    """A message with the ids of its files."""

    message: InboundMessage
    #: The places of PDFs in `message.attachments`, and their files.
    pdfs: tuple[tuple[int, UUID], ...] = ()


def _is_known(work: UnitOfWork, of: HandoffVersion, key: str) -> bool:
    """Whether a hand-off has a message, or another transaction is about to store it, which is waited for."""
    work.run(_LOCK_KEY, {"name": f"{of.namespace}/{of.name}/{key}"})
    return bool(work.rows(_KNOWN, {"namespace": of.namespace, "handoff": of.name, "key": key}))


def stored(
    work: UnitOfWork, of: HandoffVersion, found: InboundMessage, limits: FileSettings, keep: timedelta
) -> StoredParts:
    """
    Store the files of a new message and its thread. Returns it with their ids.

    Raises FileTooLarge when the namespace has no room: then nothing of the message is stored.
    """
    if not (found.files or found.related) or _is_known(work, of, found.key):
        return StoredParts(found)
    message: dict[str, Any] = dict(found.message)
    listed = [dict(one) for one in message.get("attachments", ())]
    pdfs: list[tuple[int, UUID]] = []
    for at, file in enumerate(found.files):
        kept = storage.add(work, of.namespace, file.data, file.name, FilePurpose.USER_DATA, keep, limits)
        if at >= len(listed):
            listed.append({"name": file.name, "type": file.type, "bytes": len(file.data), "text": "", "problem": ""})
        listed[at]["file"] = shown_id(kept.id)
        if file.data[:1_024].find(b"%PDF-") >= 0 and not found.skipped:
            if len(pdfs) < MAX_PDFS and len(file.data) <= MAX_PDF_BYTES:
                pdfs.append((at, kept.id))
            else:
                listed[at]["problem"] = "it was not read: there are too many PDFs, or it is too large"
    message["attachments"] = listed
    if found.related:
        message["thread"] = threads.join(work, of.namespace, of.name, found.related)
    return StoredParts(replace(found, message=message), tuple(pdfs))


def hold(work: UnitOfWork, id_: UUID, pdfs: Sequence[tuple[int, UUID]]) -> None:
    """Let a new message wait for the texts of its PDFs."""
    for position, file_id in pdfs:
        work.run(_WAIT, {"message_id": id_, "position": position, "file_id": file_id})
    if pdfs:
        work.run(_HOLD, {"id": id_, "hold": HOLD})


def take(work: UnitOfWork) -> Any | None:
    """Take an attachment whose text is to be read: `message_id`, `position`, `file_id`, `takes`."""
    return work.row(_TAKE, {"lease": LEASE})


def read(work: UnitOfWork, taken: Any, content: str, problem: str) -> None:
    """Record the text of an attachment. The message goes on when it was the last one."""
    values = {"message_id": taken.message_id, "position": taken.position}
    work.run(_READ, {**values, "text": content, "problem": problem})
    work.run(_DONE, values)
    work.run(_RELEASE, {"message_id": taken.message_id})


def is_near(work: UnitOfWork, within: timedelta) -> bool:
    """Whether attachments wait, or will within that time."""
    return bool(work.rows(_IS_NEAR, {"within": within})[0].near)
