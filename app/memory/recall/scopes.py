"""The conditions of a query in SQL, for the rows of `passage`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.memory.recall.passages import SourceKind, quoted, scope_word
from app.memory.recall.query import RecallQuery, RecallScope

#: Bits of the place of a passage for its part: those of one source are neighbours of each other.
PART_BITS = 20

#: A query selects by the columns of the index `ix_passage_scope` first; sources are always named, so that the time
#: after them is a part of the range.
CONDITIONS = """
    passage.namespace = :namespace AND (CAST(:owners AS text[]) IS NULL OR passage.owner = ANY(:owners))
    AND passage.source = ANY(:sources)
    AND (CAST(:since AS timestamptz) IS NULL OR passage.at >= :since)
    AND (CAST(:until AS timestamptz) IS NULL OR passage.at < :until)
    AND (CAST(:conversations AS text[]) IS NULL OR passage.conversation = ANY(:conversations))
    AND (CAST(:roles AS text[]) IS NULL OR passage.role = ANY(:roles))
    AND (CAST(:kinds AS text[]) IS NULL OR passage.kind = ANY(:kinds))
    AND (CAST(:beyond AS text) IS NULL OR passage.thread <> :beyond OR passage.place < :beyond_place)
"""


def owners_of(query: RecallQuery) -> list[str] | None:
    """Return the owners whose passages are searched; None for all."""
    match query.scope:
        case RecallScope.OWN:
            return [query.user or ""]
        case RecallScope.SHARED:
            return sorted({query.user or "", ""})
        case RecallScope.ALL:
            return None


def parameters(query: RecallQuery) -> Mapping[str, Any]:
    """Return the values of `CONDITIONS`."""
    beyond, position = query.outside if query.outside is not None else (None, 0)
    return {
        "namespace": query.namespace,
        "owners": owners_of(query),
        "sources": sorted(source.value for source in query.sources or SourceKind),
        "since": query.since,
        "until": query.until,
        "conversations": list(query.conversations) or None,
        "roles": list(query.roles) or None,
        "kinds": list(query.kinds) or None,
        "beyond": beyond,
        "beyond_place": position << PART_BITS,
    }


def scope_query(query: RecallQuery) -> str:
    """Return the scope as a condition on words (a `tsquery`): the index of words then finds nothing of others."""
    owners = owners_of(query)
    wanted = (
        [scope_word(query.namespace)]
        if owners is None
        else [scope_word(query.namespace, user=owner) for owner in owners]
    )
    found = _any(wanted)
    if query.conversations:
        found += f" & {_any([scope_word(query.namespace, conversation=one) for one in query.conversations])}"
    return found


def _any(found: list[str]) -> str:
    return f"({' | '.join(map(quoted, found))})"
