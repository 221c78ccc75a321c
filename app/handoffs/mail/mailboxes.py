"""
Mailboxes: how far each one has been read, and which worker watches it.

A worker watches a mailbox while it has the lease of its row, and only the holder moves the position. The position moves
after a mail is stored; a mail that is stored and read again is known by its key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import text

from app.handoffs.connectors.email import ImapMailbox
from app.handoffs.store import HandoffVersion
from app.kernel.database import UnitOfWork
from app.kernel.security import egress, texts
from app.kernel.security.egress import EgressRule

#: Most hand-offs with mail of an installation.
MAX_SOURCES = 5_000
_MAX_ERROR = 500
#: The ports of IMAP, without and with TLS from the beginning.
_PORTS = (143, 993)

#: A connection lasts no longer than the lease of its worker.
_COLUMNS = """
    namespace, handoff, place, uid_validity, next_uid, failed, error, seen_at, next_try_at,
    owner <> '' AND until > now() AS is_held, is_connected AND until > now() AS is_connected
"""
_SOURCES = text(f"""
    SELECT * FROM (
        SELECT DISTINCT ON (namespace, name) namespace, name, version, document, created_at FROM handoff
        ORDER BY namespace, name, version DESC
    ) AS newest
    WHERE document->'source'->>'kind' = 'email' LIMIT {MAX_SOURCES}
""")
_CLAIM = text(f"""
    INSERT INTO mailbox AS m (namespace, handoff, place, uid_validity, next_uid, failed, owner, until, error)
    VALUES (:namespace, :handoff, :place, NULL, 1, '{{}}', :owner, now() + CAST(:lease AS interval), '')
    ON CONFLICT (namespace, handoff) DO UPDATE SET
        owner = :owner, until = now() + CAST(:lease AS interval), place = :place, is_connected = false,
        next_try_at = NULL,
        uid_validity = CASE WHEN m.place = :place THEN m.uid_validity END,
        next_uid = CASE WHEN m.place = :place THEN m.next_uid ELSE 1 END,
        failed = CASE WHEN m.place = :place THEN m.failed ELSE '{{}}' END,
        seen_at = CASE WHEN m.place = :place THEN m.seen_at END
    WHERE m.owner = :owner OR m.until < now()
    RETURNING {_COLUMNS}
""")
_MOVE = text("""
    UPDATE mailbox SET
        uid_validity = :uid_validity, next_uid = :next_uid, failed = CAST(:failed AS json), error = '',
        is_connected = true, next_try_at = NULL,
        until = now() + CAST(:lease AS interval), seen_at = CASE WHEN :seen THEN now() ELSE seen_at END
    WHERE namespace = :namespace AND handoff = :handoff AND owner = :owner AND place = :place
""")
_RELEASE = text("""
    UPDATE mailbox SET owner = '', until = now(), error = :error, is_connected = false,
                       next_try_at = now() + CAST(:pause AS interval)
    WHERE namespace = :namespace AND handoff = :handoff AND owner = :owner
""")
_SHOW = text(f"SELECT {_COLUMNS} FROM mailbox WHERE namespace = :namespace AND handoff = :handoff")


@dataclass(frozen=True, slots=True)
class MailboxPosition:
    """How far a mailbox has been read."""

    namespace: str
    handoff: str
    place: str
    #: None: nothing was read of it yet.
    uid_validity: int | None
    #: The least UID that was not seen yet.
    next_uid: int
    #: By UID: how often a mail could not be stored, and the next try in seconds since 1970.
    failed: Mapping[str, list[float]]
    #: Why it is not watched now.
    error: str
    #: When it was last read to its end.
    seen_at: datetime | None
    #: When it is tried again after a failure.
    next_try_at: datetime | None
    #: Whether a worker has its lease, and whether the server has answered that worker.
    is_held: bool
    is_connected: bool


def place_of(mailbox: ImapMailbox) -> str:
    """Return what identifies a mailbox."""
    parts = [mailbox.host.lower(), str(mailbox.server_port), mailbox.user, mailbox.folder]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def is_listed(mailbox: ImapMailbox, hosts: Iterable[str]) -> bool:
    """Whether the setting `mail.imap_hosts` lists the server of a mailbox."""
    return any(_lists(egress.rule(one), mailbox) for one in hosts)


def _lists(rule: EgressRule, mailbox: ImapMailbox) -> bool:
    """Whether a rule lists the server; without a port, it lists those of IMAP."""
    host, port = mailbox.host.lower(), mailbox.server_port
    listed = host.endswith(f".{rule.host}") if rule.subdomains else host == rule.host
    return listed and port in (_PORTS if rule.port is None else (rule.port,))


def sources(work: UnitOfWork) -> list[HandoffVersion]:
    """Return the newest versions of all hand-offs with mail."""
    return work.rows_of(HandoffVersion, _SOURCES)


def claim(
    work: UnitOfWork, namespace: str, handoff: str, place: str, owner: str, lease: timedelta
) -> MailboxPosition | None:
    """Take the lease of a mailbox, or renew it; None while another worker has it."""
    values = {"namespace": namespace, "handoff": handoff, "place": place, "owner": owner, "lease": lease}
    return work.row_of(MailboxPosition, _CLAIM, values)


def move(work: UnitOfWork, position: MailboxPosition, owner: str, lease: timedelta, *, seen: bool) -> bool:
    """Store a position, and renew the lease. `seen`: it is the end of the mailbox. False when another has the lease."""
    values = {
        "namespace": position.namespace,
        "handoff": position.handoff,
        "place": position.place,
        "uid_validity": position.uid_validity,
        "next_uid": position.next_uid,
        "failed": json.dumps(dict(position.failed)),
        "owner": owner,
        "lease": lease,
        "seen": seen,
    }
    return bool(work.run(_MOVE, values))


def release(work: UnitOfWork, namespace: str, handoff: str, owner: str, error: str, pause: timedelta | None) -> None:
    """Give the lease back, with the reason if there is one, and the time until the next try."""
    values = {"namespace": namespace, "handoff": handoff, "owner": owner, "pause": pause}
    work.run(_RELEASE, {**values, "error": texts.printable(error, _MAX_ERROR)})


def find(work: UnitOfWork, namespace: str, handoff: str) -> MailboxPosition | None:
    """Return how far a mailbox has been read, or None."""
    return work.row_of(MailboxPosition, _SHOW, {"namespace": namespace, "handoff": handoff})
