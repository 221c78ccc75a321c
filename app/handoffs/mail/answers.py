"""
The answers to mails: written with the confirmation of a message, in one transaction, and sent by a worker.

An answer has the same id for each attempt, so that mail programs show a repetition once. It says that a program has
written it (RFC 3834), is never sent to a mailbox that no person reads, and not too often to one address.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.handoffs.connectors.email import EmailSource, MailReply
from app.handoffs.definition import Handoff
from app.handoffs.mail import automatic, headers
from app.handoffs.record import HandoffMessage, HandoffStage
from app.kernel.database import UnitOfWork
from app.kernel.errors import StepFailure
from app.kernel.security import texts
from app.workflows.expressions import conditions

#: Most characters of an answer.
MAX_TEXT = 100_000
_MAX_REASON = 500

_COUNT = text("""
    SELECT count(*) AS replies FROM mail_reply
    WHERE namespace = :namespace AND handoff = :handoff AND recipient = :recipient
        AND created_at > now() - interval '1 hour' AND message_id <> :message_id
""")
_ADD = text("""
    INSERT INTO mail_reply (
        message_id, sending, namespace, handoff, recipient, document, state, attempts, due_at, error
    ) VALUES (
        :message_id, :sending, :namespace, :handoff, :recipient, CAST(:document AS json), 'waiting', 0, now(), ''
    ) ON CONFLICT (message_id, sending) DO NOTHING
""")
_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 8816253004))")
_TAKE = text("""
    UPDATE mail_reply SET due_at = now() + CAST(:lease AS interval), attempts = attempts + 1
    WHERE (message_id, sending) = (  -- evaluated once: with IN, a plan may take more than one
        SELECT message_id, sending FROM mail_reply WHERE state = 'waiting' AND due_at <= now()
        ORDER BY due_at LIMIT 1 FOR UPDATE SKIP LOCKED
    )
    RETURNING message_id, sending, namespace, handoff, document, attempts
""")
_END = text("""
    UPDATE mail_reply SET state = :state, error = :error
    WHERE message_id = :message_id AND sending = :sending AND state = 'waiting'
""")
_RETRY = text("""
    UPDATE mail_reply SET due_at = now() + CAST(:pause AS interval), error = :error
    WHERE message_id = :message_id AND sending = :sending AND state = 'waiting'
""")
_STAGE = text("""
    UPDATE handoff_message SET stages = (
        stages::jsonb
        || jsonb_build_object('stage', CAST(:stage AS text), 'at', now(), 'detail', CAST(:detail AS text))
    )::json
    WHERE id = :id
""")
_NEAR = text("""
    SELECT EXISTS (
        SELECT FROM mail_reply WHERE state = 'waiting' AND due_at <= now() + CAST(:within AS interval)
    ) AS near
""")


@dataclass(frozen=True, slots=True)
class MailAnswer:
    """An answer."""

    #: With brackets.
    message_id: str
    sender: str
    recipient: str
    subject: str
    in_reply_to: str
    references: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True)
class TakenAnswer:
    """An answer that a worker sends."""

    message_id: UUID
    sending: int
    namespace: str
    handoff: str
    document: dict[str, Any]
    attempts: int

    @property
    def answer(self) -> MailAnswer:
        """The answer."""
        return MailAnswer(**{**self.document, "references": tuple(self.document["references"])})


def add(work: UnitOfWork, handoff: Handoff, message: HandoffMessage, output: Any) -> None:
    """Write the answer to a delivered mail, or the reason why there is none."""
    if not isinstance(handoff.source, EmailSource) or (reply := handoff.source.reply) is None:
        return
    answer = answer_to(reply, message, output)
    if isinstance(answer, MailAnswer):
        names = {"namespace": message.namespace, "handoff": message.handoff, "recipient": answer.recipient.lower()}
        values = {**names, "message_id": message.id}
        work.run(_LOCK, {"name": "/".join(names.values())})
        if work.rows(_COUNT, values)[0].replies < reply.max_per_hour:
            document = json.dumps(asdict(answer))
            work.run(_ADD, {**values, "sending": message.sending, "document": document})
            return
        answer = f"{reply.max_per_hour} answers went to this address within an hour"
    note(work, message.id, f"not answered: {answer}")


def answer_to(reply: MailReply, message: HandoffMessage, output: Any) -> MailAnswer | str:
    """Return the answer to a mail, or why there is none. Never raises for a mail."""
    mail = message.message
    recipient = _text(mail.get("reply_to"), "address")
    if not automatic.is_answerable(recipient) or recipient.lower() == reply.sender:
        return f"no person reads {recipient[:100]!r}"
    try:
        found = conditions.evaluate(reply.text, {"message": mail, "output": output})
    except StepFailure as failure:
        return failure.message[:_MAX_REASON]
    if not isinstance(found, str):
        return f"the value of source.reply.text is {type(found).__name__}, and no text"
    if not found.strip():
        return "the text of the answer is empty"
    own, domain = str(mail.get("message_id") or ""), reply.sender.rpartition("@")[2]
    references = mail.get("references")
    named = [one for one in references if isinstance(one, str)] if isinstance(references, list) else []
    ids = headers.message_ids(" ".join([*named, own]))
    subject = " ".join(str(mail.get("subject") or "").split())[:200]
    return MailAnswer(
        f"<{message.id}.{message.sending}@{domain}>",
        reply.sender,
        recipient,
        subject if subject.lower().startswith("re:") else f"Re: {subject}".strip(),
        next(iter(headers.message_ids(own)), ""),
        tuple(ids[:1] + ids[1:][-20:]),
        texts.storable(found, MAX_TEXT),
    )


def _text(found: Any, name: str) -> str:
    return str(found.get(name) or "") if isinstance(found, Mapping) else ""


def take(work: UnitOfWork, lease: timedelta) -> TakenAnswer | None:
    """Take an answer that is due. Another worker takes it when the lease is over."""
    return work.row_of(TakenAnswer, _TAKE, {"lease": lease})


def sent(work: UnitOfWork, taken: TakenAnswer) -> None:
    """Record that an answer was sent."""
    values = {"message_id": taken.message_id, "sending": taken.sending, "state": "sent", "error": ""}
    if work.run(_END, values):
        note(work, taken.message_id, f"sent to {taken.answer.recipient}")


def failed(work: UnitOfWork, taken: TakenAnswer, why: str, pause: timedelta | None) -> None:
    """Record a failure. Without a pause it was the last attempt."""
    values = {"message_id": taken.message_id, "sending": taken.sending, "error": texts.storable(why, _MAX_REASON)}
    if pause is not None:
        work.run(_RETRY, {**values, "pause": pause})
    elif work.run(_END, {**values, "state": "failed"}):
        note(work, taken.message_id, f"not sent: {values['error']}")


def note(work: UnitOfWork, id_: UUID, detail: str) -> None:
    """Write what came of an answer to the stages of its message."""
    work.run(_STAGE, {"id": id_, "stage": HandoffStage.ANSWER.value, "detail": detail})


def is_near(work: UnitOfWork, within: timedelta) -> bool:
    """Whether answers are due, or will be within that time."""
    return bool(work.rows(_NEAR, {"within": within})[0].near)
