"""
Forgetting: memories are deleted for real, and a search afterwards shows what is left.

A forgotten memory goes with its text, its sources, its history, and the refusals that say the same. The messages that
it came from are a conversation's, and stay; the answer names them. The deletion and the search are one transaction:
either all of it happens and the search is of what was committed, or nothing happens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import TextClause, text

from app.files.file import parsed_id
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import InvalidInput, NotFound, Problem
from app.memory.memories import store
from app.memory.memories.memory import PREFIX, Memory
from app.memory.memories.service import shown
from app.memory.recall.passages import SourceKind
from app.memory.recall.query import RecallMode, RecallQuery, RecallScope
from app.memory.recall.service import Recall

#: Most memories that one request names.
MAX_IDS = 1_000
#: Memories that one transaction deletes when all of a user are forgotten.
_PART = 1_000
#: Texts that the search afterwards looks for, and characters of each.
_SEARCHED, _SEARCHED_CHARACTERS = 100, 200

_DELETE = text("DELETE FROM memory WHERE id = ANY(:ids)")
_DELETE_REFUSALS = text("""
    DELETE FROM memory_refusal
    WHERE namespace = :namespace AND (
        lower(text) = ANY(CAST(:texts AS text[]))
        OR EXISTS (SELECT 1 FROM unnest(CAST(:shown AS text[])) AS one WHERE strpos(detail, one) > 0)
    )
""")
_DELETE_REFUSALS_OF_USER = text("DELETE FROM memory_refusal WHERE namespace = :namespace AND user_name = :user")
_OF_USER = text("SELECT id FROM memory WHERE namespace = :namespace AND user_name = :user ORDER BY id LIMIT :limit")
_CONTAINING = text("""
    SELECT id FROM memory WHERE namespace = :namespace AND (CAST(:user AS text) IS NULL OR user_name = :user)
      AND strpos(lower(text), :query) > 0 ORDER BY id DESC LIMIT :limit
""")
_BY_ID = {
    "memories": text("SELECT count(*) AS found FROM memory WHERE id = ANY(:ids)"),
    "sources": text("SELECT count(*) AS found FROM memory_source WHERE memory_id = ANY(:ids)"),
    "history": text("SELECT count(*) AS found FROM memory_event WHERE memory_id = ANY(:ids)"),
    "passages and vectors": text("""
        SELECT count(*) AS found FROM passage
        WHERE namespace = ANY(:namespaces) AND source = 'memory' AND source_id = ANY(:shown)
    """),
}
_CONTAINS = "EXISTS (SELECT 1 FROM unnest(CAST(:texts AS text[])) AS one WHERE strpos(lower({column}), one) > 0)"
_BY_TEXT = {
    "memories": text(f"""
        SELECT count(*) AS found FROM memory
        WHERE namespace = :namespace AND user_name IS NOT DISTINCT FROM CAST(:user AS text)
          AND {_CONTAINS.format(column="text")}
    """),
    "refused memories": text(f"""
        SELECT count(*) AS found FROM memory_refusal
        WHERE namespace = :namespace AND user_name IS NOT DISTINCT FROM CAST(:user AS text)
          AND {_CONTAINS.format(column="text")}
    """),
}
# Of the passages of memories only: those of messages are a conversation's, and are reported as such.
_BY_TEXT["passages and vectors"] = text(f"""
    SELECT count(*) AS found FROM passage
    WHERE namespace = :namespace AND owner = COALESCE(CAST(:user AS text), '') AND source = 'memory'
      AND {_CONTAINS.format(column="text")}
""")
_OF_USER_LEFT = {
    "passages and vectors": text("""
        SELECT count(*) AS found FROM passage WHERE namespace = :namespace AND owner = :user AND source = 'memory'
    """),
    "memories": text("SELECT count(*) AS found FROM memory WHERE namespace = :namespace AND user_name = :user"),
    "refused memories": text(
        "SELECT count(*) AS found FROM memory_refusal WHERE namespace = :namespace AND user_name = :user"
    ),
}


@dataclass(frozen=True, slots=True)
class Searched:
    """A search after a deletion: where, for what, and how much it found."""

    where: str
    #: `id`, `text` or `user`.
    by: str
    found: int


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What was forgotten, and the search for it afterwards."""

    ids: Sequence[UUID]
    searched: Sequence[Searched]
    #: Messages that the memories came from, which are still in their conversations.
    messages: Sequence[UUID]

    @property
    def is_proved(self) -> bool:
        """Whether nothing was found by id or user; a text may be part of what another memory says."""
        return not any(one.found for one in self.searched if one.by != "text")


def forget(
    database: Database, memory_ids: Sequence[str], namespace: str | None, *, with_history: bool = False
) -> Forgotten:
    """
    Delete memories; with `with_history` also those that they superseded and that superseded them.

    Raises InvalidInput, and NotFound when one of them is not there: then none is deleted.
    """
    if not memory_ids or len(memory_ids) > MAX_IDS:
        raise InvalidInput([Problem("ids", f"there are {len(memory_ids)}", f"1 to {MAX_IDS} ids")], "request")
    with database.work() as work:
        found: dict[UUID, Memory] = {}
        for id_ in sorted(set(memory_ids)):  # in one order, so that two calls do not wait for each other
            parsed = parsed_id(id_, PREFIX)
            memory = None if parsed is None else store.find(work, parsed, lock=True)
            if memory is None or (namespace is not None and memory.namespace != namespace):
                raise NotFound("memory", id_[:100])
            found[memory.id] = memory
            if with_history:
                found.update((one.id, one) for one in store.all_of(work, store.chain(work, memory.id, MAX_IDS)))
        return forget_in(work, list(found.values()))


def matching(database: Database, query: str, namespace: str, user: str | None, *, limit: int = 50) -> list[Memory]:
    """
    Return memories that a request to forget may mean, for a preview: by their words, the best first.

    Those that hold no more are found if they contain the query as it is.
    """
    asked = RecallQuery(
        query,
        namespace,
        user,
        scope=RecallScope.ALL if user is None else RecallScope.OWN,
        mode=RecallMode.LEXICAL,
        limit=limit,
        sources=(SourceKind.MEMORY,),
        neighbours=False,
    )
    passages = Recall(database).search(asked).passages
    wanted = dict.fromkeys(parsed for one in passages if (parsed := parsed_id(one.source_id, PREFIX)) is not None)
    with database.work() as work:
        values = {"namespace": namespace, "user": user, "query": query.strip().lower(), "limit": limit}
        wanted.update(dict.fromkeys(row.id for row in work.rows(_CONTAINING, values)))
        found = {memory.id: memory for memory in store.all_of(work, list(wanted))}
    return [found[id_] for id_ in wanted if id_ in found][:limit]


def forget_in(work: UnitOfWork, memories: Collection[Memory]) -> Forgotten:
    """Delete memories, in a transaction of the caller, and search for them."""
    _delete(work, memories)
    ids = sorted(memory.id for memory in memories)
    named = {
        "ids": ids,
        "shown": [shown(one) for one in ids],
        "namespaces": sorted({memory.namespace for memory in memories}),
    }
    searched = [_count(work, where, "id", statement, named) for where, statement in _BY_ID.items()]
    scopes = sorted({(memory.namespace, memory.user or "") for memory in memories})
    for where, statement in _BY_TEXT.items():
        found = 0
        for namespace, user in scopes:
            texts = [
                memory.text.lower()[:_SEARCHED_CHARACTERS]
                for memory in memories
                if (memory.namespace, memory.user or "") == (namespace, user)
            ]
            values = {"namespace": namespace, "user": user or None, "texts": texts[:_SEARCHED]}
            found += _count(work, where, "text", statement, values).found
        searched.append(Searched(where, "text", found))
    messages = sorted({source.message_id for memory in memories for source in memory.sources if source.message_id})
    return Forgotten(ids, searched, messages)


def forget_user(database: Database, namespace: str, user: str) -> Forgotten:
    """Delete all memories of a user of a namespace, whether they hold or not, part by part."""
    ids: list[UUID] = []
    messages: set[UUID] = set()
    while True:
        with database.work() as work:
            part = [row.id for row in work.rows(_OF_USER, {"namespace": namespace, "user": user, "limit": _PART})]
            memories = store.all_of(work, part)
            _delete(work, memories)
            if len(part) < _PART:
                work.execute(_DELETE_REFUSALS_OF_USER, {"namespace": namespace, "user": user})
        ids += part
        messages |= {source.message_id for memory in memories for source in memory.sources if source.message_id}
        if len(part) < _PART:
            break
    with database.work() as work:
        values = {"namespace": namespace, "user": user}
        searched = [_count(work, where, "user", statement, values) for where, statement in _OF_USER_LEFT.items()]
    return Forgotten(ids, searched, sorted(messages))


def _delete(work: UnitOfWork, memories: Collection[Memory]) -> None:
    for namespace in {memory.namespace for memory in memories}:
        of = [memory for memory in memories if memory.namespace == namespace]
        values = {
            "namespace": namespace,
            "texts": [memory.text.lower() for memory in of],
            "shown": [shown(memory.id) for memory in of],
        }
        work.execute(_DELETE_REFUSALS, values)
    store.remove_passages(work, memories)
    work.execute(_DELETE, {"ids": sorted(memory.id for memory in memories)})


def _count(work: UnitOfWork, where: str, by: str, statement: TextClause, values: dict[str, Any]) -> Searched:
    row = work.row(statement, values)
    assert row is not None, "an aggregate has one row"
    return Searched(where, by, row.found)
