"""
What is shown of alerts and notifications.

Every function runs in a transaction of its caller. `namespace` is that of the caller; None for all of them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.governance.alerts.alert import Alert
from app.governance.alerts.notification import AlertNotification
from app.governance.alerts.store import COLUMNS, NOTIFICATION_COLUMNS
from app.kernel.database import UnitOfWork
from app.kernel.errors import NotFound
from app.kernel.postgres.filters import where

#: Most events and notifications of one alert that are shown.
MOST = 200

_OF_NAMESPACE = "(CAST(:namespace AS text) IS NULL OR namespace = :namespace)"
_ONE = text(f"SELECT {COLUMNS} FROM alert WHERE id = :id AND {_OF_NAMESPACE}")
_EVENTS = text("SELECT at, kind, actor, detail FROM alert_event WHERE alert_id = :id ORDER BY id DESC LIMIT :limit")
_NOTIFICATIONS_OF = text(f"""
    SELECT {NOTIFICATION_COLUMNS} FROM alert_notification
    WHERE id IN (SELECT notification_id FROM alert_notification_item WHERE alert_id = :id)
    ORDER BY id DESC LIMIT :limit
""")
_NOTIFICATION = text(f"SELECT {NOTIFICATION_COLUMNS} FROM alert_notification WHERE id = :id AND {_OF_NAMESPACE}")


@dataclass(frozen=True, slots=True)
class AlertEntry:
    """Something that happened to an alert."""

    at: datetime
    kind: str
    actor: str
    detail: str


@dataclass(frozen=True, slots=True)
class AlertFilter:
    """Which alerts are wanted; None means all."""

    namespace: str | None = None
    states: Collection[str] | None = None
    severity: str | None = None
    rule: str | None = None


def page(work: UnitOfWork, wanted: AlertFilter, *, before: UUID | None, limit: int) -> list[Alert]:
    """Return alerts from the newest to the oldest, before one."""
    given: dict[str, Any] = {"limit": limit}
    conditions = {
        "namespace": ("namespace = :namespace", wanted.namespace),
        "states": ("state = ANY(:states)", None if wanted.states is None else list(wanted.states)),
        "severity": ("severity = :severity", wanted.severity),
        "rule": ("rule = :rule", wanted.rule),
        "before": ("id < :before", before),
    }
    statement = f"SELECT {COLUMNS} FROM alert {where(given, conditions)} ORDER BY id DESC LIMIT :limit"
    return work.rows_of(Alert, text(statement), given)


def get(work: UnitOfWork, id_: UUID, namespace: str | None) -> Alert:
    """Return an alert. Raises NotFound."""
    found = work.row_of(Alert, _ONE, {"id": id_, "namespace": namespace})
    if found is None:
        raise NotFound("alert", str(id_))
    return found


def history(work: UnitOfWork, id_: UUID) -> list[AlertEntry]:
    """Return what happened to an alert, the newest first."""
    return work.rows_of(AlertEntry, _EVENTS, {"id": id_, "limit": MOST})


def notifications_of(work: UnitOfWork, id_: UUID) -> list[AlertNotification]:
    """Return the notifications of an alert, the newest first."""
    return work.rows_of(AlertNotification, _NOTIFICATIONS_OF, {"id": id_, "limit": MOST})


def notifications(
    work: UnitOfWork, namespace: str | None, state: str | None, *, before: UUID | None, limit: int
) -> list[AlertNotification]:
    """Return notifications from the newest to the oldest, before one."""
    given: dict[str, Any] = {"limit": limit}
    conditions = {
        "namespace": ("namespace = :namespace", namespace),
        "state": ("state = :state", state),
        "before": ("id < :before", before),
    }
    chosen = where(given, conditions)
    statement = f"SELECT {NOTIFICATION_COLUMNS} FROM alert_notification {chosen} ORDER BY id DESC LIMIT :limit"
    return work.rows_of(AlertNotification, text(statement), given)


def notification(work: UnitOfWork, id_: UUID, namespace: str | None) -> AlertNotification:
    """Return a notification. Raises NotFound."""
    found = work.row_of(AlertNotification, _NOTIFICATION, {"id": id_, "namespace": namespace})
    if found is None:
        raise NotFound("notification", str(id_))
    return found
