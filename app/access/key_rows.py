"""The table of API keys."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import CheckConstraint, Column, DateTime, LargeBinary, String, func
from sqlalchemy.dialects.postgresql import ARRAY
from sqlmodel import Field, SQLModel


def _instant(*, nullable: bool = True, default: bool = False) -> Column[datetime]:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=func.now() if default else None)


class ApiKeyRow(SQLModel, table=True):
    """An API key: who it is, and the hash of its secret."""

    __tablename__ = "api_key"
    __table_args__ = (
        CheckConstraint("octet_length(secret_hash) = 32", name="is_sha256"),
        CheckConstraint("scopes <@ '{submit,read,operate,admin}' AND scopes <> '{}'", name="scopes_are_known"),
    )

    #: The public part of the key.
    id: str = Field(primary_key=True, max_length=16)
    name: str = Field(max_length=100)
    #: None: all namespaces.
    namespace: str | None = Field(default=None, max_length=63, index=True)
    scopes: list[str] = Field(sa_column=Column(ARRAY(String(16)), nullable=False))
    #: SHA-256 of the whole key.
    secret_hash: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    #: That of the key before the last rotation, which works until `overlap_until`.
    previous_hash: bytes | None = Field(default=None, sa_column=Column(LargeBinary))
    created_at: datetime = Field(sa_column=_instant(nullable=False, default=True))
    created_by: str = Field(max_length=100)
    expires_at: datetime | None = Field(default=None, sa_column=_instant())
    revoked_at: datetime | None = Field(default=None, sa_column=_instant())
    revoked_by: str | None = Field(default=None, max_length=100)
    rotated_at: datetime | None = Field(default=None, sa_column=_instant())
    overlap_until: datetime | None = Field(default=None, sa_column=_instant())
    #: When it was used last; written at most once a minute.
    used_at: datetime | None = Field(default=None, sa_column=_instant())
    previous_used_at: datetime | None = Field(default=None, sa_column=_instant())
