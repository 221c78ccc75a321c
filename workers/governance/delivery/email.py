"""
E-mail over SMTP.

The id of a message is that of its notification, the same for each attempt: mail programs show a repetition once.
A password is sent over TLS only.
"""

from __future__ import annotations

import smtplib
import ssl
from datetime import datetime, timedelta
from email.message import EmailMessage
from email.utils import format_datetime

from app.governance.alerts.channels import EmailChannel
from app.governance.alerts.notification import AlertNotification, DeliveryFailed
from app.kernel.sections.governance import AlertSettings
from workers.governance.delivery import messages

#: Replies from here on are final: another attempt would get the same one.
_PERMANENT = 550


def deliver(
    notification: AlertNotification, channel: EmailChannel, settings: AlertSettings, timeout: timedelta, now: datetime
) -> None:
    """Deliver a notification. Raises DeliveryFailed."""
    if not settings.smtp_host or not settings.smtp_from:
        raise DeliveryFailed("no server of e-mail is set (alerts.smtp_host, alerts.smtp_from)")
    send(message_of(notification, channel, settings, now), settings, timeout, len(channel.to))


def send(message: EmailMessage, settings: AlertSettings, timeout: timedelta, recipients: int = 1) -> None:
    """Send a message to so many recipients; it is sent when one of them takes it. Raises DeliveryFailed."""
    if not settings.smtp_host:
        raise DeliveryFailed("no server of e-mail is set (alerts.smtp_host)")
    try:
        with _connected(settings, timeout) as client:
            refused = client.send_message(message)
    except smtplib.SMTPRecipientsRefused as error:
        refused = error.recipients
        raise DeliveryFailed(_refusal(refused), final=_is_final(refused)) from None
    except smtplib.SMTPResponseException as error:
        text = f"{settings.smtp_host} answered {error.smtp_code}: {_text(error.smtp_error)}"
        final = isinstance(error, smtplib.SMTPDataError) and error.smtp_code >= _PERMANENT
        raise DeliveryFailed(text, final=final) from None
    except (smtplib.SMTPException, OSError) as error:
        raise DeliveryFailed(f"{settings.smtp_host} cannot be reached: {type(error).__name__}: {error}") from None
    if refused and len(refused) == recipients:
        raise DeliveryFailed(_refusal(refused), final=_is_final(refused))


def message_of(
    notification: AlertNotification, channel: EmailChannel, settings: AlertSettings, now: datetime
) -> EmailMessage:
    """Return the message of a notification."""
    message = EmailMessage()
    message["From"] = settings.smtp_from
    message["To"] = ", ".join(channel.to)
    message["Subject"] = messages.subject(notification.document)
    message["Date"] = format_datetime(now)
    message["Message-ID"] = f"<{notification.id}@arriero.invalid>"
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(messages.body(notification.document))
    return message


def _connected(settings: AlertSettings, timeout: timedelta) -> smtplib.SMTP:
    seconds, context = timeout.total_seconds(), ssl.create_default_context()
    if settings.smtp_security == "tls":
        client: smtplib.SMTP = smtplib.SMTP_SSL(
            settings.smtp_host, settings.smtp_port, timeout=seconds, context=context
        )
    else:
        client = smtplib.SMTP(settings.smtp_host, settings.smtp_port, timeout=seconds)
    try:
        if settings.smtp_security == "starttls":
            client.starttls(context=context)
        if settings.smtp_password is not None and settings.smtp_security != "none":
            client.login(settings.smtp_user, settings.smtp_password.get_secret_value())
    except BaseException:
        client.close()
        raise
    return client


def _refusal(refused: dict[str, tuple[int, bytes]]) -> str:
    said = "; ".join(f"{code} {_text(text)}" for code, text in list(refused.values())[:3])
    return f"{len(refused)} recipients were refused: {said}"


def _is_final(refused: dict[str, tuple[int, bytes]]) -> bool:
    return all(code >= _PERMANENT for code, _ in refused.values())


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
