"""
The retention of conversations: after which time without a new message they are deleted.

A conversation has a retention of its own, or that of its namespace, or that of the settings, in this order.
Each is looked up when the deletion runs: a changed retention holds at once, also for what is there already.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import text

from app.kernel.database import UnitOfWork

_SET = text("""
    INSERT INTO conversation_retention (namespace, retention) VALUES (:namespace, :retention)
    ON CONFLICT (namespace) DO UPDATE SET retention = excluded.retention, updated_at = now()
""")
_UNSET = text("DELETE FROM conversation_retention WHERE namespace = :namespace")
_GET = text("SELECT retention FROM conversation_retention WHERE namespace = :namespace")
_OWN = text("""
    SELECT id, namespace, updated_at FROM conversation
    WHERE expires_at <= now() AND id <> ALL(:passed) ORDER BY expires_at LIMIT :limit
""")
# The namespaces are found by one step in the index for each, however many conversations they have.
_OF_NAMESPACES = text("""
    WITH RECURSIVE named AS (
        (SELECT namespace FROM conversation WHERE retention IS NULL ORDER BY namespace LIMIT 1)
        UNION ALL
        SELECT (SELECT c.namespace FROM conversation AS c WHERE c.retention IS NULL AND c.namespace > named.namespace
                ORDER BY c.namespace LIMIT 1)
        FROM named WHERE named.namespace IS NOT NULL
    ), kept AS (
        SELECT named.namespace,
               CASE WHEN policy.namespace IS NULL THEN CAST(:default AS interval) ELSE policy.retention END AS retention
        FROM named LEFT JOIN conversation_retention AS policy ON policy.namespace = named.namespace
        WHERE named.namespace IS NOT NULL
    )
    SELECT idle.* FROM kept, LATERAL (
        SELECT id, namespace, updated_at FROM conversation
        WHERE conversation.namespace = kept.namespace AND conversation.retention IS NULL
          AND updated_at <= now() - kept.retention AND id <> ALL(:passed)
        ORDER BY updated_at LIMIT :limit
    ) AS idle
    WHERE kept.retention IS NOT NULL LIMIT :limit
""")


@dataclass(frozen=True, slots=True)
class ExpiredConversation:
    """A conversation whose retention is over."""

    id: UUID
    namespace: str
    #: It stays if something was appended since.
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class NamespaceRetention:
    """The retention that a namespace has set for its conversations; None: they are kept for ever."""

    retention: timedelta | None


def set_for(work: UnitOfWork, namespace: str, retention: timedelta | None) -> None:
    """Set the retention of a namespace; None keeps its conversations, whatever the settings say."""
    work.execute(_SET, {"namespace": namespace, "retention": retention})


def unset_for(work: UnitOfWork, namespace: str) -> bool:
    """Return to the retention of the settings; False when the namespace had none of its own."""
    return work.run(_UNSET, {"namespace": namespace}) > 0


def find_for(work: UnitOfWork, namespace: str) -> NamespaceRetention | None:
    """Return what a namespace has set; None when the settings hold."""
    row = work.row(_GET, {"namespace": namespace})
    return None if row is None else NamespaceRetention(row.retention)


def expired(work: UnitOfWork, default: timedelta | None, limit: int, passed: list[UUID]) -> list[ExpiredConversation]:
    """Return conversations whose retention is over, except those of `passed`; `default` is that of the settings."""
    own = work.execute_of(ExpiredConversation, _OWN, {"limit": limit, "passed": passed})
    of_namespaces = {"default": default, "limit": limit, "passed": passed}
    others = work.rows_of(ExpiredConversation, _OF_NAMESPACES, of_namespaces)
    return [*own.fetchall(), *others][:limit]
