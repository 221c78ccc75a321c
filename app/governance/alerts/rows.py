"""
The database tables of alerts.

    alert                   something that people should know: from its first firing until it is resolved
    alert_event             what happened to it
    alert_channel           where notifications go; it names secrets and holds none
    alert_silence           alerts that are not sent for a while
    alert_notification      a message for one channel, and its delivery
    alert_notification_item the alerts that it is about

In a namespace at most one alert with the same fingerprint is open: an index makes sure.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, Column, DateTime, Index, Interval, Text, text
from sqlalchemy.dialects.postgresql import JSON
from sqlmodel import Field, SQLModel

from app.governance.alerts.alert import AlertState
from app.governance.alerts.notification import DeliveryState


def _instant(*, nullable: bool = True, default: str | None = None) -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if default is None else text(default))


def _text(default: str | None = None) -> Any:
    return Column(Text, nullable=False, server_default=default)


def _json() -> Any:
    return Column(JSON, nullable=False)


def _one_of(column: str, values: Any) -> str:
    return f"{column} IN ({', '.join(repr(value.value) for value in values)})"


class AlertRow(SQLModel, table=True):
    """An alert. Its fields are those of `Alert`."""

    __tablename__ = "alert"
    __table_args__ = (
        CheckConstraint(_one_of("state", AlertState), name="state_is_known"),
        Index("uq_alert_open", "namespace", "fingerprint", unique=True, postgresql_where=text("state <> 'resolved'")),
        Index("ix_alert_fingerprint", "namespace", "fingerprint", "id"),
        Index("ix_alert_namespace", "namespace", "id"),
        Index("ix_alert_due", "due_at", postgresql_where=text("due_at IS NOT NULL")),
        Index("ix_alert_open", "id", postgresql_where=text("state <> 'resolved'")),
        Index("ix_alert_resolved_at", "resolved_at", postgresql_where=text("state = 'resolved'")),
    )

    id: UUID = Field(primary_key=True)
    #: That of the rule; empty for one of the installation.
    namespace: str = Field(max_length=63)
    #: The same for the same rule with the same labels.
    fingerprint: str = Field(max_length=32)
    rule: str = Field(max_length=200)
    severity: str = Field(max_length=16)
    summary: str = Field(sa_column=_text())
    labels: dict[str, Any] = Field(sa_column=_json())
    value: float | None = None
    #: Alerts with the same one are sent together.
    group_key: str = Field(sa_column=_text())
    channels: list[Any] = Field(sa_column=_json())
    state: str = Field(max_length=16)
    #: Firings since it was opened.
    count: int
    first_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
    last_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
    cooldown: timedelta = Field(sa_column=Column(Interval, nullable=False))
    repeat: timedelta | None = Field(default=None, sa_column=Column(Interval))
    #: The end of its cooldown: it is not sent before.
    quiet_until: datetime | None = Field(default=None, sa_column=_instant())
    #: When a notification of it is due; None while none is owed.
    due_at: datetime | None = Field(default=None, sa_column=_instant())
    notified_at: datetime | None = Field(default=None, sa_column=_instant())
    #: Notifications since it was opened.
    notifications: int
    #: A notification of its end is owed.
    tell_end: bool
    acknowledged_at: datetime | None = Field(default=None, sa_column=_instant())
    acknowledged_by: str = Field(sa_column=_text(""))
    resolved_at: datetime | None = Field(default=None, sa_column=_instant())
    resolved_by: str = Field(sa_column=_text(""))


class AlertEventRow(SQLModel, table=True):
    """Something that happened to an alert."""

    __tablename__ = "alert_event"
    __table_args__ = (Index("ix_alert_event_alert_id", "alert_id", "id"),)

    id: UUID = Field(primary_key=True)
    alert_id: UUID = Field(foreign_key="alert.id", ondelete="CASCADE")
    at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
    kind: str = Field(max_length=16)
    actor: str = Field(sa_column=_text())
    detail: str = Field(sa_column=_text())


class AlertChannelRow(SQLModel, table=True):
    """A channel. Its fields are those of `AlertChannel`."""

    __tablename__ = "alert_channel"

    namespace: str = Field(max_length=63, primary_key=True)
    name: str = Field(max_length=63, primary_key=True)
    document: dict[str, Any] = Field(sa_column=_json())
    #: Why it takes nothing any more; empty while it does.
    disabled: str = Field(sa_column=_text(""))
    created_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
    updated_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))


class AlertSilenceRow(SQLModel, table=True):
    """A silence. Its fields are those of `AlertSilence`."""

    __tablename__ = "alert_silence"
    __table_args__ = (Index("ix_alert_silence_namespace", "namespace", "ends_at"),)

    id: UUID = Field(primary_key=True)
    namespace: str = Field(max_length=63)
    #: By label, the value that an alert must have.
    matchers: dict[str, Any] = Field(sa_column=_json())
    starts_at: datetime = Field(sa_column=_instant(nullable=False))
    ends_at: datetime = Field(sa_column=_instant(nullable=False))
    comment: str = Field(sa_column=_text())
    author: str = Field(sa_column=_text())
    created_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))


class AlertNotificationRow(SQLModel, table=True):
    """A notification. Its fields are those of `AlertNotification`."""

    __tablename__ = "alert_notification"
    __table_args__ = (
        CheckConstraint(_one_of("state", DeliveryState), name="state_is_known"),
        Index("ix_alert_notification_due", "due_at", postgresql_where=text("state = 'pending'")),
        Index("ix_alert_notification_namespace", "namespace", "id"),
        Index("ix_alert_notification_group", "namespace", "group_key", "created_at"),
        Index("ix_alert_notification_created_at", "created_at"),
    )

    #: The id that receivers see, also of each further attempt.
    id: UUID = Field(primary_key=True)
    namespace: str = Field(max_length=63)
    channel: str = Field(max_length=63)
    kind: str = Field(max_length=16)
    #: That of its alerts.
    group_key: str = Field(sa_column=_text())
    document: dict[str, Any] = Field(sa_column=_json())
    state: str = Field(max_length=16)
    attempts: int
    #: When a control worker sends it; while one does, when another one may.
    due_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
    #: Why the last attempt failed.
    error: str = Field(sa_column=_text(""))
    created_at: datetime = Field(sa_column=_instant(nullable=False, default="now()"))
    finished_at: datetime | None = Field(default=None, sa_column=_instant())


class AlertNotificationItemRow(SQLModel, table=True):
    """An alert in a notification."""

    __tablename__ = "alert_notification_item"
    __table_args__ = (Index("ix_alert_notification_item_alert_id", "alert_id"),)

    notification_id: UUID = Field(primary_key=True, foreign_key="alert_notification.id", ondelete="CASCADE")
    alert_id: UUID = Field(primary_key=True, foreign_key="alert.id", ondelete="CASCADE")
