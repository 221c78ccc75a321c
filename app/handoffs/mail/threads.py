"""
Threads: mails that refer to each other belong together, in whatever order they come.

Each message id of a hand-off has a thread, also one that was only referred to. A mail that refers to two threads makes
them one: that of the mail which came first.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import text

from app.kernel.database import UnitOfWork

#: Most threads that a mail makes one, so that a forged mail cannot merge all of them.
_MAX_MERGED = 3
#: Ids that a mail refers to, and that get its thread: its own, the first one, and the last ones.
_MAX_RELATED = 30

_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 2718093371))")
_FIND = text("""
    SELECT thread, min(used_at) AS since FROM mail_thread
    WHERE namespace = :namespace AND handoff = :handoff AND message_id = ANY(:ids)
    GROUP BY thread ORDER BY since, thread
""")
_JOIN = text("""
    INSERT INTO mail_thread (namespace, handoff, message_id, thread)
    SELECT :namespace, :handoff, id, :thread FROM unnest(CAST(:ids AS text[])) AS id
    ON CONFLICT (namespace, handoff, message_id) DO NOTHING
""")
_MERGE = text("""
    UPDATE mail_thread SET thread = :thread
    WHERE namespace = :namespace AND handoff = :handoff AND thread = ANY(:others)
""")
_REMOVE = text("""
    DELETE FROM mail_thread WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM mail_thread WHERE used_at < now() - CAST(:retention AS interval) LIMIT :most
    ))
""")


def join(work: UnitOfWork, namespace: str, handoff: str, related: Sequence[str]) -> str:
    """Return the thread of a mail by its own id and those that it refers to, the oldest first; it is stored for all."""
    own, *others = related
    ids = list(dict.fromkeys([own, *others[:1], *others[-_MAX_RELATED + 2 :]]))
    names = {"namespace": namespace, "handoff": handoff}
    work.run(_LOCK, {"name": f"{namespace}/{handoff}"})
    found = [row.thread for row in work.rows(_FIND, {**names, "ids": ids})]
    thread = found[0] if found else (others[0] if others else own)
    work.run(_JOIN, {**names, "thread": thread, "ids": ids})
    if merged := [one for one in found[1:_MAX_MERGED] if one != thread]:
        work.run(_MERGE, {**names, "thread": thread, "others": merged})
    return thread


def remove_old(work: UnitOfWork, retention: timedelta, most: int) -> int:
    """Remove what was stored longer ago. Returns how many."""
    return work.run(_REMOVE, {"retention": retention, "most": most})
