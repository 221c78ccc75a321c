"""
The tables of mail.

    mail_thread       which thread each message id of a hand-off belongs to
    mail_attachment   attachments whose text is to be read, while they wait
    mail_reply        the answers to mails: those that are to be sent, and what came of the others
    mailbox           how far each mailbox has been read, and which worker watches it
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, Column, DateTime, Index, Text, text
from sqlalchemy.dialects.postgresql import JSON
from sqlmodel import Field, SQLModel


def _instant(*, nullable: bool = True) -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if nullable else text("now()"))


class MailThreadRow(SQLModel, table=True):
    """The thread of a message id. Ids that are only referred to have one too."""

    __tablename__ = "mail_thread"
    __table_args__ = (
        Index("ix_mail_thread_thread", "namespace", "handoff", "thread"),
        Index("ix_mail_thread_used_at", "used_at"),
    )

    namespace: str = Field(max_length=63, primary_key=True)
    handoff: str = Field(max_length=100, primary_key=True)
    message_id: str = Field(max_length=255, primary_key=True)
    thread: str = Field(sa_column=Column(Text, nullable=False))
    used_at: datetime = Field(sa_column=_instant(nullable=False))


class MailAttachmentRow(SQLModel, table=True):
    """An attachment whose text is to be read."""

    __tablename__ = "mail_attachment"
    __table_args__ = (Index("ix_mail_attachment_due_at", "due_at"),)

    message_id: UUID = Field(primary_key=True, foreign_key="handoff_message.id", ondelete="CASCADE")
    #: Its place in `message.attachments`.
    position: int = Field(primary_key=True)
    file_id: UUID
    #: How often a worker took it.
    takes: int
    due_at: datetime = Field(sa_column=_instant(nullable=False))


class MailReplyRow(SQLModel, table=True):
    """An answer."""

    __tablename__ = "mail_reply"
    __table_args__ = (
        CheckConstraint("state IN ('waiting', 'sent', 'failed')", name="state_is_known"),
        Index("ix_mail_reply_due_at", "due_at", postgresql_where=text("state = 'waiting'")),
        Index("ix_mail_reply_recipient", "namespace", "handoff", "recipient", "created_at"),
    )

    message_id: UUID = Field(primary_key=True, foreign_key="handoff_message.id", ondelete="CASCADE")
    #: That of the message which is answered.
    sending: int = Field(primary_key=True)
    namespace: str = Field(max_length=63)
    handoff: str = Field(max_length=100)
    recipient: str = Field(max_length=254)
    #: The fields of `MailAnswer`.
    document: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    state: str = Field(max_length=16)
    attempts: int
    due_at: datetime = Field(sa_column=_instant(nullable=False))
    #: Why the last attempt failed.
    error: str = Field(sa_column=Column(Text, nullable=False))
    created_at: datetime = Field(sa_column=_instant(nullable=False))


class MailboxRow(SQLModel, table=True):
    """A mailbox of a hand-off."""

    __tablename__ = "mailbox"

    namespace: str = Field(max_length=63, primary_key=True)
    handoff: str = Field(max_length=100, primary_key=True)
    #: The server, the user and the folder, hashed: another one begins anew.
    place: str = Field(max_length=64)
    #: None: nothing was read of it yet.
    uid_validity: int | None = Field(default=None, sa_column=Column(BigInteger))
    #: The least UID that was not seen yet.
    next_uid: int = Field(sa_column=Column(BigInteger, nullable=False))
    #: UIDs of mails that could not be stored yet, and how often that was tried.
    failed: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    #: The worker that watches it, until `until`.
    owner: str = Field(sa_column=Column(Text, nullable=False))
    until: datetime = Field(sa_column=_instant(nullable=False))
    #: Whether the server has answered since the lease was taken.
    is_connected: bool = Field(default=False, sa_column_kwargs={"server_default": text("false")})
    #: When it is tried again; None unless it failed.
    next_try_at: datetime | None = Field(default=None, sa_column=_instant())
    error: str = Field(sa_column=Column(Text, nullable=False))
    #: When the mailbox was last seen to have nothing new.
    seen_at: datetime | None = Field(default=None, sa_column=_instant())
