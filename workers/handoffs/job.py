"""
The job of hand-offs: sends the messages that wait, confirms those whose run has ended, removes old ones.

Several control workers share the work; each message is sent by one.
"""

from __future__ import annotations

from collections.abc import Mapping

from app.handoffs import advance, store
from app.handoffs.mail import answers, intake, threads
from workers import jobs
from workers.handoffs.mail import answering, attachment_texts
from workers.passes import time_limit
from workers.runtime import Runtime

#: Most seconds of a pass.
_SECONDS = 10.0
#: Most seconds of a pass for texts of attachments, and for answers to mails.
_MAIL_SECONDS = 5.0
#: Most messages that a pass removes.
_REMOVED = 1_000


def run_handoffs(runtime: Runtime) -> Mapping[str, object] | None:
    """Send, confirm and remove messages. Raises Unavailable."""
    read = attachment_texts.read_due(runtime, time_limit(_MAIL_SECONDS))
    sent, confirmed = advance.advance(runtime.runs, time_limit(_SECONDS))
    answered = answering.send_due(runtime, time_limit(_MAIL_SECONDS))
    settings = runtime.settings.handoffs
    with runtime.runs.database.work() as work:
        removed = store.remove_old(work, settings.retention, settings.retention_unresolved, _REMOVED)
        threads.remove_old(work, settings.retention_unresolved, _REMOVED)
    if sent or confirmed or read or answered:
        runtime.activity.note()
    for is_near in (store.is_near, intake.is_near, answers.is_near):
        jobs.note_if(runtime, is_near)
    done = {"sent": sent, "confirmed": confirmed, "removed": removed, "texts": read, "answers": answered}
    return done if any(done.values()) else None
