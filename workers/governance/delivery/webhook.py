"""
Web hooks, by the specification of Standard Webhooks: https://www.standardwebhooks.com.

`webhook-id` is that of the notification, the same for each attempt: a receiver that has seen it drops the repetition.
The signature covers id, time and body. The call goes through the egress rules of `http` steps: a host that
`http.allowed_hosts` does not list, or an address that is not public, is refused.
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from urllib.parse import urlsplit
from uuid import UUID

from app.governance.alerts.channels import WebhookChannel
from app.governance.alerts.notification import AlertNotification, DeliveryFailed
from app.kernel.errors import FailureReason, StepFailure
from app.kernel.sections.http import HttpSettings
from app.kernel.security import webhook_signatures
from app.kernel.security.secrets import Secrets
from app.kernel.security.webhook_signatures import UnusableSecret
from app.workflows.http.calls import HttpBody, HttpCall
from workers import connections, outbound
from workers.connections import Resolve

#: Most bytes of an answer that are read.
_MAX_ANSWER = 64 * 1024
#: Status of a receiver that wants nothing more.
_GONE = 410


class Unsubscribed(DeliveryFailed):
    """The receiver answers that it is gone."""


def deliver(
    notification: AlertNotification,
    channel: WebhookChannel,
    secrets: Secrets,
    settings: HttpSettings,
    timeout: timedelta,
    now: datetime,
    resolve: Resolve = connections.system_addresses,
) -> None:
    """Deliver a notification. Raises DeliveryFailed."""
    try:
        call = _call(notification, channel, secrets, timeout, now)
        outbound.call(call, settings=settings, on_stop=lambda _: None, resolve=resolve)
    except StepFailure as failure:
        if failure.status == _GONE:
            raise Unsubscribed(failure.message, final=True) from None
        is_final = failure.reason is FailureReason.INVALID_REQUEST
        raise DeliveryFailed(failure.message, retry_after=failure.retry_after, final=is_final) from None


def message_id(notification: UUID) -> str:
    """Return the id of the message that receivers see."""
    return f"msg_{notification.hex}"


def signature(secret: str, id_: str, timestamp: int, body: bytes) -> str:
    """Return the value of `webhook-signature`. Raises DeliveryFailed for a secret that is too short."""
    try:
        return webhook_signatures.sign(secret, id_, timestamp, body)
    except UnusableSecret as error:
        raise DeliveryFailed(str(error)) from None


def _call(
    notification: AlertNotification, channel: WebhookChannel, secrets: Secrets, timeout: timedelta, now: datetime
) -> HttpCall:
    names = {*channel.header_secrets.values(), channel.secret, channel.url_secret} - {None}
    values = secrets.reveal(name for name in names if name is not None)
    url = channel.url if channel.url_secret is None else values[channel.url_secret].strip()
    hidden = {*values.values()}
    if channel.url_secret is not None:
        hidden |= {url, url.partition("?")[0], *_parts(url)}
    body = json.dumps(notification.document, ensure_ascii=False).encode()
    id_, timestamp = message_id(notification.id), int(now.timestamp())
    headers = {name: values[secret].strip() for name, secret in channel.header_secrets.items()}
    headers |= {"webhook-id": id_, "webhook-timestamp": str(timestamp)}
    if channel.secret is not None:
        headers["webhook-signature"] = signature(values[channel.secret], id_, timestamp, body)
    return HttpCall(
        url,
        method="POST",
        headers=headers,
        body=HttpBody(body, "application/json"),
        timeout=timeout,
        max_bytes=_MAX_ANSWER,
        secrets=tuple(sorted(hidden, key=len, reverse=True)),
    )


def _parts(url: str) -> set[str]:
    """The parts of a secret URL that messages may quote."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return set()
    return {part for part in (parts.path, parts.query, parts.password) if part and len(part) > 3}
