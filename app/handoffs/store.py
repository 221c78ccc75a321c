"""
The statements of hand-offs.

Every function runs in a transaction of its caller. A change of a message names the state and the sending that it
replaces, so a late worker changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.handoffs.connectors.connector import MAX_SENDER, InboundMessage
from app.handoffs.definition import Handoff
from app.handoffs.record import HandoffMessage, HandoffStage, MessageState
from app.handoffs.scoring import MessageScores
from app.kernel import ids
from app.kernel.database import UnitOfWork
from app.kernel.errors import Problem
from app.kernel.security import texts

#: Most hand-offs of a namespace.
MAX_HANDOFFS = 500

_VERSION_COLUMNS = "namespace, name, version, document, created_at"
_COLUMNS = """
    id, namespace, handoff, version, key, sender, state, message, payload, problems, stages, run_id, sending,
    duplicates, takes, accuracy, completeness, timeliness, received_at, finished_at
"""
_MESSAGE_COLUMNS = ", ".join(f"m.{name.strip()}" for name in _COLUMNS.split(","))
_LOCK_NAME = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 5840918372))")
_NEWEST = text("""
    SELECT version, sha256 FROM handoff WHERE namespace = :namespace AND name = :name ORDER BY version DESC LIMIT 1
""")
_ADD = text("""
    INSERT INTO handoff (namespace, name, version, document, sha256)
    VALUES (:namespace, :name, :version, CAST(:document AS json), :sha256)
""")
_GET = text(f"""
    SELECT {_VERSION_COLUMNS} FROM handoff
    WHERE namespace = :namespace AND name = :name AND (CAST(:version AS integer) IS NULL OR version = :version)
    ORDER BY version DESC LIMIT 1
""")
_ALL = text(f"""
    SELECT DISTINCT ON (namespace, name) {_VERSION_COLUMNS} FROM handoff
    WHERE CAST(:namespace AS text) IS NULL OR namespace = :namespace ORDER BY namespace, name, version DESC LIMIT 1000
""")
_COUNT = text("SELECT count(DISTINCT name) AS handoffs FROM handoff WHERE namespace = :namespace")
_DELETE = text("DELETE FROM handoff WHERE namespace = :namespace AND name = :name")
_RECEIVE = text("""
    INSERT INTO handoff_message AS m (
        id, namespace, handoff, version, key, sender, state, message, stages, problems, sending, duplicates, takes,
        due_at, finished_at
    ) VALUES (
        :id, :namespace, :handoff, :version, :key, :sender, CAST(:state AS text), CAST(:message AS json),
        json_build_array(json_build_object('stage', 'authenticate', 'at', now(), 'detail', CAST(:detail AS text))),
        '[]', 1, 0, 0, now(), CASE WHEN CAST(:state AS text) = 'skipped' THEN now() END
    )
    ON CONFLICT (namespace, handoff, key) DO UPDATE SET duplicates = m.duplicates + 1
    RETURNING id, (xmax = 0) AS created
""")
_OPT = {
    "out": text("""
        INSERT INTO handoff_opt_out (namespace, recipient, at) VALUES (:namespace, :recipient, now())
        ON CONFLICT (namespace, recipient) DO NOTHING
    """),
    "in": text("DELETE FROM handoff_opt_out WHERE namespace = :namespace AND recipient = :recipient"),
}
_HAS_OPTED_OUT = text("SELECT 1 FROM handoff_opt_out WHERE namespace = :namespace AND recipient = :recipient")
_TAKE = text(f"""
    UPDATE handoff_message m SET due_at = now() + CAST(:lease AS interval), takes = takes + 1
    WHERE id IN (
        SELECT id FROM handoff_message WHERE state = 'received' AND due_at <= now()
        ORDER BY due_at LIMIT :most FOR UPDATE SKIP LOCKED
    )
    RETURNING {_MESSAGE_COLUMNS}
""")
_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended('handoff ' || :namespace || ' ' || :handoff, 0))")
_SENT_SINCE = "namespace = :namespace AND handoff = :handoff AND sent_at > now() - CAST(:per AS interval)"
_RESERVE = text(f"""
    UPDATE handoff_message SET sent_at = now()
    WHERE id = :id AND (SELECT count(*) FROM handoff_message WHERE {_SENT_SINCE}) < :requests
""")
_POSTPONE = text(f"""
    UPDATE handoff_message SET takes = takes - 1, due_at = CAST(:per AS interval)
        + COALESCE((SELECT min(sent_at) FROM handoff_message WHERE {_SENT_SINCE}), now())
    WHERE id = :id AND state = 'received'
""")
_STAGE = """
    (
        stages::jsonb
        || jsonb_build_object('stage', CAST(:stage AS text), 'at', now(), 'detail', CAST(:detail AS text))
    )::json
"""
_CHANGE = text(f"""
    UPDATE handoff_message SET
        state = :state, payload = COALESCE(CAST(:payload AS json), payload), problems = CAST(:problems AS json),
        run_id = COALESCE(CAST(:run_id AS uuid), run_id), accuracy = :accuracy, completeness = :completeness,
        timeliness = :timeliness, stages = {_STAGE},
        finished_at = CASE WHEN CAST(:is_final AS boolean) THEN now() END
    WHERE id = :id AND state = :from_state AND sending = :sending
    RETURNING finished_at
""")
_ENDED = text(f"""
    SELECT {_MESSAGE_COLUMNS}, run.state AS run_state, run.finished_at AS ended_at, run.output,
        run.output_sha256, run.error
    FROM handoff_message m LEFT JOIN run ON run.id = m.run_id
    WHERE m.state = 'delivering' AND (run.id IS NULL OR run.state IN ('succeeded', 'failed', 'cancelled'))
    LIMIT :most FOR UPDATE OF m SKIP LOCKED
""")
_RESEND = text(f"""
    UPDATE handoff_message SET
        state = 'received', sending = sending + 1, takes = 0, due_at = now(), message = CAST(:message AS json),
        version = :version, payload = NULL, problems = '[]', run_id = NULL, accuracy = NULL, completeness = NULL,
        timeliness = NULL, finished_at = NULL, stages = {_STAGE}
    WHERE id = :id AND state = :from_state AND sending = :sending RETURNING {_COLUMNS}
""")
_FIND = text(f"""
    SELECT {_COLUMNS} FROM handoff_message WHERE id = :id AND namespace = :namespace AND handoff = :handoff
""")
_PAGE = text(f"""
    SELECT {_COLUMNS} FROM handoff_message
    WHERE namespace = :namespace AND handoff = :handoff
      AND (CAST(:state AS text) IS NULL OR state = :state) AND (CAST(:before AS uuid) IS NULL OR id < :before)
    ORDER BY id DESC LIMIT :most
""")
_SCORES = text("""
    SELECT sender, count(*) AS messages,
        count(*) FILTER (WHERE state = 'delivered') AS delivered,
        count(*) FILTER (WHERE state = 'invalid') AS invalid,
        count(*) FILTER (WHERE state = 'failed') AS failed,
        COALESCE(sum(duplicates), 0) AS duplicates,
        avg(accuracy) AS accuracy, avg(completeness) AS completeness,
        avg(timeliness) FILTER (WHERE state = 'delivered') AS timeliness
    FROM handoff_message
    WHERE namespace = :namespace AND handoff = :handoff AND finished_at > now() - CAST(:window AS interval)
        AND state IN ('delivered', 'invalid', 'failed')
    GROUP BY GROUPING SETS ((), (sender)) ORDER BY messages DESC, sender LIMIT 1001
""")
_REMOVE = text("""
    DELETE FROM handoff_message WHERE id IN (
        SELECT id FROM handoff_message
        WHERE finished_at < now() - CAST(:retention AS interval) AND state IN ('delivered', 'skipped')
            OR finished_at < now() - CAST(:unresolved AS interval)
        LIMIT :most FOR UPDATE SKIP LOCKED
    )
""")
_NEAR = text("""
    SELECT EXISTS (SELECT FROM handoff_message WHERE state = 'received' AND due_at <= now() + CAST(:within AS interval))
        OR EXISTS (SELECT FROM handoff_message WHERE state = 'delivering') AS near
""")


@dataclass(frozen=True, slots=True)
class HandoffVersion:
    """A version of a hand-off."""

    namespace: str
    name: str
    version: int
    document: dict[str, Any]
    created_at: datetime


@dataclass(frozen=True, slots=True)
class SenderScores:
    """The scores of a hand-off, or of one sender, in a window."""

    #: None: of all senders together.
    sender: str | None
    messages: int
    delivered: int
    invalid: int
    failed: int
    duplicates: int
    accuracy: float | None
    completeness: float | None
    timeliness: float | None

    @property
    def success(self) -> float | None:
        """The part of messages that were delivered; None without one."""
        return self.delivered / self.messages if self.messages else None


@dataclass(frozen=True, slots=True)
class MessageChange:
    """What becomes of a message."""

    state: MessageState
    stage: HandoffStage
    detail: str = ""
    payload: Mapping[str, Any] | None = None
    problems: Sequence[Problem] = ()
    run_id: UUID | None = None
    scores: MessageScores | None = None


def put(work: UnitOfWork, namespace: str, handoff: Handoff) -> tuple[HandoffVersion, bool]:
    """Store a version, unless it equals the newest one. The second value says whether it was stored."""
    name, sha256 = handoff.handoff, handoff.sha256()
    work.run(_LOCK_NAME, {"name": f"{namespace}/{name}"})
    newest = work.row(_NEWEST, {"namespace": namespace, "name": name})
    created = newest is None or newest.sha256 != sha256
    if created:
        version = (newest.version if newest else 0) + 1
        values = {"namespace": namespace, "name": name, "version": version, "sha256": sha256}
        work.run(_ADD, {**values, "document": json.dumps(handoff.document())})
    found = find_version(work, namespace, name)
    assert found is not None, "it was stored"
    return found, created


def find_version(work: UnitOfWork, namespace: str, name: str, version: int | None = None) -> HandoffVersion | None:
    """Return a version, by default the newest, or None."""
    return work.row_of(HandoffVersion, _GET, {"namespace": namespace, "name": name, "version": version})


def newest_of_all(work: UnitOfWork, namespace: str | None) -> list[HandoffVersion]:
    """Return the newest version of each hand-off of a namespace, or of all."""
    return work.rows_of(HandoffVersion, _ALL, {"namespace": namespace})


def count(work: UnitOfWork, namespace: str) -> int:
    """Return the number of hand-offs of a namespace."""
    return int(work.rows(_COUNT, {"namespace": namespace})[0].handoffs)


def delete(work: UnitOfWork, namespace: str, name: str) -> bool:
    """Remove all versions of a hand-off. Its messages stay. Returns False when there are none."""
    return bool(work.run(_DELETE, {"namespace": namespace, "name": name}))


def receive(work: UnitOfWork, of: HandoffVersion, found: InboundMessage) -> tuple[UUID, bool]:
    """Store a message. Returns its id, and False when its key is known: the delivery is then counted."""
    state = MessageState.SKIPPED if found.skipped else MessageState.RECEIVED
    values = {"id": ids.new_id(), "namespace": of.namespace, "handoff": of.name, "version": of.version}
    values |= {
        "key": found.key,
        "sender": texts.storable(found.sender, MAX_SENDER),
        "state": state.value,
        "detail": found.skipped,
    }
    row = work.rows(_RECEIVE, {**values, "message": json.dumps(found.message)})[0]
    if found.consent and row.created:
        work.run(_OPT[found.consent], {"namespace": of.namespace, "recipient": found.sender})
    return row.id, bool(row.created)


def has_opted_out(work: UnitOfWork, namespace: str, recipient: str) -> bool:
    """Whether somebody wants no replies."""
    return work.row(_HAS_OPTED_OUT, {"namespace": namespace, "recipient": texts.storable(recipient)}) is not None


def reserve(work: UnitOfWork, message: HandoffMessage, requests: int, per: timedelta) -> bool:
    """Whether a message may be sent now, if at most so many are in such a time. If not, it waits until one may."""
    about = {"id": message.id, "namespace": message.namespace, "handoff": message.handoff, "per": per}
    work.rows(_LOCK, {"namespace": message.namespace, "handoff": message.handoff})
    if work.run(_RESERVE, {**about, "requests": requests}):
        return True
    work.run(_POSTPONE, about)
    return False


def take(work: UnitOfWork, lease: timedelta, most: int) -> list[HandoffMessage]:
    """Take messages that wait. Another worker takes them when the lease is over and they still wait."""
    return work.rows_of(HandoffMessage, _TAKE, {"lease": lease, "most": most})


def change(work: UnitOfWork, message: HandoffMessage, to: MessageChange) -> datetime | None:
    """Change a message. Returns the instant of its end, or None when it goes on or was changed by somebody else."""
    scores, is_final = to.scores, to.state not in (MessageState.RECEIVED, MessageState.DELIVERING)
    values = {"id": message.id, "from_state": message.state, "sending": message.sending, "state": to.state.value}
    values |= {"stage": to.stage.value, "detail": texts.storable(to.detail), "is_final": is_final, "run_id": to.run_id}
    values |= {
        "payload": None if to.payload is None else json.dumps(to.payload),
        "problems": json.dumps([{"where": p.where, "message": p.message, "accepted": p.accepted} for p in to.problems]),
        "accuracy": None if scores is None else scores.accuracy,
        "completeness": None if scores is None else scores.completeness,
        "timeliness": None if scores is None else scores.timeliness,
    }
    row = work.row(_CHANGE, values)
    return None if row is None else row.finished_at


def ended(work: UnitOfWork, most: int) -> list[Any]:
    """Lock and return messages whose run has ended or is gone, with `run_state`, `ended_at`, `output` and `error`."""
    return work.rows(_ENDED, {"most": most})


def resend(
    work: UnitOfWork, message: HandoffMessage, version: int, changed: Mapping[str, Any], detail: str
) -> HandoffMessage | None:
    """Send a message again; None when somebody else has changed it."""
    values = {"id": message.id, "from_state": message.state, "sending": message.sending, "version": version}
    values |= {"stage": HandoffStage.RESEND.value, "detail": detail, "message": json.dumps(changed)}
    return work.row_of(HandoffMessage, _RESEND, values)


def find(work: UnitOfWork, namespace: str, handoff: str, id_: UUID) -> HandoffMessage | None:
    """Return a message, or None."""
    return work.row_of(HandoffMessage, _FIND, {"id": id_, "namespace": namespace, "handoff": handoff})


def page(
    work: UnitOfWork, namespace: str, handoff: str, state: MessageState | None, before: UUID | None, most: int
) -> list[HandoffMessage]:
    """Return messages, the newest first."""
    values = {"namespace": namespace, "handoff": handoff, "state": None if state is None else state.value}
    return work.rows_of(HandoffMessage, _PAGE, {**values, "before": before, "most": most})


def scores(work: UnitOfWork, namespace: str, handoff: str, window: timedelta) -> list[SenderScores]:
    """Return the scores of all senders together, and of each of the thousand with most messages."""
    return work.rows_of(SenderScores, _SCORES, {"namespace": namespace, "handoff": handoff, "window": window})


def remove_old(work: UnitOfWork, retention: timedelta, unresolved: timedelta, most: int) -> int:
    """Remove delivered and skipped messages, and invalid and failed ones, after their retention. Returns how many."""
    return work.run(_REMOVE, {"retention": retention, "unresolved": max(retention, unresolved), "most": most})


def is_near(work: UnitOfWork, within: timedelta) -> bool:
    """Whether messages wait, or will within that time."""
    return bool(work.rows(_NEAR, {"within": within})[0].near)
