"""The section `agents` of the settings: what a host gets that joins by a token."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr, field_validator

from app.kernel.postgres import address
from app.kernel.sections.section import Section


class AgentSettings(Section):
    """What a host gets that joins: the addresses of the servers as agents reach them, and the certificates to trust."""

    #: The address of Postgres for agents, without a user: `postgresql://db.example.com/arriero?sslmode=verify-full`.
    #: Each agent gets a role of its own for it. By default that of the API.
    database_url: str = Field(default="", max_length=2_000, pattern=r"^((postgresql|postgres)://.+)?$")
    #: The address of the broker for agents, with the user that `arriero db agent-user` describes. By default that of
    #: the API, whose user may do everything there.
    redis_url: SecretStr | None = None
    #: Certificates (PEM) that agents trust for Postgres, the broker and the API.
    ca_file: Path | None = None

    @field_validator("database_url")
    @classmethod
    def _has_no_password(cls, value: str) -> str:
        if "@" in value.partition("://")[2].partition("/")[0]:
            raise ValueError("must have no user and no password: each agent gets a role of its own")
        return value and address.normalize(value)

    @field_validator("redis_url")
    @classmethod
    def _is_an_address(cls, value: SecretStr | None) -> SecretStr | None:
        schemes = ("redis", "rediss", "valkey", "valkeys")
        if value is not None and value.get_secret_value().partition("://")[0] not in schemes:
            raise ValueError(f"must begin with {' or '.join(f'{scheme}://' for scheme in schemes)}")
        return value

    @field_validator("ca_file")
    @classmethod
    def _made_absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()
