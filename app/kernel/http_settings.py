"""The section `http` of the settings: what `http` steps may call."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from pydantic import field_validator

from app.kernel.section import Section
from app.kernel.security import egress
from app.kernel.units.durations import Duration


class HttpSettings(Section):
    """What `http` steps may call."""

    #: Hosts, as `api.example.com`, `*.example.com` (all names below it) or either with a port. Without any, every http
    #: step is refused.
    allowed_hosts: tuple[str, ...] = ()
    #: Whether a listed host may lead to this machine or a private network.
    allow_private: bool = False
    #: For one connection, its encryption included.
    connect_timeout: Duration = timedelta(seconds=10)
    #: Certificates (PEM) that are trusted besides the system's.
    ca_file: Path | None = None

    @field_validator("allowed_hosts")
    @classmethod
    def _are_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            egress.rule(text)
        return value
