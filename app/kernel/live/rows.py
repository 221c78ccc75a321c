"""
The database table of run-time settings.

    setting_version    a version: all run-time values after it, what it changed, who did it, and why

Versions are only added. The newest one holds; going back to an earlier one adds a version with its values.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Column, DateTime, Integer, Text, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field, SQLModel


class SettingVersionRow(SQLModel, table=True):
    """A version of the run-time settings."""

    __tablename__ = "setting_version"

    #: Counts from 1, without gaps.
    version: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    #: All run-time values, by dotted key, in the format of the settings.
    values: dict[str, Any] = Field(sa_column=Column(JSONB, nullable=False))
    #: By changed key, its value before and now; null where there was or is none.
    changes: dict[str, Any] = Field(sa_column=Column(JSONB, nullable=False))
    author: str = Field(sa_column=Column(Text, nullable=False))
    reason: str = Field(sa_column=Column(Text, nullable=False))
    #: The version whose values it restored.
    reverted_to: int | None = Field(default=None, sa_column=Column(Integer))
    created_at: datetime = Field(
        sa_column=Column(DateTime(timezone=True), nullable=False, server_default=text("now()"))
    )
