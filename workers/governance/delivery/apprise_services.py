"""Services of the library apprise, an optional extra. The URL of a service is a secret, which operators define."""

from __future__ import annotations

import importlib

from app.governance.alerts.channels import AppriseChannel
from app.governance.alerts.notification import AlertNotification, DeliveryFailed
from app.kernel.errors import StepFailure
from app.kernel.security.secrets import Secrets
from workers.governance.delivery import messages

_TYPES = {"info": "info", "warning": "warning", "critical": "failure"}


def deliver(notification: AlertNotification, channel: AppriseChannel, secrets: Secrets) -> None:
    """Deliver a notification. Raises DeliveryFailed."""
    try:
        apprise = importlib.import_module("apprise")
    except ImportError:
        raise DeliveryFailed("apprise is not installed here: pip install 'arriero[apprise]'") from None
    try:
        url = secrets.reveal([channel.url_secret])[channel.url_secret]
    except StepFailure as failure:
        raise DeliveryFailed(failure.message) from None
    service = apprise.Apprise()
    if not service.add(url.strip()):
        raise DeliveryFailed(f"the secret {channel.url_secret!r} is not a URL that apprise knows")
    document = notification.document
    alerts = document["data"]["alerts"]
    kind = "success" if document["type"].endswith(".resolved") else _TYPES[alerts[0]["severity"]] if alerts else "info"
    if not service.notify(title=messages.subject(document), body=messages.body(document), notify_type=kind):
        raise DeliveryFailed("the service did not take the notification")
