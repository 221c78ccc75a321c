"""The tables of agents' access."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import CheckConstraint, Column, DateTime, LargeBinary, func
from sqlmodel import Field, SQLModel


def _instant(*, nullable: bool = False, default: bool = True) -> Column[datetime]:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=func.now() if default else None)


class AgentRoleRow(SQLModel, table=True):
    """A role of Postgres with which an agent logs in. The function `agent_host` reads its host."""

    __tablename__ = "agent_role"

    #: Its name in Postgres.
    role: str = Field(primary_key=True, max_length=63)
    #: The only host for which it may speak; None: any.
    host: str | None = Field(default=None, max_length=100, index=True)
    created_at: datetime = Field(sa_column=_instant())


class HostInvitationRow(SQLModel, table=True):
    """An invitation of a host: the hash of its token, and who has used it."""

    __tablename__ = "host_invitation"
    __table_args__ = (
        CheckConstraint("octet_length(token_hash) = 32", name="is_sha256"),
        CheckConstraint("(used_at IS NULL) = (used_by IS NULL)", name="used_by_a_host"),
    )

    #: The public part of the token.
    id: str = Field(primary_key=True, max_length=16)
    #: The only host that may use it; None: one that is new.
    host: str | None = Field(default=None, max_length=100)
    #: SHA-256 of the whole token.
    token_hash: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    created_at: datetime = Field(sa_column=_instant())
    created_by: str = Field(max_length=100)
    expires_at: datetime = Field(sa_column=_instant(default=False))
    used_at: datetime | None = Field(default=None, sa_column=_instant(nullable=True, default=False))
    used_by: str | None = Field(default=None, max_length=100)
