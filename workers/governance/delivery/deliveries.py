"""
Deliveries: sends notifications that are due, and decides what follows a failure.

A notification is claimed for the time of a lease, sent, and recorded: a worker that dies in between leaves it to the
next one, with the same id. A slow receiver delays only a thread of its own. No failure stops the others.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from app.governance.alerts import channel_store, store
from app.governance.alerts.channels import (
    LOG,
    AlertChannel,
    AppriseChannel,
    EmailChannel,
    LogChannel,
    WebhookChannel,
)
from app.governance.alerts.notification import AlertNotification, DeliveryFailed, DeliveryState, pause_after
from app.kernel import clock, ids, log
from app.kernel.database import Database
from app.kernel.errors import ArrieroError, Unavailable
from app.kernel.security.secrets import Secrets
from app.kernel.settings import Settings
from workers.governance.delivery import apprise_services, email, webhook

_log = log.get(__name__)

#: Deliveries at the same time.
_THREADS = 4
#: The lease of a delivery, beyond its timeout.
_LEASE = timedelta(seconds=30)
#: What a message does not say, because it may quote a request.
_UNKNOWN = "it failed in an unforeseen way; the log of the control worker says how"


class ChannelGone(Exception):
    """The channel of a notification is gone or takes nothing."""


def deliver_due(database: Database, settings: Settings, secrets: Secrets, in_time: Callable[[], bool]) -> int:
    """Deliver what is due, until nothing is or the time is over. Returns how many attempts there were."""
    attempts = 0
    lease = settings.alerts.timeout * 2 + _LEASE
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="alerts") as threads:
        while in_time():
            with database.work() as work:
                claimed = store.claim(work, lease, _THREADS)
            if not claimed:
                break
            attempts += len(claimed)
            list(threads.map(lambda one: _attempt(database, settings, secrets, one), claimed))
    return attempts


def _attempt(database: Database, settings: Settings, secrets: Secrets, claimed: AlertNotification) -> None:
    """Make one attempt, and record what came of it. Never raises."""
    where = {"notification": str(claimed.id), "channel": claimed.channel, "namespace": claimed.namespace}
    try:
        try:
            _send(database, settings, secrets, claimed)
        except DeliveryFailed as failure:
            _record_failure(database, claimed, failure)
            _log.warning("notification_not_delivered", attempt=claimed.attempts, error=str(failure), **where)
        except ChannelGone as gone:
            with database.work() as work:
                store.finish(work, claimed, DeliveryState.DROPPED, str(gone))
        else:
            with database.work() as work:
                store.finish(work, claimed, DeliveryState.SENT)
            _log.info("notification_delivered", attempt=claimed.attempts, **where)
    except Unavailable as error:
        _log.warning("notification_not_recorded", error=str(error), **where)
    except Exception:  # noqa: BLE001 the outermost frame of a thread: one notification must not stop the others
        _log.exception("notification_raised", **where)
        try:
            _record_failure(database, claimed, DeliveryFailed(_UNKNOWN))
        except Unavailable as error:
            _log.warning("notification_not_recorded", error=str(error), **where)


def _send(database: Database, settings: Settings, secrets: Secrets, claimed: AlertNotification) -> None:
    """Raises DeliveryFailed, ChannelGone."""
    timeout = settings.alerts.timeout
    channel = _channel(database, claimed)
    match None if channel is None else _fields(channel):
        case None | LogChannel():
            _write_to_log(claimed)
        case WebhookChannel() as hook:
            webhook.deliver(claimed, hook, secrets, settings.http, timeout, clock.now())
        case EmailChannel() as mail:
            email.deliver(claimed, mail, settings.alerts, timeout, clock.now())
        case AppriseChannel() as service:
            apprise_services.deliver(claimed, service, secrets)


def _channel(database: Database, claimed: AlertNotification) -> AlertChannel | None:
    with database.work() as work:
        found = channel_store.find(work, claimed.namespace, claimed.channel)
    if found is None and claimed.channel != LOG:
        raise ChannelGone("the channel was deleted")
    if found is not None and found.disabled:
        raise ChannelGone(f"the channel is disabled: {found.disabled}")
    return found


def _fields(channel: AlertChannel) -> object:
    try:
        return channel.fields
    except ArrieroError as error:
        raise DeliveryFailed(f"the channel is not valid in this version: {error}", final=True) from None


def _write_to_log(claimed: AlertNotification) -> None:
    data = claimed.document["data"]
    if not data["alerts"]:
        _log.info("alert_channel_test", channel=claimed.channel)
    for alert in data["alerts"]:
        level = _log.info if claimed.kind == "resolved" or alert["severity"] == "info" else _log.warning
        level(
            f"alert_{claimed.kind}",
            rule=alert["rule"],
            severity=alert["severity"],
            summary=alert["summary"],
            labels=alert["labels"],
            count=alert["count"],
            alert_id=alert["id"],
        )


def _record_failure(database: Database, claimed: AlertNotification, failure: DeliveryFailed) -> None:
    pause = None if failure.final else pause_after(claimed.attempts, ids.chance(), failure.retry_after)
    with database.work() as work:
        if pause is None:
            store.finish(work, claimed, DeliveryState.FAILED, str(failure))
        else:
            store.retry(work, claimed, pause, str(failure))
        if isinstance(failure, webhook.Unsubscribed):
            channel_store.disable(work, claimed.namespace, claimed.channel, f"the receiver is gone: {failure}"[:500])
