"""The section `http` of the settings: which servers `http` steps may call."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

from pydantic import field_validator

from app.kernel.sections.section import CHANGEABLE, Section
from app.kernel.security import egress
from app.kernel.units.durations import Duration


class HttpSettings(Section):
    """Which servers `http` steps may call."""

    #: Hosts: `api.example.com`, `*.example.com` (all its subdomains), or either with a port. While it is empty, every
    #: http step is refused.
    allowed_hosts: Annotated[tuple[str, ...], CHANGEABLE] = ()
    #: Whether a listed host may resolve to an address of this machine or of a private network.
    allow_private: bool = False
    #: For making one connection, including TLS.
    connect_timeout: Duration = timedelta(seconds=10)
    #: Certificates (PEM) that are trusted in addition to those of the system.
    ca_file: Path | None = None

    @field_validator("allowed_hosts")
    @classmethod
    def _are_rules(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            egress.rule(text)
        return value
