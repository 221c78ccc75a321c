"""
The answers to mails over SMTP, by the mail server of the settings `alerts.smtp_*`.

An answer is taken for the time of a lease, sent, and recorded. A worker that dies in between leaves it to the next one,
which sends it with the same id: mail programs show that once.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from email.message import EmailMessage
from email.utils import format_datetime

from app.governance.alerts.notification import DeliveryFailed, pause_after
from app.handoffs.mail import answers, automatic
from app.handoffs.mail.answers import TakenAnswer
from app.kernel import clock, ids, log
from workers.governance.delivery import email
from workers.runtime import Runtime

_log = log.get(__name__)

#: The lease of an answer, beyond the timeout of an attempt.
_LEASE = timedelta(seconds=30)


def send_due(runtime: Runtime, in_time: Callable[[], bool]) -> int:
    """Send answers that are due while there is time. Returns how many attempts there were. Raises Unavailable."""
    settings, attempts = runtime.settings.alerts, 0
    while in_time():
        with runtime.runs.database.work() as work:
            taken = answers.take(work, settings.timeout * 2 + _LEASE)
        if taken is None:
            break
        attempts += 1
        try:
            email.send(message_of(taken), settings, settings.timeout)
        except (DeliveryFailed, ValueError) as failure:  # a header that cannot be written is a ValueError
            final = not isinstance(failure, DeliveryFailed) or failure.final
            pause = None if final else pause_after(taken.attempts, ids.chance())
            _log.warning("mail_answer_not_sent", message_id=str(taken.message_id), error=str(failure))
            with runtime.runs.database.work() as work:
                answers.failed(work, taken, str(failure), pause)
            continue
        with runtime.runs.database.work() as work:
            answers.sent(work, taken)
    return attempts


def message_of(taken: TakenAnswer) -> EmailMessage:
    """Return an answer as a mail. Raises ValueError for a header that cannot be written."""
    answer, message = taken.answer, EmailMessage()
    message["From"] = answer.sender
    message["To"] = answer.recipient
    message["Subject"] = answer.subject
    message["Date"] = format_datetime(clock.now())
    message["Message-ID"] = answer.message_id
    if answer.in_reply_to:
        message["In-Reply-To"] = answer.in_reply_to
        message["References"] = " ".join(answer.references)
    message["Auto-Submitted"] = "auto-replied"
    message["X-Auto-Response-Suppress"] = "All"
    message[automatic.OWN_HEADER] = taken.handoff
    message.set_content(answer.text)
    return message
