"""The section `mail` of the settings: how mail of hand-offs comes in."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from app.kernel.sections.section import Section
from app.kernel.security import egress
from app.kernel.units import durations
from app.kernel.units.durations import Duration


class MailSettings(Section):
    """How mail of hand-offs comes in."""

    #: The port of the SMTP receiver. 0: there is none. One control worker of a machine has it, others stand by.
    smtp_port: int = Field(default=0, ge=0, le=65_535)
    #: The address of the SMTP receiver. It has no login: outside of the machine, a mail server belongs before it.
    smtp_host: str = Field(default="127.0.0.1", min_length=1, max_length=253)
    #: Most bytes of a mail that the SMTP receiver reads. The limit of a hand-off holds too.
    smtp_max_bytes: int = Field(default=25 * 1_048_576, ge=1_024, le=64 * 1_048_576)
    #: Most recipients of a mail.
    smtp_max_recipients: int = Field(default=20, ge=1, le=100)
    #: Most connections at the same time.
    smtp_max_connections: int = Field(default=20, ge=1, le=1_000)
    #: A connection that is silent for so long is closed.
    smtp_timeout: Annotated[Duration, durations.at_least("1s")] = timedelta(minutes=1)
    #: IMAP servers that hand-offs may name: `imap.example.com`, or with a port. While it is empty, none is watched.
    imap_hosts: tuple[str, ...] = ()
    #: Certificates (PEM) that are trusted for IMAP in addition to those of the system.
    imap_ca_file: Path | None = None
    #: How often a mailbox is asked anew while its server announces nothing; also the longest time to a new mailbox.
    imap_check: Annotated[Duration, durations.at_least("100ms")] = timedelta(seconds=30)
    #: Time for one answer of an IMAP server.
    imap_timeout: Annotated[Duration, durations.at_least("1s")] = timedelta(seconds=30)
    #: Most mailboxes that a control worker watches.
    imap_max_mailboxes: int = Field(default=50, ge=1, le=1_000)
    #: Retention of attachments.
    keep_files: Annotated[Duration, durations.at_least("1h")] = timedelta(days=30)

    @field_validator("imap_hosts")
    @classmethod
    def _are_rules(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            egress.rule(text)
        return value
