"""
Known memories that resemble texts: by their words, and by their meaning where an embedding model answers.

The vector of a text comes directly from a pool, within `recall.query_timeout`. When it does not come, the other texts
are compared by words alone, and the reason is part of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from app.files.file import parsed_id
from app.kernel.database import Database
from app.memory.conversations.conversation import StoredConversation
from app.memory.memories import store
from app.memory.memories.memory import PREFIX, Memory
from app.memory.recall.passages import SourceKind
from app.memory.recall.query import MAX_QUERY, RecallMode, RecallQuery
from app.memory.recall.service import Recall

#: Memories for each text.
_MOST = 12


@dataclass(frozen=True, slots=True)
class SimilarMemories:
    """Memories of the same user that resemble texts, the most similar ones of the first text first."""

    memories: Sequence[Memory] = ()
    #: For each text the cosines of memories, by their ids.
    cosines: Sequence[Mapping[UUID, float]] = ()
    #: Why texts were compared by their words alone.
    without_meaning: str | None = None


def find(
    database: Database, recall: Recall, conversation: StoredConversation, given: Sequence[str], mode: RecallMode
) -> SimilarMemories:
    """Return memories that hold, of the user of a conversation. Raises DatabaseUnreachable."""
    found: dict[UUID, None] = {}
    cosines = list[dict[UUID, float]]()
    reason: str | None = None
    for one in given:
        query = RecallQuery(
            one[:MAX_QUERY],
            conversation.namespace,
            conversation.user,
            mode=mode if reason is None else RecallMode.LEXICAL,
            limit=_MOST,
            sources=(SourceKind.MEMORY,),
            neighbours=False,
        )
        recalled = recall.search(query)
        if query.mode is not RecallMode.LEXICAL and not recalled.dense.used:
            reason = recalled.dense.reason or "there is no vector of it"
        cosines.append({})
        for passage in recalled.passages:
            if (parsed := parsed_id(passage.source_id, PREFIX)) is not None:
                found[parsed] = None
                if passage.scores.dense is not None:
                    cosines[-1][parsed] = passage.scores.dense
    with database.work() as work:
        memories = {memory.id: memory for memory in store.all_of(work, list(found))}
    return SimilarMemories([memories[id_] for id_ in found if id_ in memories], cosines, reason)
