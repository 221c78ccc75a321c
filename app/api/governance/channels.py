"""The resource `alerts/channels`: where notifications go. Channels name secrets, which are never shown."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Path, Response
from pydantic import BaseModel, Field, RootModel

from app.access.callers import KeyScope
from app.api import bodies, problems
from app.api.bodies import RequestBody
from app.api.callers import ListedNamespace, requires
from app.api.governance.alerts import NotificationOut, notification_out
from app.api.governance.own_namespace import OwnNamespace
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.governance.alerts import channel_store, channels, store, views
from app.governance.alerts.channels import AlertChannel, AnyChannel, ChannelKind
from app.governance.alerts.notification import NotificationKind
from app.governance.tasks import ALERTS
from app.kernel import clock
from app.kernel.broker import CONTROL_QUEUE
from app.kernel.errors import Conflict, InvalidInput, NotFound, Problem

router = ApiRouter(prefix="/v1/alerts/channels", tags=["governance"], dependencies=[requires(KeyScope.READ)])

_Name = Annotated[str, Path(max_length=63, pattern=r"^[a-z0-9][a-z0-9_-]*$", examples=["ops"])]
#: Seconds after which a wake-up is obsolete.
_EXPIRES = 10.0


class ChannelIn(RootModel[AnyChannel]):
    """A channel, by its kind."""


class ChannelOut(BaseModel):
    """A channel."""

    name: str
    namespace: str = Field(description="empty for the alerts of rules of the installation")
    kind: ChannelKind
    options: dict[str, Any] = Field(description="its other fields; secrets by their names")
    disabled: str = Field(description="why nothing is sent there; empty while it is. Storing it again enables it")


class ChannelList(BaseModel):
    """Channels. The channel `log` is there without being stored."""

    channels: list[ChannelOut]


@router.get("", summary="List channels", responses=problems.documented(422))
def page(services: InjectedServices, namespace: ListedNamespace) -> ChannelList:
    """The channels that were stored."""
    with services.database.work() as work:
        return ChannelList(channels=[_out(one) for one in channel_store.page(work, namespace)])


@router.get("/{name}", summary="One channel", responses=problems.documented(404, 422))
def get(services: InjectedServices, namespace: OwnNamespace, name: _Name) -> ChannelOut:
    """A channel by its name."""
    with services.database.work() as work:
        found = channel_store.find(work, namespace, name)
    if found is None:
        raise NotFound("channel", name)
    return _out(found)


@router.put(
    "/{name}",
    dependencies=[requires(KeyScope.ADMIN)],
    summary="Store a channel",
    responses=problems.documented(
        409, 413, 415, 422, others={201: {"model": ChannelOut, "description": "Stored under a new name"}}
    ),
    openapi_extra=bodies.documented_as(ChannelIn),
)
def put(
    services: InjectedServices,
    namespace: OwnNamespace,
    name: _Name,
    body: RequestBody,
    response: Response,
) -> ChannelOut:
    """
    Store a channel under its name: `log`, `webhook`, `email` or `apprise`; 201 for a new one, 200 for a changed one.

    Secrets are named, and read by the control workers: `secret` signs a web hook, `url_secret` is its URL. A web hook
    may go to hosts of the setting `http.allowed_hosts`.
    """
    channel = channels.parse(body.data, namespace)
    if name == channels.LOG and channel.kind is not ChannelKind.LOG:
        raise InvalidInput([Problem("name", "the channel `log` is the log", "another name")], "channel")
    with services.database.work() as work:
        if channel_store.find(work, namespace, name) is None and channel_store.count(work, namespace) >= (
            channel_store.MOST
        ):
            raise Conflict(f"there are {channel_store.MOST} channels; delete some of them first")
        created = channel_store.put(work, namespace, name, channel.model_dump(mode="json", exclude_defaults=True))
        found = channel_store.find(work, namespace, name)
    assert found is not None, "it was stored"
    response.status_code = 201 if created else 200
    return _out(found)


@router.delete(
    "/{name}",
    status_code=204,
    dependencies=[requires(KeyScope.ADMIN)],
    summary="Delete a channel",
    responses=problems.documented(404, 422),
)
def delete(services: InjectedServices, namespace: OwnNamespace, name: _Name) -> None:
    """Delete a channel. Notifications that wait for it are dropped."""
    with services.database.work() as work:
        if not channel_store.delete(work, namespace, name):
            raise NotFound("channel", name)


@router.post(
    "/{name}/test",
    status_code=202,
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Test a channel",
    responses=problems.documented(404, 422),
)
def send_test(services: InjectedServices, namespace: OwnNamespace, name: _Name) -> NotificationOut:
    """Send a test to a channel. Poll `GET /v1/alerts/notifications/{id}` for what came of it."""
    document = {
        "type": f"alert.{NotificationKind.TEST.value}",
        "timestamp": clock.now().isoformat(),
        "data": {"namespace": namespace, "group": {}, "total": 0, "alerts": []},
    }
    with services.database.work() as work:
        if channel_store.find(work, namespace, name) is None and name != channels.LOG:
            raise NotFound("channel", name)
        id_ = store.add_notification(work, (namespace, name), NotificationKind.TEST, document)
        found = views.notification(work, id_, namespace)
    services.publisher.publish(ALERTS, (), queue=CONTROL_QUEUE, description="wake-up", expires=_EXPIRES)
    return notification_out(found)


def _out(found: AlertChannel) -> ChannelOut:
    options = {name: value for name, value in found.document.items() if name != "kind"}
    return ChannelOut(
        name=found.name,
        namespace=found.namespace,
        kind=ChannelKind(found.document["kind"]),
        options=options,
        disabled=found.disabled,
    )
