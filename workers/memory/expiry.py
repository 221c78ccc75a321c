"""
The job that deletes conversations whose retention is over.

A pass is bounded in time and takes one conversation at a time: each is looked at again under its lock, and stays if
something was appended meanwhile. One that cannot be deleted is logged with the reason, and does not stop the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from uuid import UUID

import psycopg

from app.kernel import log
from app.kernel.errors import DatabaseUnreachable
from app.memory.conversations import retention
from app.memory.deletion import Deletion
from workers.passes import time_limit
from workers.runtime import Runtime

_log = log.get(__name__)

#: Most seconds of a pass: a worker that stops waits for it.
_SECONDS = 5.0
#: Conversations that are looked for at a time.
_PART = 100


def run_conversation_expiry(runtime: Runtime) -> Mapping[str, object] | None:
    """Delete conversations whose retention is over."""
    assert runtime.hot is not None, "a worker has it from its start"
    deletion = Deletion(runtime.runs, runtime.hot)
    removed = expire(deletion, runtime, runtime.settings.conversations.retention, time_limit(_SECONDS))
    if not removed:
        return None
    _log.info("conversations_expired", removed=removed)
    return {"conversations": removed}


def expire(deletion: Deletion, runtime: Runtime, default: timedelta | None, in_time: Callable[[], bool]) -> int:
    """Delete while `in_time()` is true; returns how many conversations."""
    removed = 0
    passed: list[UUID] = []
    while in_time():
        with runtime.runs.database.work() as work:
            found = retention.expired(work, default, _PART, passed)
        if not found:
            break
        for one in found:
            if not in_time():
                break
            try:
                if deletion.expire(one.namespace, one.id, one.updated_at):
                    removed += 1
                else:
                    passed.append(one.id)
            except DatabaseUnreachable:
                raise
            except psycopg.Error as error:
                _log.warning("conversation_not_expired", conversation_id=str(one.id), error=str(error))
                passed.append(one.id)
    return removed
