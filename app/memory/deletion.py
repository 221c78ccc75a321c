"""
Deletion for real: of a conversation, or of everything of a user, wherever it is stored.

Each store has a function that removes, and one that searches for what is left. The record goes last, in one transaction
with all that the database derived from it: a deletion that fails in between is repeated as a whole. The answer has what
each store removed, and the result of a search in each store after the commit.

What expires is deleted with the same functions, except runs and memories: runs have a retention of their own, and
memories are there to outlive the conversations that they came from.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from sqlalchemy import text

from app.kernel import log
from app.kernel.database import Database
from app.kernel.errors import BrokerUnreachable
from app.memory import deletion_stores
from app.memory.conversations import store
from app.memory.conversations.hot import HotConversations
from app.memory.deletion_stores import DeletableStore, DeletionScope
from app.workflows import erasure
from app.workflows.runs.service import Runs

_log = log.get(__name__)

#: Conversations of a user that one look finds.
_PART = 100
#: How often runs that were added meanwhile are looked for again.
_ROUNDS = 3

_RUNS_OF = text("SELECT run_id FROM conversation_run WHERE conversation_id = :id ORDER BY run_id")
_OF_USER = text("""
    SELECT id FROM conversation WHERE namespace = :namespace AND user_id = :user ORDER BY id LIMIT :limit
""")


@dataclass(frozen=True, slots=True)
class DeletionReport:
    """What was deleted, and what a search afterwards found, by store."""

    removed: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    #: What could not be removed or searched, and when it goes.
    notes: tuple[str, ...] = ()

    @property
    def is_proved(self) -> bool:
        """Whether every store was searched, and nothing was found."""
        return not self.notes and not any(self.left.values())


class Deletion:
    """Deletes what is remembered."""

    def __init__(self, runs: Runs, hot: HotConversations) -> None:
        self._runs, self._hot = runs, hot
        self._database: Database = runs.database
        self._stores: tuple[DeletableStore, ...] = deletion_stores.STORES

    def conversation(self, namespace: str, id_: UUID) -> DeletionReport:
        """Delete a conversation of a namespace, with all that stems from it."""
        removed: Counter[str] = Counter()
        notes: list[str] = []
        run_ids = self._delete(DeletionScope(namespace, id_), removed, notes)
        left, more = self._search(DeletionScope(namespace, id_), [id_], run_ids)
        return _report(removed, left, [*notes, *more])

    def user(self, namespace: str, user: str) -> DeletionReport:
        """Delete everything of a user of a namespace: conversations, memories, blocks and documents."""
        removed: Counter[str] = Counter()
        notes: list[str] = []
        ids: list[UUID] = []
        run_ids: set[UUID] = set()
        while found := self._conversations_of(namespace, user):
            for id_ in found:
                run_ids |= self._delete(DeletionScope(namespace, id_), removed, notes)
            ids += found
        scope = DeletionScope(namespace, user=user)
        with self._database.work() as work:
            for one in self._stores:
                removed[one.name] += one.remove(work, scope)
        left, more = self._search(scope, ids, run_ids)
        return _report(removed, left, [*notes, *more])

    def expire(self, namespace: str, id_: UUID, updated_at: datetime) -> bool:
        """Delete a conversation to which nothing was appended since; returns whether it was."""
        scope = DeletionScope(namespace, id_, expires=True)
        with self._database.work() as work:
            found = store.find(work, id_, lock=True)
            if found is None or found.updated_at != updated_at:
                return False
            for one in self._stores:
                one.remove(work, scope)
        try:
            self._hot.forget([id_])
        except BrokerUnreachable as error:
            _log.warning("hot_state_not_removed", conversation_id=str(id_), error=str(error))
        return True

    def left_of_user(self, namespace: str, user: str) -> dict[str, int]:
        """Return how much is stored of a user of a namespace, by store."""
        with self._database.work() as work:
            scope = DeletionScope(namespace, user=user)
            return {one.name: one.left(work, scope) for one in self._stores}

    def _delete(self, scope: DeletionScope, removed: Counter[str], notes: list[str]) -> set[UUID]:
        """Delete a conversation; returns the runs that held its texts."""
        id_ = scope.conversation
        assert id_ is not None, "the scope of a conversation"
        erased: set[UUID] = set()
        # Runs first, one by one: who locks a run and a conversation locks the run first.
        for _ in range(_ROUNDS):
            found = self._runs_of(id_) - erased
            if not found:
                break
            result = erasure.erase(self._runs, found)
            removed["runs"] += result.removed
            erased |= found
            notes += [f"run {run_id} has not ended; it is removed when it has" for run_id in result.pending]
        try:
            removed["recent messages in Redis"] += self._hot.forget([id_])
        except BrokerUnreachable as error:
            notes.append(f"{error}; what it has of the conversation expires {self._expiry()} after its last use")
        with self._database.work() as work:
            store.find(work, id_, lock=True)
            late = {row.run_id for row in work.rows(_RUNS_OF, {"id": id_})} - erased
            for one in self._stores:
                removed[one.name] += one.remove(work, scope)
        if late:
            result = erasure.erase(self._runs, late)
            removed["runs"] += result.removed
            notes += [f"run {run_id} has not ended; it is removed when it has" for run_id in result.pending]
        return erased | late

    def _search(self, scope: DeletionScope, ids: list[UUID], run_ids: set[UUID]) -> tuple[dict[str, int], list[str]]:
        with self._database.work() as work:
            found = {one.name: one.left(work, scope) for one in self._stores}
        found["runs"] = erasure.left(self._runs, run_ids)
        try:
            found["recent messages in Redis"] = self._hot.kept(ids)
        except BrokerUnreachable as error:
            return found, [f"Redis was not searched: {error}"]
        return found, []

    def _runs_of(self, id_: UUID) -> set[UUID]:
        with self._database.work() as work:
            return {row.run_id for row in work.rows(_RUNS_OF, {"id": id_})}

    def _conversations_of(self, namespace: str, user: str) -> list[UUID]:
        with self._database.work() as work:
            given = {"namespace": namespace, "user": user, "limit": _PART}
            return [row.id for row in work.rows(_OF_USER, given)]

    def _expiry(self) -> str:
        return f"{self._hot.settings.window_ttl.total_seconds():g} s"


def _report(removed: Counter[str], left: dict[str, int], notes: list[str]) -> DeletionReport:
    return DeletionReport(dict(removed), left, tuple(dict.fromkeys(notes)))
