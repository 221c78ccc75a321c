"""
The source `email`: mail from a mailbox (IMAP), from the SMTP receiver of the installation, or as raw MIME over HTTP.

One definition can have several ways in; a mail that comes on two of them is one message.
"""

from __future__ import annotations

import hmac
from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from app.handoffs import formats
from app.handoffs.connectors.connector import (
    ExpressionText,
    HandoffPart,
    InboundFile,
    InboundMessage,
    NotGenuine,
    ReceivedRequest,
    RevealSecret,
    SecretName,
    SourceFields,
)
from app.handoffs.mail import reading
from app.handoffs.mail.reading import MailEnvelope
from app.kernel.errors import InvalidInput, Problem

#: Fewest characters of the secret of the HTTP way.
_MIN_SECRET = 24
#: Without control characters, which would end a command of IMAP.
_Printable = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$")]
_HostName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.:-]{1,253}$")]


def _address(text: str) -> str:
    local, _, domain = text.rpartition("@")
    if not local or not (formats.is_email(text) or formats.is_email(f"{local}@{domain}.test")):
        raise ValueError(f"{text[:60]!r} is no address such as support@example.com")
    return text.lower()


class ImapMailbox(HandoffPart):
    """A mailbox that is watched. Mails stay in it, and keep their flags."""

    #: A server that the setting `mail.imap_hosts` lists.
    host: _HostName
    port: int | None = Field(default=None, ge=1, le=65_535, description="by default 993, or 143 without `tls`")
    #: `none` sends the password in clear text.
    security: Literal["tls", "starttls", "none"] = "tls"
    user: _Printable = Field(max_length=254)
    password: SecretName
    folder: _Printable = Field(default="INBOX", max_length=200)
    #: Which mails of a mailbox that is new here are handed on: those that come from now on, or all.
    begin: Literal["now", "all"] = "now"

    @property
    def server_port(self) -> int:
        """The port that is used."""
        return self.port or (993 if self.security == "tls" else 143)


class SmtpRecipients(HandoffPart):
    """Mail to these addresses that the SMTP receiver of the installation gets."""

    recipients: tuple[str, ...] = Field(min_length=1, max_length=50)

    @field_validator("recipients")
    @classmethod
    def _are_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_address(one) for one in value)


class PostedMail(HandoffPart):
    """Raw MIME by POST to the address of the hand-off, with `Authorization: Bearer SECRET`."""

    #: At least 24 characters.
    secret: SecretName


class SenderProof(HandoffPart):
    """What is believed of a sender, by the results of SPF, DKIM and DMARC that the receiving mail server has added."""

    #: The `authserv-id` of that server. It must remove such headers that come from outside.
    server: str = Field(min_length=1, max_length=253)
    #: Mail without `pass` for one of these is skipped.
    require: tuple[Literal["spf", "dkim", "dmarc"], ...] = ()


class MailReply(HandoffPart):
    """The answer to a mail, once it is delivered: by the SMTP server of the settings `alerts.smtp_*`."""

    #: CEL over `message` and `output`, what the workflow has returned: a text. An empty one is no answer.
    text: ExpressionText
    sender: str = Field(max_length=254)
    #: Most answers to one address within an hour.
    max_per_hour: int = Field(default=5, ge=1, le=1_000)

    @field_validator("sender")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        return _address(value)


class EmailSource(SourceFields):
    """Mail."""

    kind: Literal["email"]
    imap: ImapMailbox | None = None
    smtp: SmtpRecipients | None = None
    http: PostedMail | None = None
    #: Most bytes of a mail, with its attachments.
    max_bytes: int = Field(default=10 * 1_048_576, ge=1_024, le=50 * 1_048_576)
    proof: SenderProof | None = None
    reply: MailReply | None = None
    #: Whether mail may reach steps that offer tools to a model: whoever writes a mail could then have them called.
    allow_tools: bool = False

    @model_validator(mode="after")
    def _has_a_way_in(self) -> EmailSource:
        if self.imap is None and self.smtp is None and self.http is None:
            raise ValueError("at least one of 'imap', 'smtp' and 'http' is needed")
        return self

    def receive(self, request: ReceivedRequest, reveal: RevealSecret, now: datetime) -> list[InboundMessage]:
        """Return the mail of a request. Raises NotGenuine, InvalidInput."""
        del now
        if self.http is None:
            raise NotGenuine("this hand-off takes no mail over HTTP")
        secret = reveal(self.http.secret).encode()
        if len(secret) < _MIN_SECRET:
            raise NotGenuine(f"the secret of the hand-off has less than {_MIN_SECRET} characters")
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), secret):
            raise NotGenuine("the header Authorization does not have the secret of the hand-off")
        return [self.read(request.body, MailEnvelope("http"))]

    def read(self, raw: bytes, envelope: MailEnvelope) -> InboundMessage:
        """Return a mail as a message. Raises InvalidInput for one that is empty."""
        if not raw.strip():
            raise InvalidInput([Problem("", "the mail is empty", "a message in MIME")], "message")
        own = () if self.reply is None else (self.reply.sender,)
        server, require = ("", ()) if self.proof is None else (self.proof.server, self.proof.require)
        mail = reading.read(raw, envelope, server=server, require=require, own=own)
        files = [InboundFile(one.name or "attachment", one.type, one.data) for one in mail.attachments]
        if mail.is_cut:  # what was not read is in the whole mail
            files.append(InboundFile("message.eml", "message/rfc822", raw))
        return InboundMessage(mail.key, mail.sender, mail.message, mail.skipped, tuple(files), mail.related)
