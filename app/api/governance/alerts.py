"""The resource `alerts`: what people should know, who takes care, and what was sent."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from app.access.callers import KeyScope
from app.api import bodies, problems
from app.api.callers import InjectedCaller, ListedNamespace, requires
from app.api.governance.silences import SilenceOut, silence_out
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.governance.alerts import silences, store, views
from app.governance.alerts.alert import Alert, AlertEventKind, AlertState, all_labels
from app.governance.alerts.notification import AlertNotification, DeliveryState, NotificationKind
from app.governance.alerts.views import AlertFilter
from app.kernel.errors import Conflict
from app.kernel.units.durations import Duration

router = ApiRouter(prefix="/v1/alerts", tags=["governance"], dependencies=[requires(KeyScope.READ)])

_Limit = Annotated[int, Query(ge=1, le=500)]
_Cursor = Annotated[UUID | None, Query(description="`next_cursor` of the previous page")]


class AlertOut(BaseModel):
    """Something that people should know, from its first firing until it is resolved."""

    id: UUID
    namespace: str = Field(description="empty for a rule of the installation")
    rule: str
    severity: Literal["info", "warning", "critical"]
    state: AlertState
    summary: str = Field(description="of the last firing")
    labels: dict[str, Any]
    value: float | None
    fingerprint: str = Field(description="the same for the same rule with the same labels")
    count: int = Field(description="firings since it was opened")
    channels: list[str] = Field(description="those that its rule names; without any, the default ones are told")
    first_at: datetime
    last_at: datetime
    notified_at: datetime | None
    notifications: int = Field(description="how often it was sent since it was opened")
    quiet_until: datetime | None = Field(description="the end of its cooldown")
    acknowledged_at: datetime | None
    acknowledged_by: str
    resolved_at: datetime | None
    resolved_by: str


class AlertPage(BaseModel):
    """Alerts from the newest to the oldest."""

    alerts: list[AlertOut]
    next_cursor: UUID | None = Field(description="the value of `cursor` for the next page; null on the last page")


class AlertEventOut(BaseModel):
    """Something that happened to an alert."""

    at: datetime
    kind: AlertEventKind
    actor: str
    detail: str


class NotificationOut(BaseModel):
    """A message about alerts for one channel, and its delivery."""

    id: UUID
    namespace: str
    channel: str
    kind: NotificationKind
    state: DeliveryState
    attempts: int
    due_at: datetime = Field(description="of the next attempt, while it is pending")
    error: str = Field(description="why the last attempt failed")
    created_at: datetime
    finished_at: datetime | None
    alerts: int = Field(description="how many alerts it is about")


class AlertDetail(AlertOut):
    """An alert with its history, the newest first."""

    history: list[AlertEventOut]
    sent: list[NotificationOut]


class NotificationPage(BaseModel):
    """Notifications from the newest to the oldest."""

    notifications: list[NotificationOut]
    next_cursor: UUID | None


class AcknowledgementIn(BaseModel):
    """Who takes care says why."""

    model_config = ConfigDict(extra="forbid")

    note: str = Field(default="", max_length=500)


class SilenceOneIn(BaseModel):
    """How long an alert is not sent."""

    model_config = ConfigDict(extra="forbid")

    time: Duration = Field(gt=timedelta(0), le=silences.LONGEST, examples=["2h"])
    comment: str = Field(default="", max_length=500)


@router.get("", summary="List alerts", responses=problems.documented(422))
def page(
    services: InjectedServices,
    namespace: ListedNamespace,
    state: Annotated[list[AlertState] | None, Query(max_length=3, description="by default those not resolved")] = None,
    severity: Literal["info", "warning", "critical"] | None = None,
    rule: Annotated[str | None, Query(max_length=200, pattern=r"^[^\x00]*$")] = None,
    limit: _Limit = 100,
    cursor: _Cursor = None,
) -> AlertPage:
    """Alerts from the newest to the oldest; those that are not resolved, unless states are given."""
    states = state or [AlertState.OPEN, AlertState.ACKNOWLEDGED]
    wanted = AlertFilter(namespace, [one.value for one in states], severity, rule)
    with services.database.work() as work:
        found = views.page(work, wanted, before=cursor, limit=limit + 1)
    shown = [_out(one) for one in found[:limit]]
    return AlertPage(alerts=shown, next_cursor=shown[-1].id if len(found) > limit else None)


@router.get("/notifications", summary="List notifications", responses=problems.documented(422))
def notifications(
    services: InjectedServices,
    namespace: ListedNamespace,
    state: DeliveryState | None = None,
    limit: _Limit = 100,
    cursor: _Cursor = None,
) -> NotificationPage:
    """What was sent, or is tried again, from the newest to the oldest."""
    with services.database.work() as work:
        found = views.notifications(work, namespace, state, before=cursor, limit=limit + 1)
    shown = [notification_out(one) for one in found[:limit]]
    return NotificationPage(notifications=shown, next_cursor=shown[-1].id if len(found) > limit else None)


@router.get("/notifications/{notification_id}", summary="One notification", responses=problems.documented(404, 422))
def notification(services: InjectedServices, namespace: ListedNamespace, notification_id: UUID) -> NotificationOut:
    """A notification, and what came of its last attempt."""
    with services.database.work() as work:
        return notification_out(views.notification(work, notification_id, namespace))


@router.get("/{alert_id}", summary="One alert", responses=problems.documented(404, 422))
def get(services: InjectedServices, namespace: ListedNamespace, alert_id: UUID) -> AlertDetail:
    """An alert, with its history and its notifications."""
    with services.database.work() as work:
        found = views.get(work, alert_id, namespace)
        history, sent = views.history(work, alert_id), views.notifications_of(work, alert_id)
    return AlertDetail(
        **_out(found).model_dump(),
        history=[AlertEventOut.model_validate(one, from_attributes=True) for one in history],
        sent=[notification_out(one) for one in sent],
    )


@router.post(
    "/{alert_id}/acknowledge",
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Acknowledge an alert",
    responses=problems.documented(404, 409, 413, 415, 422),
    openapi_extra=bodies.documented_as(AcknowledgementIn),
)
def acknowledge(
    services: InjectedServices,
    caller: InjectedCaller,
    namespace: ListedNamespace,
    alert_id: UUID,
    body: Annotated[AcknowledgementIn, bodies.of(AcknowledgementIn)],
) -> AlertOut:
    """Take care of an alert: it is not sent again until it is resolved. Repeating this changes nothing."""
    with services.database.work() as work:
        found = views.get(work, alert_id, namespace)
        if found.state == AlertState.RESOLVED:
            raise Conflict(f"alert {alert_id} is resolved")
        if store.acknowledge(work, alert_id, caller.name):
            store.add_event(work, alert_id, AlertEventKind.ACKNOWLEDGED, caller.name, body.note)
        return _out(views.get(work, alert_id, namespace))


@router.post(
    "/{alert_id}/resolve",
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Resolve an alert",
    responses=problems.documented(404, 422),
)
def resolve(services: InjectedServices, caller: InjectedCaller, namespace: ListedNamespace, alert_id: UUID) -> AlertOut:
    """End an alert by hand. Its rule opens another one when it fires again. Repeating this changes nothing."""
    with services.database.work() as work:
        views.get(work, alert_id, namespace)
        if store.resolve(work, alert_id, caller.name):
            store.add_event(work, alert_id, AlertEventKind.RESOLVED, caller.name, "by hand")
        return _out(views.get(work, alert_id, namespace))


@router.post(
    "/{alert_id}/silence",
    status_code=201,
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Silence an alert",
    responses=problems.documented(404, 413, 415, 422),
    openapi_extra=bodies.documented_as(SilenceOneIn),
)
def silence(
    services: InjectedServices,
    caller: InjectedCaller,
    namespace: ListedNamespace,
    alert_id: UUID,
    body: Annotated[SilenceOneIn, bodies.of(SilenceOneIn)],
) -> SilenceOut:
    """Send no alert of this rule with these labels for a while."""
    with services.database.work() as work:
        found = views.get(work, alert_id, namespace)
        matchers = all_labels(found.rule, found.severity, found.labels)
        del matchers["severity"]
        return silence_out(silences.add(work, found.namespace, matchers, body.time, body.comment, caller.name))


def notification_out(found: AlertNotification) -> NotificationOut:
    """Return the answer for a notification."""
    fields = {name: getattr(found, name) for name in NotificationOut.model_fields if name != "alerts"}
    return NotificationOut(**fields, alerts=found.document["data"]["total"])


def _out(found: Alert) -> AlertOut:
    return AlertOut.model_validate(found, from_attributes=True)
